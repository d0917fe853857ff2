"""Loading user images: files of any format, arrays of any size."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

from vpd_jax.errors import UserError
from vpd_jax.files import image_decoding

# Raster formats by their name in Pillow, without icons, layered files and vector graphics.
FORMATS = tuple(
  ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI", "QOI"]
)
MAX_ASPECT = 16  # largest ratio of the sides; more elongated images are squeezed to it


def as_image(image: object) -> np.ndarray:
  """Converts an image of any common type to uint8 or float [H, W, 3], RGB.

  Args:
    image: a path; a PIL image; or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], whose alpha is dropped: bool,
      uint8, uint16, another integer type with values of 0 to 255, or float in [0, 1].

  Raises:
    ValueError: another shape, dtype or range; a file that is not an image, or is damaged.
  """
  if isinstance(image, str | os.PathLike):
    return read_image(Path(image).expanduser())
  if isinstance(image, Image.Image):
    with image_decoding.faults("an image", remedy=""):  # a lazily opened file is decoded now
      return _rgb(image, "an image")
  array = np.asarray(image)
  shape = array.shape
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
    channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
    hint = "; its channels come first, which np.moveaxis(image, 0, -1) changes" if channels_first else ""
    raise UserError(f"an image has shape {shape}; give [H, W, 3], [H, W] or [H, W, 4]{hint}.")
  array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]
  if np.issubdtype(array.dtype, np.floating):
    low, high = array.min(), array.max()
    if not (low >= -0.5 and high <= 1.5):  # resizing may leave [0, 1] somewhat; NaN fails both comparisons
      span = f"down to {low:.6g}" if low < -0.5 else f"up to {high:.6g}"
      raise UserError(f"an image of dtype {array.dtype} has values {span}; give float in [0, 1].")
    return array
  if array.dtype == np.bool_ or array.dtype == np.uint16:
    return (array * (255.0 if array.dtype == np.bool_ else 255 / 65535)).astype(np.uint8)
  if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
    span = f" and values of {array.min()} to {array.max()}" if np.issubdtype(array.dtype, np.integer) else ""
    raise UserError(f"an image has dtype {array.dtype}{span}; give uint8, uint16, or float in [0, 1].")
  return array.astype(np.uint8, copy=False)


def to_float(image: object, dtype: DTypeLike) -> np.ndarray:
  """uint8 [H, W, 3], or float in [0, 1], to float in [0, 1].

  Raises:
    ValueError: another shape or dtype.
  """
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
    raise UserError(f"an image has shape {image.shape}; give [H, W, 3].")
  if image.dtype == np.uint8:
    return image.astype(dtype) / np.asarray(255, dtype)
  if not np.issubdtype(image.dtype, np.floating):
    raise UserError(f"an image has dtype {image.dtype}; give uint8, or float in [0, 1].")
  return image.astype(dtype)


def to_uint8(image: object) -> np.ndarray:
  """uint8 [H, W, 3], or float in [0, 1], to uint8. Raises as `to_float` does."""
  image = np.asarray(image)
  if image.dtype == np.uint8 and image.ndim == 3:
    return image
  return np.rint(to_float(image, np.float32).clip(0, 1) * 255).astype(np.uint8)


def resize_shorter_side(image: np.ndarray, side: int) -> np.ndarray:
  """[H, W, 3] resized so that its shorter side is `side`; the longer one keeps the aspect, up to MAX_ASPECT * side."""
  scale = side / min(image.shape[:2])
  return resize(image, tuple(min(max(round(s * scale), side), MAX_ASPECT * side) for s in image.shape[:2]))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[H, W, ...] resized: area averaging where it shrinks, else bilinear; the same array if the size is unchanged."""
  if image.shape[:2] == size:
    return image
  shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
  return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def read_image(path: Path) -> np.ndarray:
  """Reads an image file of any mode as RGB, uint8 [H, W, 3], rotated as its EXIF orientation says.

  Raises:
    ValueError: it is not an image, is damaged, or has integers that do not fit in 16 bits.
  """
  with image_decoding.faults(path.name, remedy=""):
    raw = path.read_bytes()
  image_decoding.check_whole(raw, path.name)
  with image_decoding.faults(path.name, remedy=""), Image.open(io.BytesIO(raw)) as image:
    return _rgb(image, path.name)


def _rgb(image: Image.Image, name: str) -> np.ndarray:
  """uint8 [H, W, 3] of a PIL image of any mode, rotated as its EXIF orientation says; `name` is for messages."""
  image.load()  # a PNG may have EXIF data behind its pixels
  # Not ImageOps.exif_transpose, which also writes the EXIF data again, and fails at damaged ones.
  orientation = image_decoding.orientation_of(image)
  if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
    gray = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)  # float files may hold gaps
    if image.mode == "I" and not (gray.min() >= 0 and gray.max() <= 65535):
      raise UserError(
        f"{name} has integers of {gray.min():.0f} to {gray.max():.0f}; scale them to 0 to 65535, as in 16-bit images."
      )
    largest = 65535.0 if image.mode != "F" else max(gray.max(), 1e-12)
    image = Image.fromarray(np.clip(gray / largest * 255, 0, 255).astype(np.uint8))
  return image_decoding.oriented(np.asarray(image.convert("RGB")), orientation)


def is_image(path: Path) -> bool:
  """Whether a file is in one of FORMATS, by its suffix or else by its first bytes."""
  Image.init()
  file_format = Image.registered_extensions().get(path.suffix.lower())
  if file_format in FORMATS and (file_format in Image.OPEN or file_format == "MPO"):
    return True
  known = [name for name in FORMATS if name in Image.OPEN and name != "TGA"]  # which has no signature
  try:
    with image_decoding.faults(path), Image.open(path, formats=known):
      return True
  except ValueError:
    return False
