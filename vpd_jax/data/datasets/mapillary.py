"""Mapillary Vistas v1.2 with the 19 classes of Cityscapes, on which MetaPrompts' best model was trained first.

Files, below `root`: {training,validation}/images/<name>.jpg and {training,validation}/labels/<name>.png, the latter in
v1.2/labels where version 2 was downloaded. A label file has a palette and holds 0 to 65.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpd_jax.data.datasets import cityscapes
from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import segmentation as segmentation_transforms
from vpd_jax.errors import UserError
from vpd_jax.types import Dataset, DatasetInfo, Example, Published

SPLITS = {"train": "training", "eval": "validation"}
COUNTS = {"train": 18_000, "eval": 2_000}
SOURCE = "it comes from the download of Mapillary Vistas at mapillary.com/dataset/vistas."
LABELS = 66
MAPPED = {number: index for index, row in enumerate(cityscapes.LIST.rows) for number in row["mapillary"]}
# The release starts from zeros, so that a number beyond 65 becomes road there; here it is an error.
KINDS = {"": label_maps.values(MAPPED, set(range(LABELS)) - MAPPED.keys(), "these are the labels of version 1.2.")}


class Mapillary(Dataset):
  """Mapillary Vistas with mmsegmentation's augmentation.

  MetaPrompts publishes the mapping of classes, but not the configuration of that training: crop and scale here are
  those of Cityscapes.

  Args:
    root: folder that holds training/ and validation/, or with format="tfds" the one that prepare_data.py wrote.
    crop, scale, ratio_range, cat_max_ratio, color_jitter: see segmentation_transforms.Augmentation.
    complete: whether the published 18 000 and 2 000 pictures must be there; False takes what there is.
    format: "files", or "tfds" for prepared ArrayRecord shards, which hold the same records in the same order.

  Attributes: as of ade20k.Ade20k, with the classes and colors of Cityscapes.

  Source: MetaPrompts segmentation/mapillary_v1.py, MapillaryHack.
  """

  provides = frozenset({"image", "label", "index"}) | segmentation_transforms.ADDED
  classes = cityscapes.LIST.names
  palette = cityscapes.LIST.palette
  stored = label_maps.STORED

  def __init__(
    self,
    *,
    root: str,
    crop: tuple[int, int] = (1024, 1024),
    scale: tuple[int, int] = (2048, 1024),
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
      image_files.require_folder(root, f"that holds training/ and validation/ of Mapillary Vistas: {SOURCE}")

  @classmethod
  def info(cls, options: Mapping[str, Any]) -> DatasetInfo:
    """See types.Dataset."""
    del options
    return DatasetInfo(classes=cls.classes, palette=cls.palette)

  @reader.read_once
  def source(self, split: str) -> Any:
    """The pictures of "train" or "eval", sorted by name; raises as ade20k.Ade20k.source."""
    if split not in SPLITS:
      raise UserError(f"split={split!r} is unknown; choose one of {sorted(SPLITS)}.")
    if self.format == "tfds":
      found = reader.Shards(self.root, "mapillary", split, decode=functools.partial(label_maps.decode, kinds=KINDS))
    else:
      root, part = Path(self.root).expanduser(), SPLITS[split]
      inner = "v1.2/labels" if (root / part / "v1.2" / "labels").is_dir() else "labels"
      found = label_maps.Pictures(root, label_maps.pair_files(root, f"{part}/images", f"{part}/{inner}", SOURCE), KINDS)
    return label_maps.check_count(found, split, COUNTS[split] if self.complete else None, "Mapillary Vistas")

  def describe(self) -> list[str]:
    """Which labels occur in training, for the start of a run; see labels.histogram."""
    return label_maps.histogram(self.source("train"), self.classes)

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The augmentation of the Cityscapes release."""
    del position
    return self.augmentation.training(example, rng)

  def eval_transform(self, example: Example) -> Example:
    """The whole picture, see Augmentation.evaluation."""
    return self.augmentation.evaluation(example)
