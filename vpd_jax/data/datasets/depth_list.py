"""Custom depth data: list files, the units of the depth files, and a maximum depth.

Files, below `root`:
  train_list.txt   one image per line: the image and its depth, relative to `root`, separated by a tab or by spaces
  eval_list.txt    the same for evaluation, if `eval_list` names it; else the last training lines are held out
Images have any format that OpenCV reads and any size; a depth file has the size of its image and one channel:
  .png             16 bits
  .tif, .tiff      16 bits, or 32-bit floats
  .pfm             floats as stored; only the sign of the scale in the header is used, for the byte order
  .npy             floats or integers
Depth in meters is the file's value / `factor`. Values that are not finite or not in (0, `max_depth`] are missing.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from vpd_jax.data import validation
from vpd_jax.data.datasets.depth import DepthDataset
from vpd_jax.data.readers import image_files
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.errors import UserError, check_choice, first_items
from vpd_jax.files import image_decoding, reading
from vpd_jax.types import DatasetInfo, Example, Options, Source

SUFFIXES = (".png", ".tif", ".tiff", ".pfm", ".npy")
_SPACE = rb"(?:\s|#[^\n]*\n)+"  # separator in a header, including comments
_PFM = re.compile(
  rb"(?P<kind>P[Ff])%b(?P<width>[1-9]\d{0,8})%b(?P<height>[1-9]\d{0,8})%b"
  rb"(?P<scale>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?=\s)(?P<line>[^\S\n]*(?:#[^\n]*)?\n)?" % ((_SPACE,) * 3)
)


@dataclasses.dataclass(eq=False, kw_only=True)
class DepthList(DepthDataset):
  """Images with depth from list files.

  Args:
    root: folder that the names in the lists are relative to.
    factor: units of the depth files per meter: 1000 for millimeters, 256 for KITTI's, 1 for meters.
    max_depth: in meters; larger values are missing, because the head cannot predict them.
    train_list: list of the training images, relative to `root` or an existing path.
    eval_list: the same for evaluation. Empty holds out the last `holdout` of the training list; the last ones, because
      neighbors are often frames of one video.
    holdout: fraction of the training list, rounded, at least one line.
    scene: the class of all images, for methods that use a class: lower-case words joined by '_'. Empty: no class.
    resize: (height, width) of all images, by scaling with fixed aspect ratio and a center crop; scores are computed at
      this size, because all images of a batch have one size. () keeps the files' sizes, which must then be equal.
    exif: "stored" or "turned", see image_files.EXIF.

  Attributes:
    classes: the scene, or empty.
  """

  root: str
  factor: float
  max_depth: float = dataclasses.field()
  train_list: str = "train_list.txt"
  eval_list: str = ""
  holdout: float = 0.1
  scene: str = "scene"
  cut_depth: str = "scaled"
  exif: str = "stored"

  classes = ("scene",)

  def __post_init__(self):
    """Checks the options; `source` checks the files.

    Raises:
      ValueError: one line that lists all problems.
    """
    super().__post_init__()
    self.depth_scale, self._root = self.factor, Path(self.root).expanduser()
    positive = {"factor": self.factor, "max_depth": self.max_depth}
    problems = [f"{name}={value} must be above 0" for name, value in positive.items() if value <= 0]
    if not self.root or not self._root.is_dir():
      problems.append(f"root={self.root!r} is not a folder, set data.root to the one the names in the lists start from")
    if not 0 < self.holdout < 1:
      problems.append(f"holdout={self.holdout} must lie between 0 and 1, both excluded")
    if self.resize and (self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]):
      problems.append(f"crop={self.crop} does not fit into resize={self.resize}, make data.crop smaller")
    if problems:
      raise UserError(f"data: {'; '.join(problems)}.")
    check_choice("data.exif", self.exif, image_files.EXIF)
    self.classes, self.provides = one_scene(self.scene, DepthList.provides)

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset; raises as `one_scene`."""
    return DatasetInfo(classes=one_scene(options.get("scene", cls.scene), frozenset())[0])

  @reader.read_once
  def source(self, split: str) -> "Frames":
    """The images of "train" or "eval", in the order of their list.

    Raises:
      ValueError: if the list or listed files are missing (all are counted), or for lines with another number of
        columns, depth files of an unknown format, or an empty split.
    """
    check_choice("split", split, ["eval", "train"])
    if split == "eval" and self.eval_list:
      path = image_files.find_list(self._root, self.eval_list, (), "name it in data.eval_list.")
    else:
      path = image_files.find_list(self._root, self.train_list, (), "name it in data.train_list.")
    records = [(image, depth) for image, depth in read_columns(path, columns=(2,))]
    if not self.eval_list:
      num_train = validation.train_count(len(records), self.holdout)
      if num_train < 1:
        raise UserError(f"list file {path} has {len(records)} picture and one is held out; add more, or an eval_list.")
      records = records[:num_train] if split == "train" else records[num_train:]
    image_files.require_files(self._root, (name for pair in records for name in pair), f"they are named in {path}.")
    unknown = sorted({suffix for _, depth in records if (suffix := Path(depth).suffix).lower() not in SUFFIXES})
    if unknown:
      raise UserError(f"list file {path} names depth files ending in {', '.join(unknown)}; known are {SUFFIXES}.")
    read = functools.partial(read_depth, factor=self.factor, max_depth=self.max_depth)
    pairs = [(self._root / image, self._root / depth) for image, depth in records]
    return Frames(pairs, read, self.provides, self.exif)

  def eval_transform(self, example: Example) -> Example:
    """The image, resized if `resize` is set."""
    return depth_transforms.resize_to_cover(example, size=self.resize) if self.resize else example


