"""Decodes image files with OpenCV and Pillow; errors are one line that names the file."""

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
  """Decodes a complete image file with OpenCV; a truncated image is an error.

  Args:
    raw: the bytes of the file.
    path: for messages.
    mode: of cv2.imdecode.
    turned: whether to apply the EXIF orientation; False keeps the stored orientation for all formats.

  Raises:
    ValueError: for truncated or damaged images, too many pixels, or other files; names `path`.
  """
  check_whole(raw, path)
  mode = mode if mode == cv2.IMREAD_UNCHANGED else mode | cv2.IMREAD_IGNORE_ORIENTATION
  with faults(path):
    image = cv2.imdecode(np.frombuffer(_without_orientation(raw), np.uint8), mode)
  if image is None:
    raise UserError(f"{path} is not a picture that can be read, or damaged; {AGAIN}.")
  return oriented(image, orientation(io.BytesIO(raw))) if turned else image


def orientation(file: Path | io.BytesIO) -> int:
  """The EXIF orientation of an image, 1 to 8; 1 if it is missing or cannot be read."""
  try:
    with Image.open(file) as image:
      if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the pixels to look for EXIF data after them
      return orientation_of(image)
  except Exception:  # damaged images are reported when they are decoded
    return 1


_ORIENTATION = 0x0112  # tag of EXIF and TIFF


def orientation_of(image: Image.Image) -> int:
  """As `orientation`, of an image in Pillow."""
  try:
    value = image.getexif().get(_ORIENTATION, 1)
  except Exception:  # damaged EXIF data
    return 1
  return int(value) if value in range(2, 9) else 1


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
  """Applies an EXIF orientation to [H, W, ...]."""
  if orientation >= 5:
    image = image.swapaxes(0, 1)
  if orientation in (3, 4, 7, 8):
    image = image[::-1]
  if orientation in (2, 3, 6, 7):
    image = image[:, ::-1]
  return np.ascontiguousarray(image)


def _without_orientation(raw: bytes) -> bytes:
  """Resets the orientation of a TIFF, since OpenCV applies it in every mode; other files are returned unchanged.

  Source: TIFF 6.0, sections 2 and 8.
  """
  orders: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
  order = orders.get(raw[:4])
  if order is None:
    return raw
  number = lambda offset, size: int.from_bytes(raw[offset : offset + size], order)
  first = number(4, 4)
  for offset in range(first + 2, min(first + 2 + 12 * number(first, 2), len(raw) - 11), 12):
    if number(offset, 2) == _ORIENTATION:
      return raw[: offset + 8] + (1).to_bytes(2, order) + raw[offset + 10 :]
  return raw


@contextlib.contextmanager
def faults(path: str | Path, what: str = "a picture", remedy: str = AGAIN) -> Iterator[None]:
  """Turns any error of a decoder into a one-line ValueError that names `path`.

  On damaged files, decoders raise many types of errors (struct, zlib, index, overflow), so the block should contain
  only the decoder. MemoryError is not caused by the file and is re-raised, and so is a UserError.
  """
  try:
    yield
  except (MemoryError, KeyboardInterrupt, UserError):
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
  """Raises if a PNG or JPEG is truncated or lacks data, which decoders would silently fill with gray."""
  if not raw or (raw.startswith(_PNG) and not _ends(raw)):
    raise UserError(f"{path} is truncated ({len(raw)} bytes), or damaged; {AGAIN}.")
  if raw.startswith(_PNG) and _png_bytes(raw) > _DEFLATE * len(raw):
    raise UserError(f"{path} is damaged: its {len(raw)} bytes cannot fill the size that its header says; {AGAIN}.")
  if raw.startswith(b"\xff\xd8"):
    scans = jpeg_scans(raw)
    if scans is None:
      raise UserError(f"{path} is truncated ({len(raw)} bytes), or damaged; {AGAIN}.")
    if not all(_restarts_fit(raw, scan) for scan in scans) or (len(scans) == 1 and not _has_full_data(raw, scans[0])):
      raise UserError(f"{path} is damaged: its data do not fill the picture; {AGAIN}.")


_PNG = b"\x89PNG"
_DEFLATE = 1032  # maximum number of bytes that one byte of deflated data expands to


