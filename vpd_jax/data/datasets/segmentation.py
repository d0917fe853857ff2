"""Base class of the segmentation data sets: options, augmentation, files or shards, label histogram."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from vpd_jax.data.readers import label_maps
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import segmentation as segmentation_transforms
from vpd_jax.errors import check_choice
from vpd_jax.types import Dataset, DatasetInfo, Example, Options, Source


@dataclasses.dataclass(eq=False, kw_only=True)
class SegmentationDataset(Dataset):
  """Images with label maps, with mmsegmentation's augmentation.

  Subclasses define `name`, `classes`, `label_mappings` and `labeled_images`, and call `__post_init__`.

  Args:
    root: folder of the files, or with format="tfds" the one that prepare_data.py wrote.
    crop, scale, ratio_range, cat_max_ratio, color_jitter: see segmentation_transforms.Augmentation.
    format: "files", or "tfds" for prepared ArrayRecord shards, which hold the same records in the same order.

  Attributes:
    provides: keys of an Example: "image" uint8 [H, W, 3] RGB, "label" uint8 [H, W] into `classes`, 255 if unlabeled,
      "index" int32 [], position in the sorted folder, "valid_size" int32 [2], see Augmentation.
    name, title: of the data set, in configs and in messages.
    palette, label_ids: see DatasetInfo.
    label_mappings: classes of the values in label files, see label_maps.decode.
  """

  root: str
  crop: tuple[int, int] = (512, 512)
  scale: tuple[int, int] = (2048, 512)
  ratio_range: tuple[float, float] = (0.5, 2.0)
  cat_max_ratio: float = 0.75
  color_jitter: bool = True
  format: str = "files"

  name: ClassVar[str]
  title: ClassVar[str] = ""
  palette: ClassVar[tuple[tuple[int, int, int], ...]] = ()
  label_ids: ClassVar[tuple[int, ...]] = ()
  label_mappings: Mapping[str, label_maps.LabelMapping] = dataclasses.field(init=False, repr=False)

  provides = frozenset({"image", "label", "index"}) | segmentation_transforms.ADDED
  stored = label_maps.STORED

  def __post_init__(self):
    check_choice("format", self.format, reader.FORMATS)
    self.augmentation = segmentation_transforms.Augmentation(
      self.crop, self.scale, self.ratio_range, self.cat_max_ratio, self.color_jitter
    )

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset."""
    del options
    return DatasetInfo(classes=cls.classes, palette=cls.palette, label_ids=cls.label_ids)

  @reader.read_once
  def source(self, split: str) -> Source:
    """The images of "train" or "eval" with their label files, sorted by name.

    Raises:
      ValueError: as `labeled_images`; with `complete`, for missing images; with format="tfds", for missing or truncated
        shards.
    """
    check_choice("split", split, ["eval", "train"])
    if self.format == "tfds":
      source: Source = reader.Shards(self.root, self.name, split, decode=self.decode(), made_with=self.made_with)
    else:
      source = self.labeled_images(split)
    return label_maps.check_count(source, split, self.published.counts.get(split), self.title)

  def labeled_images(self, split: str) -> label_maps.LabeledImages:
    """The files of "train" or "eval".

    Raises:
      ValueError: if the folder, its images or label files are missing (all are counted).
    """
    raise NotImplementedError

  def decode(self) -> Callable[..., Example]:
    """The function from a record to an Example, see label_maps.decode."""
    return functools.partial(label_maps.decode, label_mappings=self.label_mappings)

  def describe(self, *, skip_unreadable: bool = False) -> list[str]:
    """The label histogram of the training split, for the start of a run; see label_maps.histogram."""
    histogram = label_maps.histogram(self.source("train"), self.classes, skip_unreadable=skip_unreadable)
    return [*histogram, *super().describe()]

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The released augmentation."""
    del position
    return self.augmentation.training(example, rng)

  def eval_transform(self, example: Example) -> Example:
    """The full image, see Augmentation.evaluation."""
    return self.augmentation.evaluation(example)