class Frames(Source):
  """Random access to images with depth files; files are read by `[]`."""

  def __init__(
    self, records: Sequence[tuple[Path, Path]], read: Callable[[Path], np.ndarray], provides: frozenset[str], exif: str
  ):
    """
    Args:
      records: (image, depth) files.
      read: reads a depth file as float32 [H, W] meters; must be picklable.
      provides: keys of an Example, among "image", "depth", "class_id" and "index".
      exif: see image_files.EXIF.
    """
    self.records, self.read, self.provides, self.exif = records, read, provides, exif
    self.notes = image_files.exif_notes((image for image, _ in records), exif)

  def __len__(self) -> int:
    return len(self.records)

  def picture(self, index: int) -> str:
    """See Source."""
    return self.records[index][0].as_posix()

  def __getitem__(self, index: int) -> Example:
    """The full image and its depth.

    Raises:
      ValueError: for a file that is missing, damaged, in the wrong format, without valid depth, or not of the image's
        size; names it.
    """
    image_path, depth_path = self.records[index]
    image, depth = image_files.read_image(image_path, self.exif), self.read(depth_path)
    image_files.check_same_size(image, depth, image_path, f"depth file {depth_path}", self.exif)
    example = {"image": image, "depth": depth, "class_id": np.zeros((), np.int32), "index": np.asarray(index, np.int32)}
    return {name: value for name, value in example.items() if name in self.provides}


