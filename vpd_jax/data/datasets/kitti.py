"""KITTI's raw sequences with the annotated depth, in the Eigen split of the depth papers.

Files, below `root`, as the lists of VPD and MetaPrompts name them:
  raw_data/<date>/<drive>_sync/image_02/data/<10 digits>.png
  data_depth_annotated/{train,val}/<drive>_sync/proj_depth/groundtruth/image_02/<10 digits>.png
  train_list.txt and test_list.txt (or eigen_benchmark_train_list.txt, eigen_train_files_with_gt.txt, ..., or .gz)
The dates may also be in `root` itself, and the drives with depth in `root`, in `train` and `val`, or below a separate
`depth_root`: only the suffix of a name, from the date or the drive on, is used. Lists of BTS and of VPD both work.
Depth is a 16-bit PNG in 1/256 meter, 0 without LiDAR point.
"""

import dataclasses
import functools
import os
import re
from pathlib import Path

import numpy as np

from vpd_jax.data import validation
from vpd_jax.data.datasets import depth_list
from vpd_jax.data.datasets.depth import DepthDataset
from vpd_jax.data.readers import image_files
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.errors import UserError, check_choice, first_items
from vpd_jax.types import DatasetInfo, Example, Options, Published, Source

DEPTH_SCALE = 256.0  # units per meter in the files
MAX_DEPTH = 80.0  # meters
LISTS = {
  "train": ("train_list.txt", "eigen_benchmark_train_list.txt", "eigen_train_files_with_gt.txt"),
  "eval": ("test_list.txt", "eigen_benchmark_test_list.txt", "eigen_test_files_with_gt.txt"),
}
LISTS_SOURCE = (
  "take it from depth/dataset/filenames/eigen_benchmark of github.com/wl-zhao/VPD, or name it in data.{option}."
)
FILES_SOURCE = (
  "images come from the raw data of cvlibs.net/datasets/kitti, depth from its data_depth_annotated.zip; "
  "set data.root and data.depth_root to where they are."
)
NO_DEPTH = "None"  # instead of a file name in the lists of BTS
# The part of a file name that all layouts have in common, and the folders to search.
IMAGE = re.compile(r"(\d{4}_\d\d_\d\d/[^/]+/image_0[23]/data/[^/]+)$")
DEPTH = re.compile(r"([^/]+/proj_depth/groundtruth/image_0[23]/[^/]+)$")
IMAGE_FOLDERS = ("raw_data", "", "raw")
DEPTH_FOLDERS = ("data_depth_annotated/train", "data_depth_annotated/val", "data_depth_annotated", "train", "val", "")


