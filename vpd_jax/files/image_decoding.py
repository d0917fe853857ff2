"""Bytes of picture files to arrays, by OpenCV and Pillow; whatever is wrong with a file is one line that names it."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from vpd_jax.errors import UserError

AGAIN = "copy or download it again"


def decode(raw: bytes, path: str | Path, mode: int = cv2.IMREAD_COLOR, *, turned: bool = False) -> np.ndarray:
  """A whole picture file by OpenCV; half a picture is an error.

  Args:
    raw: the file.
    path: for messages.
    mode: of cv2.imdecode.
    turned: whether the picture is turned as its EXIF data say; False: as it is stored, whatever its kind.

  Raises:
    ValueError: the bytes are cut off, damaged, too many pixels, or not a picture; names `path`.
  """
  check_whole(raw, path)
  mode = mode if mode == cv2.IMREAD_UNCHANGED else mode | cv2.IMREAD_IGNORE_ORIENTATION
  with faults(path):
    picture = cv2.imdecode(np.frombuffer(_without_orientation(raw), np.uint8), mode)
  if picture is None:
    raise UserError(f"{path} is not a picture that can be read, or damaged; {AGAIN}.")
  return _turned(picture, orientation(io.BytesIO(raw))) if turned else picture


def orientation(file: Path | io.BytesIO) -> int:
  """How a picture is to be turned, 1 to 8 as in EXIF; 1, as it is, where it does not say or cannot be read."""
  try:
    with Image.open(file) as picture:
      if picture.format == "PNG" and "exif" not in picture.info:
        return 1  # Pillow would decode all of it to look behind the pixels
      found = picture.getexif().get(_ORIENTATION, 1)
  except Exception:  # a damaged picture is told when it is decoded
    return 1
  return int(found) if found in range(2, 9) else 1


_ORIENTATION = 0x0112  # of EXIF and TIFF


def _turned(picture: np.ndarray, orientation: int) -> np.ndarray:
  """[H, W, ...] turned and mirrored as an orientation of EXIF says."""
  if orientation >= 5:
    picture = picture.swapaxes(0, 1)
  if orientation in (3, 4, 7, 8):
    picture = picture[::-1]
  if orientation in (2, 3, 6, 7):
    picture = picture[:, ::-1]
  return np.ascontiguousarray(picture)


def _without_orientation(raw: bytes) -> bytes:
  """A TIFF that says it is not turned, since OpenCV turns it in every mode; any other file as it is.

  Source: TIFF 6.0, sections 2 and 8.
  """
  orders: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
  order = orders.get(raw[:4])
  if order is None:
    return raw
  number = lambda at, size: int.from_bytes(raw[at : at + size], order)
  first = number(4, 4)
  for at in range(first + 2, min(first + 2 + 12 * number(first, 2), len(raw) - 11), 12):
    if number(at, 2) == _ORIENTATION:
      return raw[: at + 8] + (1).to_bytes(2, order) + raw[at + 10 :]
  return raw


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
      raise UserError(f"{path} has more pixels than can be read ({reason}); make it smaller.") from None
    why = "unknown format" if isinstance(error, UnidentifiedImageError) else reason
    raise UserError(f"{path} is not {what} that can be read, or damaged ({why}){remedy and '; '}{remedy}.") from None


def check_whole(raw: bytes, path: str | Path) -> None:
  """Raises where a PNG or JPEG is cut off, or its data cannot fill it, which decoders fill with gray and go on."""
  if not raw or (raw.startswith(_PNG) and not _ends(raw)):
    raise UserError(f"{path} is truncated ({len(raw)} bytes), or damaged; {AGAIN}.")
  if raw.startswith(_PNG) and _png_bytes(raw) > _DEFLATE * len(raw):
    raise UserError(f"{path} is damaged: its {len(raw)} bytes cannot fill the size that its header says; {AGAIN}.")
  if raw.startswith(b"\xff\xd8"):
    scans = jpeg_scans(raw)
    if scans is None:
      raise UserError(f"{path} is truncated ({len(raw)} bytes), or damaged; {AGAIN}.")
    if not all(_restarts_fit(raw, scan) for scan in scans) or (len(scans) == 1 and not _fits(raw, scans[0])):
      raise UserError(f"{path} is damaged: its data do not fill the picture; {AGAIN}.")


_PNG = b"\x89PNG"
_DEFLATE = 1032  # bytes that one byte of deflated data can stand for, at most


def _ends(raw: bytes) -> bool:
  """Whether the chunks of a PNG lead to its end; OpenCV makes room for whatever length one claims. Source: PNG, 5.3."""
  at = 8
  while at + 8 <= len(raw):
    if raw[at + 4 : at + 8] == b"IEND":
      return True
    at += 12 + int.from_bytes(raw[at : at + 4], "big")
  return False


def _png_bytes(raw: bytes) -> int:
  """Bytes of a PNG's pixels before they are deflated, at least; 0 where its header is none. Source: PNG, 11.2.1."""
  width, height = int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
  depth, color = raw[24:26].ljust(2, b"\0")
  channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 0)
  return height * (width * channels * depth // 8)


class Scan(NamedTuple):
  """Coded data of a JPEG.

  Attributes:
    begin, end: of the data.
    process: last digit of the frame's marker: 0 and 1 are sequential, 2 is progressive.
    blocks: (rows, columns) of minimum coded units, where all components are in this scan, else None.
    restart: units between two restart markers, 0: there are none.
  """

  begin: int
  end: int
  process: int
  blocks: tuple[int, int] | None
  restart: int


def jpeg_scans(raw: bytes) -> list[Scan] | None:
  """The scans of a JPEG up to its end-of-image marker, whatever follows it; None where there is no such end.

  Segments are walked by their lengths, for thumbnails and what phones append hold markers too. Source: ITU T.81, B.
  """
  at, scans, restart, frame = 2, [], 0, b""
  process = 0
  while (at := raw.find(b"\xff", at)) >= 0:
    marker = raw[at + 1 : at + 2]
    if marker in (b"", b"\xff"):
      at += 1
      continue
    code, at = marker[0], at + 2
    if code == 0xD9:
      return scans
    if code <= 1 or 0xD0 <= code <= 0xD8:
      continue
    length = int.from_bytes(raw[at : at + 2], "big")
    if length < 2 or at + length > len(raw):
      return None
    segment, at = raw[at + 2 : at + length], at + length
    if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
      frame, process = segment, code & 15
    elif code == 0xDD:
      restart = int.from_bytes(segment[:2], "big")
    elif code == 0xDA:
      found = _MARKER.search(raw, at)
      if found is None or len(frame) < 6 or not segment:
        return None
      scans.append(Scan(at, found.start(), process, _blocks(frame, segment[0]), restart))
      at = found.start()
  return None


_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # what ends coded data; FF 00 and restarts belong to it
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_SPARE = 64  # bytes that a decoder may look ahead, or that an encoder may leave behind


def _blocks(frame: bytes, components: int) -> tuple[int, int] | None:
  """See Scan; of a start-of-frame segment and the number of components in a scan."""
  height, width, count = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5]
  sampling = frame[7 : 6 + 3 * count : 3]
  if components != count or len(sampling) < count or not height:
    return None
  across, down = (max(s >> 4 for s in sampling), max(s & 15 for s in sampling)) if count > 1 else (1, 1)
  return -(-height // (8 * max(down, 1))), -(-width // (8 * max(across, 1)))


def _restarts_fit(raw: bytes, scan: Scan) -> bool:
  """Whether the restart markers of a scan count from 0 to 7 and again, and are as many as there must be."""
  found = [ord(number) - 0xD0 for number in _RESTART.findall(raw, scan.begin, scan.end)]
  if not scan.restart:
    return not found
  needed = (scan.blocks[0] * scan.blocks[1] - 1) // scan.restart if scan.blocks and scan.process < 2 else 0
  return len(found) >= needed and all(number == place % 8 for place, number in enumerate(found))


def _fits(raw: bytes, scan: Scan) -> bool:
  """Whether the data of a sequential JPEG without restarts end with the picture, neither before nor long after.

  Pillow is given the data without the marker behind them: it finishes only if they suffice, and asks for the last of
  them only if it needs them. It is asked for an eighth of the size, which costs about half of a decoder's time.
  """
  if scan.process > 1 or scan.blocks is None or scan.restart:
    return True
  last = len(raw[: scan.end].rstrip(b"\0"))  # some encoders fill up
  data = _Counted(raw[: scan.end] + bytes(_SPARE), max(scan.begin, last - _SPARE))
  try:
    picture = JpegImageFile(data)
  except Exception:  # OpenCV may know more; else it says what is wrong
    return True
  picture.draft(None, (max(picture.width // 8, 1), max(picture.height // 8, 1)))
  try:
    picture.load()
  except OSError:  # asks for more
    return False
  return data.exhausted


class _Counted(io.BytesIO):
  """A file that notes whether anything from `last` on is asked for."""

  def __init__(self, raw: bytes, last: int):
    super().__init__(raw)
    self.last, self.exhausted = last, False

  def read(self, size: int | None = -1) -> bytes:
    left = self.last - self.tell()
    self.exhausted |= left <= 0
    return super().read(left if left > 0 and (size is None or size < 0 or size > left) else size)
