"""The focal length of the camera that took a photo, in pixels of the photo."""

import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image

FILM_DIAGONAL = math.hypot(36.0, 24.0)  # mm, of a frame of 35 mm film
FIELD_OF_VIEW = 60.0  # degrees across the longer side, assumed without EXIF data
MILLIMETERS = {2: 25.4, 3: 10.0}  # of FocalPlaneResolutionUnit: inches, centimeters
EXIF = 0x8769  # the EXIF directory about the camera
FOCAL_LENGTH, IN_35MM = 0x920A, 0xA405
PLANE_X_RESOLUTION, PLANE_UNIT = 0xA20E, 0xA210
ORIGINAL_SIZE = (0xA002, 0xA003)  # PixelXDimension, PixelYDimension


class Focal(NamedTuple):
  """A focal length.

  Attributes:
    pixels: of the photo; the same for both axes.
    source: of the value: "--focal", names of EXIF tags, or ASSUMED.
  """

  pixels: float
  source: str


ASSUMED = f"assumed: {FIELD_OF_VIEW:g} degrees across the longer side"


def of_photo(path: Path, size: tuple[int, int]) -> Focal:
  """The focal length in a photo's EXIF data, or else an assumed one.

  The first that applies:

  1. FocalLengthIn35mmFilm, in mm, times the photo's diagonal over the 43.27 mm of a frame of 35 mm film;
  2. FocalLength, in mm, times FocalPlaneXResolution in pixels per mm, and, if the photo was resized later, its
     longer side over that of PixelXDimension and PixelYDimension;
  3. 60 degrees across the longer side.

  EXIF data of a cropped photo still describe the original photo.

  Args:
    path: of the photo.
    size: its (height, width).

  Source: Exif 2.32, 4.6.5; CIPA DCG-001 (the diagonal).
  """
  tags = _tags(path)
  in_35mm, length = _number(tags, IN_35MM), _number(tags, FOCAL_LENGTH)
  if in_35mm:
    return Focal(in_35mm * math.hypot(*size) / FILM_DIAGONAL, "EXIF FocalLengthIn35mmFilm")
  resolution = _number(tags, PLANE_X_RESOLUTION)
  unit = MILLIMETERS.get(int(_number(tags, PLANE_UNIT) or 2))
  if length and resolution and unit:
    original = max(_number(tags, tag) for tag in ORIGINAL_SIZE)  # the longer side, independent of the rotation
    scale = max(size) / original if original else 1.0
    return Focal(length * resolution / unit * scale, "EXIF FocalLength and FocalPlaneXResolution")
  return Focal(max(size) / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2)), ASSUMED)


def _tags(path: Path) -> dict[int, object]:
  """The tags about the camera; empty if there are none or they cannot be read."""
  try:
    with Image.open(path) as photo:
      if photo.format == "PNG" and "exif" not in photo.info:
        return {}  # Pillow would decode the whole image to search behind the pixels
      return dict(photo.getexif().get_ifd(EXIF))
  except Exception:  # damaged images are reported when they are decoded
    return {}


def _number(tags: dict[int, object], tag: int) -> float:
  """A tag as a positive number; 0 if it is missing, unknown or not a number."""
  try:
    value = float(str(tags.get(tag, 0)))
  except ValueError:
    return 0.0
  return value if math.isfinite(value) and value > 0 else 0.0
