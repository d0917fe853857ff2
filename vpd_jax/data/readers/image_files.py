"""List files and image files of users; errors name the file.

A record is the stored form of an Example: the unmodified bytes of its files, their names, and numbers. Folders and
prepared shards (data/shards/) yield the same records, which one function decodes to Examples.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from pathlib import Path

import cv2
import numpy as np

from vpd_jax.errors import UserError, first_items
from vpd_jax.files import image_decoding, reading
from vpd_jax.types import Example, Fields, Source

Record = Fields
# Whether to apply the EXIF orientation of images. Annotations (label maps, masks, depth, keypoints, outlines) are never
# rotated: they were made either on the stored image or on the rotated one. Published data sets are read as stored.
EXIF = ("stored", "turned")
# Features of an image and its depth map in a record, see shards/writer.py:FEATURES.
FRAME = {"image": "picture", "depth": "depth16", "image_path": "text", "depth_path": "text"}


def read_list(path: str | Path) -> list[tuple[str, str]]:
  """Reads a list file: one record per line, the image and its ground truth, separated by white space.

  The file may be gzip-compressed. A missing final newline, empty lines, other line endings, leading slashes and a third
  column (the focal length in BTS's lists) are accepted.

  Returns:
    pairs of relative paths, in the order of the file.

  Raises:
    ValueError: if the file cannot be read, is empty, or has lines with fewer than two columns (named).
  """
  text = reading.read_text(path, called=f"list file {path}")
  lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
  invalid = [number for number, columns in lines if len(columns) < 2]
  if invalid or not lines:
    what = f"lines {first_items(invalid)} do not hold" if invalid else "it is empty instead of holding"
    raise UserError(f"list file {path}: {what} the image and the ground truth, separated by a space.")
  return [(columns[0].lstrip("/"), columns[1].lstrip("/")) for _, columns in lines]


def find_list(root: Path, path: str | None, names: Iterable[str], source: str) -> Path:
  """Finds a list file: `path`, relative to `root` or as given, or else the first of `names` in `root` or its parent.

  Raises:
    ValueError: if there is none; states the candidates and `source`, where to obtain such a file.
  """
  if path is not None:
    candidates = [root / path, Path(path).expanduser()]
  else:
    candidates = [folder / (name + end) for folder in (root, root.parent) for name in names for end in ("", ".gz")]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  if path is not None:
    raise UserError(f"list file {path!r} is neither here nor in {root}; {source}")
  raise UserError(f"list file {' or '.join(names)} (plain or .gz) is neither in {root} nor in {root.parent}; {source}")


def require_folder(root: str, what: str) -> None:
  """Checks that `root` is a folder of files; `what` describes it, as in "that holds sync/ of NYU Depth v2".

  Raises:
    ValueError: if it is empty, does not exist, or contains prepared shards.
  """
  if not root:
    raise UserError(f"data.root is empty; set it to the folder {what}")
  folder = Path(root).expanduser()
  if not folder.is_dir():
    raise UserError(f"root={str(folder)!r} is not a folder; set data.root to the folder {what}")
  if (folder / "dataset_info.json").exists():
    raise UserError(f"root={str(folder)!r} holds prepared shards; set data.format='tfds', or data.root to the files.")


def require_files(folder: Path, names: Iterable[str], source: str) -> None:
  """Checks that all files exist below `folder`, reading each directory once.

  Raises:
    ValueError: for missing files; states their number, the first ten, and `source`, where to obtain them.
  """
  present: dict[str, set[str]] = {}
  missing = []
  for name in names:
    directory, file = os.path.split(name)
    if directory not in present:
      present[directory] = entries(folder / directory)
    if file not in present[directory]:
      missing.append(name)
  if missing:
    raise UserError(f"{len(missing)} files are missing in {folder}: {first_items(missing)}; {source}")


def read_bytes(path: str | Path) -> bytes:
  """Reads a file.

  Raises:
    ValueError: if it is missing or cannot be read; names it.
  """
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def read_image(path: str | Path, exif: str | None = None) -> np.ndarray:
  """Reads an image as uint8 [H, W, 3], RGB, regardless of its channels.

  Raises:
    ValueError: if the file is missing, truncated or not an image; names it.
  """
  return decode_image(read_bytes(path), path, exif)


def read_depth(path: str | Path, *, scale: float) -> np.ndarray:
  """Reads a 16-bit depth map, see decode_depth.

  Raises:
    ValueError: if the file is missing, or as for decode_depth.
  """
  return decode_depth(read_bytes(path), path, scale=scale)


def decode_image(raw: bytes, path: str | Path, exif: str | None = None) -> np.ndarray:
  """Decodes an image file as uint8 [H, W, 3], RGB; `path` is for the message of the ValueError, `exif` see EXIF."""
  return cv2.cvtColor(image_decoding.decode(raw, path, turned=exif == "turned"), cv2.COLOR_BGR2RGB)


def exif_notes(paths: Iterable[Path], exif: str) -> list[str]:
  """A warning, for the start of a run, about images with EXIF rotation; empty if there are none."""
  paths = list(dict.fromkeys(paths))
  with futures.ThreadPoolExecutor(8) as pool:
    count = sum(orientation > 1 for orientation in pool.map(image_decoding.orientation, paths))
  if not count:
    return []
  done, other = {"stored": ("are not rotated", "turned"), "turned": ("are rotated", "stored")}[exif]
  return [
    f"WARNING: {count} of {len(paths)} images have an EXIF orientation. They {done} (data.exif={exif!r}); masks, "
    f"labels, depth maps, and annotations never are. If they do not line up, set data.exif={other!r}."
  ]


def exif_hint(image: np.ndarray, other: np.ndarray, exif: str | None) -> str:
  """A hint for an image whose annotation has transposed height and width; else empty."""
  if image.shape[:2] != other.shape[1::-1]:
    return ""
  remedy = "" if exif is None else f": try data.exif={'stored' if exif == 'turned' else 'turned'!r}"
  return f"; EXIF data may turn the image{remedy}"


def check_same_size(image: np.ndarray, other: np.ndarray, path: str | Path, what: str, exif: str | None = None) -> None:
  """Raises ValueError if an image, read from `path`, and its annotation differ in size; `what` names the annotation."""
  if image.shape[:2] != other.shape[:2]:
    sizes = ["{}x{}".format(*array.shape[:2]) for array in (other, image)]
    raise UserError(
      f"{what} is {sizes[0]}, but its image {path} is {sizes[1]}; bring both to one size"
      f"{exif_hint(image, other, exif)}."
    )


def decode_depth(raw: bytes, path: str | Path, *, scale: float) -> np.ndarray:
  """Decodes a 16-bit depth map as float32 [H, W], meters; 0 is missing.

  Args:
    raw: PNG with one channel.
    path: for messages.
    scale: file units per meter, 1000 for millimeters.

  Raises:
    ValueError: if the file is truncated, not an image, or not of one channel and 16 bits; names it.
  """
  values = image_decoding.decode(raw, path, cv2.IMREAD_UNCHANGED)
  if values.dtype != np.uint16 or values.ndim != 2:
    channels = 1 if values.ndim == 2 else values.shape[2]
    raise UserError(
      f"depth file {path} has {channels} channel(s) of {values.dtype.itemsize * 8} bits; "
      f"one of 16 bits is needed, {scale:g} per meter."
    )
  return values.astype(np.float32) / np.float32(scale)


class Frames(Source):
  """Random access to images with 16-bit depth maps; files are read by `[]`."""

  def __init__(
    self,
    folder: Path,
    pairs: list[tuple[str, str]],
    decode: Callable[[Record, Path], Example],
    class_ids: Sequence[int] | None = None,
  ):
    """
    Args:
      folder: that the names are relative to.
      pairs: (image, depth) files.
      decode: makes an Example of a record; the folder is for messages. Must be picklable.
      class_ids: of the frames; None: records without "class_id".
    """
    self.folder, self.pairs, self.decode, self.class_ids = folder, pairs, decode, class_ids

  def __len__(self) -> int:
    return len(self.pairs)

  def picture(self, index: int) -> str:
    """See Source."""
    return self.pairs[index][0]

  def record(self, index: int) -> Record:
    """The record of a frame: FRAME with the unmodified files, "index" and maybe "class_id"."""
    image, depth = self.pairs[index]
    files = {"image": read_bytes(self.folder / image), "depth": read_bytes(self.folder / depth)}
    numbers = {} if self.class_ids is None else {"class_id": np.int32(self.class_ids[index])}
    return {**files, "image_path": image, "depth_path": depth, **numbers, "index": np.int32(index)}

  def __getitem__(self, index: int) -> Example:
    return self.decode(self.record(index), self.folder)


def decode_frame(record: Record, folder: Path | None = None, *, scale: float) -> dict[str, np.ndarray]:
  """ "image" uint8 [H, W, 3] RGB and "depth" float32 [H, W] meters of a record with FRAME.

  Args:
    record: with the files of FRAME.
    folder: of the files, for messages.
    scale: units of the depth file per meter.

  Raises:
    ValueError: as for the two files, or if their sizes differ; names them.
  """
  paths = [name if folder is None else folder / name for name in (record["image_path"], record["depth_path"])]
  image, depth = decode_image(record["image"], paths[0]), decode_depth(record["depth"], paths[1], scale=scale)
  check_same_size(image, depth, paths[0], f"depth file {paths[1]}")
  return {"image": image, "depth": depth}


def entries(folder: Path) -> set[str]:
  """Names in a directory; empty if it does not exist."""
  try:
    return set(os.listdir(folder))
  except OSError:
    return set()