def one_scene(scene: str, provides: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
  """(classes, provides) of a data set with a single scene class; no class if `scene` is empty.

  Raises:
    ValueError: if `scene` is not lower-case words joined by '_'.
  """
  if not scene:
    return (), provides - {"class_id"}
  if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", scene):
    raise UserError(f"data.scene={scene!r} must be lower-case words joined by '_', like 'city_street'; or empty.")
  return (scene,), provides


def read_columns(path: str | Path, *, columns: tuple[int, ...]) -> list[list[str]]:
  """The columns of every line of a list file, separated by tabs if the line has one, or else by white space.

  The file may be gzip-compressed. A missing final newline, empty lines, other line endings and leading slashes of names
  are accepted.

  Args:
    path: of the file.
    columns: valid numbers of columns.

  Raises:
    ValueError: if the file cannot be read, is empty, or has lines with another number of columns (named).
  """
  text = reading.read_text(path, called=f"list file {path}")
  lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
  table = [
    (number, [name.strip() for name in (line.split("\t") if "\t" in line else line.split())]) for number, line in lines
  ]
  expected = " or ".join(map(str, columns))
  wrong = [f"{number} ({len(names)})" for number, names in table if len(names) not in columns or not all(names)]
  if wrong:
    raise UserError(
      f"list file {path}: {len(wrong)} lines do not have {expected} columns: "
      f"{first_items(wrong)}; put the image and its depth in a line, with a tab between where names hold "
      "spaces."
    )
  if not table:
    raise UserError(f"list file {path} is empty; put the image and its depth in a line.")
  return [[name.lstrip("/") for name in names] for _, names in table]


def read_depth(path: Path, *, factor: float, max_depth: float) -> np.ndarray:
  """Reads a depth file of any of SUFFIXES as float32 [H, W] meters; 0 is missing.

  Raises:
    ValueError: for a file that is missing, damaged, has 8 bits or more than one channel, or has no value in
      (0, max_depth] meters; names the file.
  """
  suffix = path.suffix.lower()
  if suffix == ".png":
    meters = image_files.read_depth(path, scale=factor)
  else:
    values = {".npy": _read_npy, ".pfm": _read_pfm}.get(suffix, _read_tiff)(path)
    if values.ndim != 2 or values.dtype.kind not in "uif" or values.dtype.itemsize < 2:
      raise UserError(
        f"depth file {path} holds {values.dtype} {list(values.shape)}; [height, width] of at least 16 bits is needed."
      )
    meters = values.astype(np.float32) / np.float32(factor)
  depth = np.where(np.isfinite(meters) & (meters > 0) & (meters <= max_depth), meters, np.float32(0))
  if not depth.any():
    finite = meters[np.isfinite(meters)]
    value_range = f"from {finite.min():g} to {finite.max():g} m" if finite.size else "not finite"
    raise UserError(
      f"depth file {path} has no value in (0, {max_depth:g}] meters: at {factor:g} units per meter its values are "
      f"{value_range}; check data.factor and data.max_depth, or leave the picture out."
    )
  return depth


def _read_npy(path: Path) -> np.ndarray:
  if not path.is_file():
    raise UserError(f"depth file {path} cannot be read: it is not a file.")
  with image_decoding.faults(f"depth file {path}", "an array", "write it with numpy.save"):
    return np.array(np.lib.format.open_memmap(path, mode="r"))  # checks the size in the header against that of the file


def _read_pfm(path: Path) -> np.ndarray:
  """A portable float map, float32 [H, W] as stored, or [H, W, 3].

  OpenCV is not used, because it divides by the scale in the header and does not support comments.

  Source: Debevec's HDRShop, Netpbm's pfm(5).
  """
  raw = image_files.read_bytes(path)
  header = _PFM.match(raw)
  if header is None or not float(header["scale"]):
    raise UserError(f"depth file {path} does not begin as a PFM: Pf, width and height, a number not 0; write it again.")
  width, height, channels = int(header["width"]), int(header["height"]), 3 if header["kind"] == b"PF" else 1
  size, begin = 4 * width * height * channels, header.end("scale") + 1
  if len(raw) - begin != size and header["line"]:  # the header ends with more than one byte
    begin = header.end("line")
  content = raw[begin:]
  if len(content) < size or content[size:].strip():
    raise UserError(
      f"depth file {path} has {len(content)} bytes behind its header, {width} x {height} pixels need {size}; copy or "
      "write it again."
    )
  order = "<" if float(header["scale"]) < 0 else ">"
  values = np.frombuffer(content, f"{order}f4", size // 4).reshape(height, width, *(3,) * (channels == 3))
  return values[::-1].astype(np.float32)  # rows are stored from bottom to top


def _read_tiff(path: Path) -> np.ndarray:
  """A TIFF as stored."""
  return image_decoding.decode(image_files.read_bytes(path), path, cv2.IMREAD_UNCHANGED)
