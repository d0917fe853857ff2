"""Base class of the referring segmentation data sets: options, resizing, encoder cache."""

import dataclasses

import numpy as np

from vpd_jax.data.readers import referring
from vpd_jax.data.shards import reader
from vpd_jax.errors import check_choice
from vpd_jax.types import Dataset, DatasetInfo, Example, Options


@dataclasses.dataclass(eq=False, kw_only=True)
class ReferringDataset(Dataset):
  """Images with objects and sentences about them, resized as in the release.

  Subclasses define `source`, and call `__post_init__`.

  Args:
    root: folder of the files, or with format="tfds" the one that prepare_data.py wrote.
    crop: (height, width) of the network's input, to which full images are resized, ignoring the aspect ratio. Release:
      (512, 512).
    canvas: see referring.Transforms.
    cache, cache_folder: cache for outputs of the VAE and the text encoder: "off", "memory", or "disk" with a folder;
      see evaluation/encoder_cache.py.
    format: "files", or "tfds" for prepared ArrayRecord shards, which contain the same records in the same order.

  Attributes:
    provides: keys of an Example: "image" uint8 [H, W, 3] RGB, "mask" uint8 [H, W], 1 on the object, "sentence" str,
      "image_id" int32 [], id of the image, "index" int32 [], position in the split; "full_mask" and "full_size",
      see referring.Transforms.evaluation.
  """

  root: str
  crop: tuple[int, int] = (512, 512)
  canvas: tuple[int, int] = (640, 640)
  cache: str = "off"
  cache_folder: str = ""
  format: str = "files"

  provides = referring.PROVIDES
  stored = referring.STORED

  def __post_init__(self):
    check_choice("format", self.format, reader.FORMATS)
    self.transforms = referring.Transforms(self.crop, self.canvas)
    self.encoder_cache = referring.check_cache(self.cache, self.cache_folder)

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset."""
    del options
    return DatasetInfo(only_resizes=True)

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """One sentence of the object, resized image and mask."""
    del position
    return self.transforms.training(example, rng)

  def eval_transform(self, example: Example) -> Example:
    """Resized image and mask, and the mask in its original size."""
    return self.transforms.evaluation(example)
