"""Files as users have them: list files, and pictures whose faults are reported by name."""

import gzip
import os
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

SHOWN = 10  # names per error message


def read_list(path: str | Path) -> list[tuple[str, str]]:
  """Reads a list file: one record per line, the image and its ground truth, separated by white space.

  Plain or gzip-compressed text; a missing last newline, empty lines, other line ends, leading slashes and a third
  column (the focal length in BTS's lists) do not matter.

  Returns:
    pairs of relative paths, in the order of the file.

  Raises:
    ValueError: the file cannot be read, is empty, or has lines of fewer than two columns (named).
  """
  try:
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw).decode("utf-8-sig")
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise ValueError(f"list file {path} cannot be read ({error}).") from None
  lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
  wrong = [number for number, columns in lines if len(columns) < 2]
  if wrong or not lines:
    what = f"lines {_first(wrong)} do not hold" if wrong else "it is empty instead of holding"
    raise ValueError(f"list file {path}: {what} the image and the ground truth, separated by a space.")
  return [(columns[0].lstrip("/"), columns[1].lstrip("/")) for _, columns in lines]


def find_list(root: Path, given: str | None, names: Iterable[str], source: str) -> Path:
  """Finds a list file: `given`, from here or below `root`, else the first of `names` in `root` or beside it.

  Raises:
    ValueError: nothing there, with what was looked for and `source`, where such a file is obtained.
  """
  if given is not None:
    places = [Path(given).expanduser(), root / given]
  else:
    places = [folder / (name + end) for folder in (root, root.parent) for name in names for end in ("", ".gz")]
  for place in places:
    if place.is_file():
      return place
  wanted = f"list file {given!r}" if given is not None else f"list file {' or '.join(names)} (plain or .gz)"
  raise ValueError(f"{wanted} is neither in {root} nor in {root.parent}; {source}")


def require_files(folder: Path, names: Iterable[str], source: str) -> None:
  """Checks that all files exist below `folder`, reading each directory once.

  Raises:
    ValueError: with the number of missing files, the first ten, and `source`, where they are obtained.
  """
  present: dict[str, set[str]] = {}
  missing = []
  for name in names:
    directory, file = os.path.split(name)
    if directory not in present:
      present[directory] = _entries(folder / directory)
    if file not in present[directory]:
      missing.append(name)
  if missing:
    raise ValueError(f"{len(missing)} files are missing in {folder}: {_first(missing)}; {source}")


def read_image(path: str | Path) -> np.ndarray:
  """Reads a picture as uint8 [H, W, 3], RGB, whatever its own channels.

  Raises:
    ValueError: the file is missing, truncated or not a picture; the message names it.
  """
  return cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_depth(path: str | Path, *, scale: float) -> np.ndarray:
  """Reads a 16-bit depth map as float32 [H, W], metres; 0 where nothing was measured.

  Args:
    path: PNG with one channel.
    scale: file units per metre, 1000 for millimetres.

  Raises:
    ValueError: the file is missing, truncated, not a picture, or not of one channel and 16 bits; the message names it.
  """
  values = _decode(path, cv2.IMREAD_UNCHANGED)
  if values.dtype != np.uint16 or values.ndim != 2:
    channels = 1 if values.ndim == 2 else values.shape[2]
    raise ValueError(
      f"depth file {path} has {channels} channel(s) of {values.dtype.itemsize * 8} bits; "
      f"one of 16 bits is needed, {scale:g} per metre."
    )
  return values.astype(np.float32) / np.float32(scale)


def _decode(path: str | Path, mode: int) -> np.ndarray:
  """Decodes a whole file; half a picture is an error."""
  try:
    raw = Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
  if _is_truncated(raw):
    raise ValueError(f"{path} is truncated ({len(raw)} bytes); copy or download it again.")
  picture = cv2.imdecode(np.frombuffer(raw, np.uint8), mode)
  if picture is None:
    raise ValueError(f"{path} is not a picture that can be read, or damaged; copy or download it again.")
  return picture


def _is_truncated(raw: bytes) -> bool:
  """Whether the end of a PNG or JPEG is missing, which some versions of OpenCV fill with grey."""
  if raw.startswith(b"\x89PNG"):
    return b"IEND" not in raw
  if raw.startswith(b"\xff\xd8"):
    return raw.rfind(b"\xff\xd9") < raw.rfind(b"\xff\xda")  # no end of image after the last start of scan
  return not raw


def _entries(folder: Path) -> set[str]:
  """Names in a directory; none where it does not exist."""
  try:
    return set(os.listdir(folder))
  except OSError:
    return set()


def _first(items: list) -> str:
  """The first ten, comma-separated."""
  return ", ".join(str(item) for item in items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")
