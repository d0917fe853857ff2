"""Bytes of picture files to arrays, by OpenCV and Pillow; whatever is wrong with a file is one line that names it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

AGAIN = "copy or download it again"


def decode(raw: bytes, path: str | Path, mode: int = cv2.IMREAD_COLOR) -> np.ndarray:
  """A whole picture file by OpenCV, as `mode` says; half a picture is an error.

  Raises:
    ValueError: the bytes are cut off, damaged, too many pixels, or not a picture; names `path`.
  """
  check_whole(raw, path)
  with faults(path):
    picture = cv2.imdecode(np.frombuffer(raw, np.uint8), mode)
  if picture is None:
    raise ValueError(f"{path} is not a picture that can be read, or damaged; {AGAIN}.")
  return picture


@contextlib.contextmanager
def faults(path: str | Path, what: str = "a picture", remedy: str = AGAIN) -> Iterator[None]:
  """Turns whatever a decoder raises inside into a ValueError of one line that names `path`.

  Decoders raise errors of their own and of anybody else's on damaged files (struct, zlib, index, overflow). What is
  inside should therefore be the decoder alone. That memory runs out is no fault of a file and stays what it is.
  """
  try:
    yield
  except (MemoryError, KeyboardInterrupt):
    raise
  except Exception as error:
    if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
      raise MemoryError(f"{path}: {' '.join(str(error.err).split())}") from None
    reason = " ".join(str(getattr(error, "err", None) or error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError) or "IMAGE_PIXELS" in reason:
      raise ValueError(f"{path} has more pixels than can be read ({reason}); make it smaller.") from None
    why = "unknown format" if isinstance(error, UnidentifiedImageError) else reason
    raise ValueError(f"{path} is not {what} that can be read, or damaged ({why}){remedy and '; '}{remedy}.") from None


def check_whole(raw: bytes, path: str | Path) -> None:
  """Raises where the end of a PNG or JPEG is missing, which decoders may fill with grey."""
  if _is_truncated(raw):
    raise ValueError(f"{path} is truncated ({len(raw)} bytes); {AGAIN}.")


def _is_truncated(raw: bytes) -> bool:
  if raw.startswith(b"\x89PNG"):
    return b"IEND" not in raw
  if raw.startswith(b"\xff\xd8"):
    return raw.rfind(b"\xff\xd9") < raw.rfind(b"\xff\xda")  # no end of image after the last start of scan
  return not raw
