"""Depth data of the user's own: a list file, the units of the depth files, a largest depth.

Files, below `root`:
  train_list.txt   one picture a line: the image and its depth, relative to `root`, separated by a tab or by spaces
  eval_list.txt    the same for evaluation; without it the last lines of the training list are held out
Images are of any kind OpenCV reads and of any size; a depth file has the size of its image and one channel:
  .png             16 bits
  .tif, .tiff      16 bits, or 32-bit floats
  .pfm             floats as stored: of the number in the header only the sign counts, which is the byte order
  .npy             floats, or whole numbers
Depth in meters is the file's value / `factor`. What is not finite, not above 0 or beyond `max_depth` is no measurement.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from vpd_jax.data.datasets.depth import DepthDataset
from vpd_jax.data.readers import image_files
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.errors import UserError
from vpd_jax.files import image_decoding, reading
from vpd_jax.types import DatasetInfo, Example, Options, Source

SUFFIXES = (".png", ".tif", ".tiff", ".pfm", ".npy")
_SPACE = rb"(?:\s|#[^\n]*\n)+"  # between the words of a header, comments too
_PFM = re.compile(
  rb"(?P<kind>P[Ff])%b(?P<width>[1-9]\d{0,8})%b(?P<height>[1-9]\d{0,8})%b"
  rb"(?P<scale>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?=\s)(?P<line>[^\S\n]*(?:#[^\n]*)?\n)?" % ((_SPACE,) * 3)
)


@dataclasses.dataclass(eq=False, kw_only=True)
class DepthList(DepthDataset):
  """Pictures with depth, named by list files.

  Args:
    root: folder the lists' names start from.
    factor: units of the depth files per meter: 1000 for millimeters, 256 for KITTI's, 1 for meters.
    max_depth: meters; a larger value counts as no measurement, for the head cannot reach it.
    train_list: list of the training pictures, from here or below `root`.
    eval_list: the same for evaluation; empty holds out the last `holdout` of the training list, which are then not
      trained on. They are the last ones, and not every tenth, because neighbors in a list are often frames of one
      video.
    holdout: share of the training list, rounded, at least one line.
    scene: the one class of all pictures, for methods that are told a class: lower-case words joined by '_'. Empty: no
      class is provided.
    resize: (height, width) to which all pictures are brought, aspect kept and what is over cut off evenly at both
      sides; scores are those at this size, for a batch has one size. () keeps the files' sizes: all must be the same.
    exif: "stored" or "turned", see image_files.EXIF.

  Attributes:
    classes: the scene, or nothing.
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
    """Checks the options; files are looked for by `source`.

    Raises:
      ValueError: in one line, for everything that is wrong with them.
    """
    super().__post_init__()
    self.depth_scale, self._root = self.factor, Path(self.root).expanduser()
    positive = {"factor": self.factor, "max_depth": self.max_depth}
    wrong = [f"{name}={value} must be above 0" for name, value in positive.items() if value <= 0]
    if not self.root or not self._root.is_dir():
      wrong.append(f"root={self.root!r} is not a folder, set data.root to the one the names in the lists start from")
    if not 0 < self.holdout < 1:
      wrong.append(f"holdout={self.holdout} must lie between 0 and 1, both excluded")
    if self.resize and (self.crop[0] > self.resize[0] or self.crop[1] > self.resize[1]):
      wrong.append(f"crop={self.crop} does not fit into resize={self.resize}, make data.crop smaller")
    if wrong:
      raise UserError(f"data: {'; '.join(wrong)}.")
    image_files.check_exif(self.exif)
    self.classes, self.provides = one_scene(self.scene, DepthList.provides)

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset; raises as `one_scene`."""
    return DatasetInfo(classes=one_scene(options.get("scene", "scene"), frozenset())[0])

  @reader.read_once
  def source(self, split: str) -> "Frames":
    """The pictures of "train" or "eval", in the order of their list, whose files are all there.

    Raises:
      ValueError: the list or listed files are missing (all are counted), a line of another number of columns, a depth
        file of an unknown kind, or nothing left to train on.
    """
    if split not in ("train", "eval"):
      raise UserError(f"split={split!r} is unknown; choose one of ['eval', 'train'].")
    if split == "eval" and self.eval_list:
      path = image_files.find_list(self._root, self.eval_list, (), "name it in data.eval_list.")
    else:
      path = image_files.find_list(self._root, self.train_list, (), "name it in data.train_list.")
    records = [(image, depth) for image, depth in read_columns(path, columns=(2,))]
    if not self.eval_list:
      kept = len(records) - max(1, round(self.holdout * len(records)))
      if kept < 1:
        raise UserError(f"list file {path} has {len(records)} picture and one is held out; add more, or an eval_list.")
      records = records[:kept] if split == "train" else records[kept:]
    image_files.require_files(self._root, (name for pair in records for name in pair), f"they are named in {path}.")
    unknown = sorted({suffix for _, depth in records if (suffix := Path(depth).suffix).lower() not in SUFFIXES})
    if unknown:
      raise UserError(f"list file {path} names depth files ending in {', '.join(unknown)}; known are {SUFFIXES}.")
    read = functools.partial(read_depth, factor=self.factor, max_depth=self.max_depth)
    pairs = [(self._root / image, self._root / depth) for image, depth in records]
    return Frames(pairs, read, self.provides, self.exif)

  def eval_transform(self, example: Example) -> Example:
    """The picture at the one size of all."""
    return depth_transforms.resize_to_cover(example, size=self.resize) if self.resize else example


class Frames(Source):
  """Random access to images with a depth file each; reading starts with `[]`."""

  def __init__(
    self, records: Sequence[tuple[Path, Path]], read: Callable[[Path], np.ndarray], provides: frozenset[str], exif: str
  ):
    """
    Args:
      records: (image, depth) files.
      read: depth file to float32 [H, W] meters; it travels to the data workers.
      provides: keys of an Example, among "image", "depth", "class_id" and "index".
      exif: see files.EXIF.
    """
    self.records, self.read, self.provides, self.exif = records, read, provides, exif
    self.notes = image_files.exif_notes((image for image, _ in records), exif)

  def __len__(self) -> int:
    return len(self.records)

  def picture(self, index: int) -> str:
    """See Source."""
    return self.records[index][0].as_posix()

  def __getitem__(self, index: int) -> Example:
    """The whole picture.

    Raises:
      ValueError: a file is missing, damaged or of the wrong kind, without any measurement, or not of the image's size;
        the message names it.
    """
    image_path, depth_path = self.records[index]
    image, depth = image_files.read_image(image_path, self.exif), self.read(depth_path)
    if image.shape[:2] != depth.shape:
      sizes = ["{}x{}".format(*array.shape[:2]) for array in (depth, image)]
      raise UserError(
        f"depth file {depth_path} is {sizes[0]}, but its image {image_path} is {sizes[1]}; bring both to one size"
        f"{image_files.turned_hint(image, depth, self.exif)}."
      )
    example = {"image": image, "depth": depth, "class_id": np.zeros((), np.int32), "index": np.asarray(index, np.int32)}
    return {name: value for name, value in example.items() if name in self.provides}


def one_scene(scene: str, provides: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
  """(classes, provides) of a data set whose pictures all show one scene; no class where it has no name.

  Raises:
    ValueError: not lower-case words joined by '_', by which a class is looked up.
  """
  if not scene:
    return (), provides - {"class_id"}
  if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", scene):
    raise UserError(f"data.scene={scene!r} must be lower-case words joined by '_', like 'city_street'; or empty.")
  return (scene,), provides


def read_columns(path: str | Path, *, columns: tuple[int, ...]) -> list[list[str]]:
  """The columns of every line of a list file, separated by tabs where a line has one, else by white space.

  Plain or gzip-compressed text; a missing last newline, empty lines, other line ends and slashes at the start of a name
  do not matter.

  Args:
    path: of the file.
    columns: numbers of columns a line may have.

  Raises:
    ValueError: the file cannot be read, is empty, or has lines of another number of columns (named).
  """
  text = reading.read_text(path, called=f"list file {path}")
  lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
  table = [
    (number, [name.strip() for name in (line.split("\t") if "\t" in line else line.split())]) for number, line in lines
  ]
  wanted = " or ".join(map(str, columns))
  wrong = [f"{number} ({len(names)})" for number, names in table if len(names) not in columns or not all(names)]
  if wrong:
    shown = ", ".join(wrong[: image_files.SHOWN]) + (", ..." if len(wrong) > image_files.SHOWN else "")
    raise UserError(
      f"list file {path}: {len(wrong)} lines do not have {wanted} columns: {shown}; put the image and its depth in a "
      "line, with a tab between where names hold spaces."
    )
  if not table:
    raise UserError(f"list file {path} is empty; put the image and its depth in a line.")
  return [[name.lstrip("/") for name in names] for _, names in table]


def read_depth(path: Path, *, factor: float, max_depth: float) -> np.ndarray:
  """Reads a depth file of any of SUFFIXES as float32 [H, W] meters; 0 where nothing valid was measured.

  Raises:
    ValueError: missing, damaged, of 8 bits, of more than one channel, or without a value in (0, max_depth] meters; the
      message names the file.
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
    found = meters[np.isfinite(meters)]
    seen = f"from {found.min():g} to {found.max():g} m" if found.size else "not finite"
    raise UserError(
      f"depth file {path} has no value in (0, {max_depth:g}] meters: at {factor:g} units per meter its values are "
      f"{seen}; check data.factor and data.max_depth, or leave the picture out."
    )
  return depth