@dataclasses.dataclass(eq=False, kw_only=True)
class Kitti(DepthDataset):
  """KITTI with the crop of its depth benchmark.

  Args:
    root: folder of the images, and of the depth where `depth_root` is empty.
    depth_root: folder of the annotated depth.
    train_list: list file of the training frames; empty searches for the usual names in `root` and its parent. A line
      has the image, its depth or "None", and optionally the focal length, which is not used. Frames without depth are
      skipped.
    test_list: the same for evaluation.
    kb_crop: (height, width) of the crop for training and evaluation, before `resize`, see transforms.kb_crop; () keeps
      full frames, which differ in size by a few pixels.
    scene: the class of all frames, for methods that use a class, since KITTI has no scene classes; empty: no class.
    cut_depth: "released" wraps 1/256 meters.
    format: "files", or "tfds" for prepared ArrayRecord shards, which contain the same full frames in the same order.

  Attributes:
    classes: the scene, or empty.
    published: 652 test frames, which are Eigen's 697 without the 45 that have no annotated depth.

  Source: MetaPrompts depth/dataset/kitti.py and base_dataset.py.
  """

  root: str
  depth_root: str = ""
  train_list: str = ""
  test_list: str = ""
  kb_crop: tuple[int, int] | tuple[()] = (352, 1216)
  crop: tuple[int, int] = (352, 352)
  scene: str = "street"
  format: str = "files"

  classes = ("street",)
  depth_scale, max_depth = DEPTH_SCALE, MAX_DEPTH
  published = Published({"train": 23_158, "eval": 652}, None, {"depth": (0.0, 65535 / DEPTH_SCALE)})
  stored = {**image_files.FRAME, "index": "int32"}  # noqa: RUF012 (never changed)

  def __post_init__(self):
    super().__post_init__()
    self.kb_crop = validation.check_size("kb_crop", self.kb_crop) if self.kb_crop else ()
    self.classes, self.provides = depth_list.one_scene(self.scene, Kitti.provides)
    check_choice("format", self.format, reader.FORMATS)
    self._depth_root = self.depth_root or self.root
    self.lists = {"train": self.train_list or None, "eval": self.test_list or None}
    self.check_crop("resize" if self.resize else "kb_crop", self.resize or self.kb_crop)
    if self.format == "tfds":
      options = {"train_list": self.train_list, "test_list": self.test_list, "depth_root": self.depth_root}
      if any(options.values()):
        unused = ", ".join(f"data.{name}" for name, value in options.items() if value)
        raise UserError(f"{unused} has no effect with data.format='tfds': the shards were made from the files.")
    else:
      image_files.require_folder(self.root, f"that holds raw_data/ and data_depth_annotated/ of KITTI: {FILES_SOURCE}")
      if not Path(self._depth_root).expanduser().is_dir():
        raise UserError(f"depth_root={self.depth_root!r} is not a folder; {FILES_SOURCE}")

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset; raises as depth_list.one_scene."""
    classes, _ = depth_list.one_scene(options.get("scene", cls.scene), frozenset())
    return DatasetInfo(classes=classes, window=tuple(options.get("kb_crop", cls.kb_crop)) or None)

  @reader.read_once
  def source(self, split: str) -> Source:
    """The frames of "train" or "eval" that have depth, in the order of the list file.

    Raises:
      ValueError: if the list file or listed files are missing (all are counted), or for lines with the wrong number of
        columns; with format="tfds", for missing or incomplete shards.
    """
    check_choice("split", split, sorted(LISTS))
    example = functools.partial(decode, provides=self.provides, least=self.kb_crop or (1, 1))
    if self.format == "tfds":
      return reader.Shards(self.root, "kitti", split, decode=example)
    root, depth_root = (Path(folder).expanduser() for folder in (self.root, self._depth_root))
    hint = LISTS_SOURCE.format(option="train_list" if split == "train" else "test_list")
    path = image_files.find_list(root, self.lists[split], LISTS[split], hint)
    columns = depth_list.read_columns(path, columns=(2, 3))
    lines = [(image, depth) for image, depth, *_ in columns if depth != NO_DEPTH]
    if not lines:
      raise UserError(f"list file {path} names no frame with depth; {hint}")
    image_names, depth_names = [image for image, _ in lines], [depth for _, depth in lines]
    images = place(root, IMAGE_FOLDERS, IMAGE, image_names)
    depths = place(depth_root, DEPTH_FOLDERS, DEPTH, depth_names)
    listed, files = (*image_names, *depth_names), (*images, *depths)
    missing = [name for name, file in zip(listed, files, strict=True) if file is None]
    if missing:
      folders = self.root if self._depth_root == self.root else f"{self.root} and {self._depth_root}"
      raise UserError(f"{len(missing)} files are missing in {folders}: {first_items(missing)}; {FILES_SOURCE}")
    pairs = [(image, depth) for image, depth in zip(images, depths, strict=True) if image and depth]
    if depth_root != root:
      pairs = [(image, str(depth_root.absolute() / depth)) for image, depth in pairs]
    return image_files.Frames(root, pairs, example)

  def eval_transform(self, example: Example) -> Example:
    """The crop of the benchmark, resized if `resize` is set."""
    return super().eval_transform(depth_transforms.kb_crop(example, size=self.kb_crop) if self.kb_crop else example)


def decode(
  record: image_files.Record, folder: Path | None = None, *, provides: frozenset[str], least: tuple[int, int]
) -> Example:
  """Decodes a record, from files or shards, to an Example.

  Args:
    record: see Kitti.stored.
    folder: for messages.
    provides: keys of an Example.
    least: minimum (height, width) of a frame.

  Raises:
    ValueError: for a damaged image or wrong format, images of different size, a frame smaller than `least`, or one
      without depth; names the file.
  """
  frame = image_files.decode_frame(record, folder, scale=DEPTH_SCALE)
  names = [name if folder is None else folder / name for name in (record["image_path"], record["depth_path"])]
  (height, width), (h, w) = frame["image"].shape[:2], least
  if height < h or width < w:
    raise UserError(
      f"{names[0]} is {height}x{width}, smaller than kb_crop={h}x{w}; take frames as KITTI has them, about 375x1242, "
      "or make data.kb_crop smaller."
    )
  if not frame["depth"].any():
    raise UserError(f"depth file {names[1]} is empty, all of it 0; copy it again, or take it out of the list.")
  example = {**frame, "class_id": np.zeros((), np.int32), "index": np.asarray(record["index"], np.int32)}
  return {name: value for name, value in example.items() if name in provides}


def place(root: Path, folders: tuple[str, ...], ending: re.Pattern, names: list[str]) -> list[str | None]:
  """The path of each listed file below `root`: its name, or the part that `ending` matches in one of the folders.

  Every directory is read once. None for a file that does not exist.
  """
  entries = functools.cache(lambda folder: set(os.listdir(folder)) if os.path.isdir(folder) else set())
  paths: list[str | None] = []
  for name in names:
    match = ending.search(name)
    candidates = [name, *(os.path.join(folder, match[1]) for folder in folders)] if match else [name]
    paths.append(next((p for p in candidates if os.path.basename(p) in entries(root / os.path.dirname(p))), None))
  return paths