def _ends(raw: bytes) -> bool:
  """Whether the chunks of a PNG reach its end; OpenCV would allocate any claimed length. Source: PNG, 5.3."""
  offset = 8
  while offset + 8 <= len(raw):
    if raw[offset + 4 : offset + 8] == b"IEND":
      return True
    offset += 12 + int.from_bytes(raw[offset : offset + 4], "big")
  return False


def _png_bytes(raw: bytes) -> int:
  """Lower bound of a PNG's uncompressed size in bytes; 0 for an invalid header. Source: PNG, 11.2.1."""
  width, height = int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
  depth, color = raw[24:26].ljust(2, b"\0")
  channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 0)
  return height * (width * channels * depth // 8)


class Scan(NamedTuple):
  """A scan of a JPEG.

  Attributes:
    begin, end: byte range of the entropy-coded data.
    process: last digit of the frame's marker: 0 and 1 are sequential, 2 is progressive.
    blocks: (rows, columns) of minimum coded units if the scan has all components, else None.
    restart: units between two restart markers; 0 without markers.
  """

  begin: int
  end: int
  process: int
  blocks: tuple[int, int] | None
  restart: int


def jpeg_scans(raw: bytes) -> list[Scan] | None:
  """The scans of a JPEG up to its end-of-image marker, ignoring trailing data; None if there is no such marker.

  Segments are skipped by their lengths, because thumbnails and data appended by phones also contain markers.
  Source: ITU T.81, B.
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
      match = _MARKER.search(raw, at)
      if match is None or len(frame) < 6 or not segment:
        return None
      scans.append(Scan(at, match.start(), process, _blocks(frame, segment[0]), restart))
      at = match.start()
  return None


_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # ends the coded data, which includes FF 00 and restarts
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_SPARE = 64  # bytes that a decoder may read ahead, or that an encoder may leave at the end


def _blocks(frame: bytes, components: int) -> tuple[int, int] | None:
  """Scan.blocks, from a start-of-frame segment and the number of components in the scan."""
  height, width, count = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5]
  sampling = frame[7 : 6 + 3 * count : 3]
  if components != count or len(sampling) < count or not height:
    return None
  across, down = (max(s >> 4 for s in sampling), max(s & 15 for s in sampling)) if count > 1 else (1, 1)
  return -(-height // (8 * max(down, 1))), -(-width // (8 * max(across, 1)))


def _restarts_fit(raw: bytes, scan: Scan) -> bool:
  """Whether the restart markers of a scan cycle from 0 to 7 and are complete."""
  numbers = [ord(number) - 0xD0 for number in _RESTART.findall(raw, scan.begin, scan.end)]
  if not scan.restart:
    return not numbers
  needed = (scan.blocks[0] * scan.blocks[1] - 1) // scan.restart if scan.blocks and scan.process < 2 else 0
  return len(numbers) >= needed and all(number == index % 8 for index, number in enumerate(numbers))


def _has_full_data(raw: bytes, scan: Scan) -> bool:
  """Whether the data of a sequential JPEG without restarts match the image size.

  Pillow receives the data without the marker after them: it finishes only if they suffice, and reads the last bytes
  only if it needs them. It decodes an eighth of the size, which takes about half of the time of a full decode.
  """
  if scan.process > 1 or scan.blocks is None or scan.restart:
    return True
  last = len(raw[: scan.end].rstrip(b"\0"))  # some encoders pad with zeros
  data = _TrackedFile(raw[: scan.end] + bytes(_SPARE), max(scan.begin, last - _SPARE))
  try:
    image = JpegImageFile(data)
  except Exception:  # OpenCV may support it, or else reports the error
    return True
  image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
  try:
    image.load()
  except OSError:  # needs more data
    return False
  return data.exhausted


class _TrackedFile(io.BytesIO):
  """A file that records whether bytes from `last` on are read."""

  def __init__(self, raw: bytes, last: int):
    super().__init__(raw)
    self.last, self.exhausted = last, False

  def read(self, size: int | None = -1) -> bytes:
    left = self.last - self.tell()
    self.exhausted |= left <= 0
    return super().read(left if left > 0 and (size is None or size < 0 or size > left) else size)
