"""ADE20K SceneParsing: 150 classes, the files of ADEChallengeData2016.

Files, below `root` (the folder ADEChallengeData2016):
  images/training/ADE_train_<8 digits>.jpg      annotations/training/ADE_train_<8 digits>.png
  images/validation/ADE_val_<8 digits>.jpg      annotations/validation/ADE_val_<8 digits>.png
In an annotation 0 is no class, and 1 to 150 are the classes 0 to 149.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import segmentation as segmentation_transforms
from vpd_jax.errors import UserError
from vpd_jax.types import Dataset, DatasetInfo, Example, Published

LIST = label_maps.read_class_list("ade20k_classes.json")
SPLITS = {"train": "training", "eval": "validation"}
COUNTS = {"train": 20_210, "eval": 2_000}
SOURCE = "it comes from ADEChallengeData2016.zip of sceneparsing.csail.mit.edu."
KINDS = {
  "": label_maps.values(
    {index + 1: index for index in range(len(LIST.names))},
    (0, label_maps.IGNORE),
    "those of ADEChallengeData2016 hold no others, those of the full ADE20K do.",
  )
}


class Ade20k(Dataset):
  """ADE20K with mmsegmentation's augmentation.

  Args:
    root: the folder ADEChallengeData2016, or with format="tfds" the one that prepare_data.py wrote.
    crop, scale, ratio_range, cat_max_ratio, color_jitter: see segmentation_transforms.Augmentation.
    complete: whether the published 20 210 and 2 000 pictures must be there; False takes what there is.
    format: "files", or "tfds" for prepared ArrayRecord shards, which hold the same records in the same order.

  Attributes:
    provides: keys of an Example: "image" uint8 [H, W, 3] RGB, "label" uint8 [H, W] into `classes`, 255 for none,
      "index" int32 [], place in the sorted folder, "valid_size" int32 [2], see Augmentation.
    classes: the 150 names.
    palette: their colors.
    published, stored: see nyu.Nyu.

  Source: mmseg/datasets/ade.py (reduce_zero_label); VPD segmentation/configs/_base_/datasets/ade20k.py.
  """

  provides = frozenset({"image", "label", "index"}) | segmentation_transforms.ADDED
  classes = LIST.names
  palette = LIST.palette
  stored = label_maps.STORED

  def __init__(
    self,
    *,
    root: str,
    crop: tuple[int, int] = (512, 512),
    scale: tuple[int, int] = (2048, 512),
    ratio_range: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    color_jitter: bool = True,
    complete: bool = True,
    format: str = "files",
  ):
    self.root, self.format, self.complete = root, reader.check_format(format), complete
    self.augmentation = segmentation_transforms.Augmentation(crop, scale, ratio_range, cat_max_ratio, color_jitter)
    self.published = Published(COUNTS if complete else {}, None, {})
    if format == "files":
      image_files.require_folder(root, f"ADEChallengeData2016: {SOURCE}")

  @classmethod
  def info(cls, options: Mapping[str, Any]) -> DatasetInfo:
    """See types.Dataset."""
    del options
    return DatasetInfo(classes=cls.classes, palette=cls.palette)

  @reader.read_once
  def source(self, split: str) -> Any:
    """The pictures of "train" or "eval", sorted by name, whose annotations are all there.

    Raises:
      ValueError: no such folder, annotations are missing (all are counted), or with `complete` pictures are. With
        format="tfds", the shards are not there or not whole.
    """
    if split not in SPLITS:
      raise UserError(f"split={split!r} is unknown; choose one of {sorted(SPLITS)}.")
    if self.format == "tfds":
      found = reader.Shards(self.root, "ade20k", split, decode=functools.partial(label_maps.decode, kinds=KINDS))
    else:
      folder = Path(self.root).expanduser()
      pairs = label_maps.pair_files(folder, f"images/{SPLITS[split]}", f"annotations/{SPLITS[split]}", SOURCE)
      found = label_maps.Pictures(folder, pairs, KINDS)
    return label_maps.check_count(found, split, COUNTS[split] if self.complete else None, "ADE20K")

  def describe(self) -> list[str]:
    """Which labels occur in training, for the start of a run; see labels.histogram."""
    return label_maps.histogram(self.source("train"), self.classes)

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The released augmentation."""
    del position
    return self.augmentation.training(example, rng)

  def eval_transform(self, example: Example) -> Example:
    """The whole picture, see Augmentation.evaluation."""
    return self.augmentation.evaluation(example)