def _read_npy(path: Path) -> np.ndarray:
  if not path.is_file():
    raise UserError(f"depth file {path} cannot be read: it is not a file.")
  with image_decoding.faults(f"depth file {path}", "an array", "write it with numpy.save"):
    return np.array(np.lib.format.open_memmap(path, mode="r"))  # compares the size that a header claims with the file's


def _read_pfm(path: Path) -> np.ndarray:
  """A portable float map, float32 [H, W] as stored, or [H, W, 3].

  Not by OpenCV, which divides by the header's number and knows no comments. Source: Debevec's HDRShop, Netpbm's pfm(5).
  """
  raw = image_files.read_bytes(path)
  header = _PFM.match(raw)
  if header is None or not float(header["scale"]):
    raise UserError(f"depth file {path} does not begin as a PFM: Pf, width and height, a number not 0; write it again.")
  width, height, channels = int(header["width"]), int(header["height"]), 3 if header["kind"] == b"PF" else 1
  size, begin = 4 * width * height * channels, header.end("scale") + 1
  if len(raw) - begin != size and header["line"]:  # more than one byte ends the header
    begin = header.end("line")
  content = raw[begin:]
  if len(content) < size or content[size:].strip():
    raise UserError(
      f"depth file {path} has {len(content)} bytes behind its header, {width} x {height} pixels need {size}; copy or "
      "write it again."
    )
  order = "<" if float(header["scale"]) < 0 else ">"
  values = np.frombuffer(content, f"{order}f4", size // 4).reshape(height, width, *(3,) * (channels == 3))
  return values[::-1].astype(np.float32)  # rows come from the lowest to the highest


def _read_tiff(path: Path) -> np.ndarray:
  """A TIFF as stored."""
  return image_decoding.decode(image_files.read_bytes(path), path, cv2.IMREAD_UNCHANGED)
