"""Base class of the pose data sets: options, augmentation, keypoints."""

import dataclasses

import numpy as np

from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.errors import check_choice
from vpd_jax.types import Dataset, DatasetInfo, Example, Keypoints, Options


@dataclasses.dataclass(eq=False, kw_only=True)
class PoseDataset(Dataset):
  """Crops of people in images, with the augmentation of the release.

  Subclasses define `keypoints_of`, `source` and `truth`, and call `__post_init__`.

  Args:
    crop: (H, W).
    udp, padding, center_jitter, flip, half_body, scale, rotation, rotation_chance: see top_down.Augmentation.
    format: "files", or "tfds" for prepared ArrayRecord shards, which contain the same records in the same order.

  Attributes:
    provides: keys of an Example, see top_down.Augmentation.
    classes: the names of the keypoints.
  """

  crop: tuple[int, int] = (256, 192)
  udp: bool = True
  padding: float = top_down_transforms.PADDING
  center_jitter: str = "once"
  flip: float = 0.5
  half_body: float = 0.3
  scale: float = 0.5
  rotation: float = 40.0
  rotation_chance: float = 0.6
  format: str = "files"

  provides = top_down_transforms.PROVIDES
  classes = top_down_transforms.COCO.names

  def __post_init__(self):
    self.augmentation = self._augmentation(top_down_transforms.COCO)
    check_choice("format", self.format, reader.FORMATS)

  @classmethod
  def keypoints_of(cls, options: Options) -> Keypoints:
    """The keypoints of a data set with these options; by default COCO's."""
    del options
    return top_down_transforms.COCO

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset; raises as `keypoints_of`."""
    keypoints = cls.keypoints_of(options)
    return DatasetInfo(classes=keypoints.names, keypoints=keypoints, udp=options.get("udp", True))

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The training augmentation."""
    del position
    return self.augmentation.training(example, rng)

  def eval_transform(self, example: Example) -> Example:
    """The crop of the box."""
    return self.augmentation.evaluation(example)

  def _augmentation(
    self, keypoints: Keypoints, *, upper_share: float = top_down_transforms.UPPER_SHARE
  ) -> top_down_transforms.Augmentation:
    """The augmentation with the options of the data set, which it checks."""
    return top_down_transforms.Augmentation(
      self.crop,
      keypoints,
      udp=self.udp,
      padding=self.padding,
      center_jitter=self.center_jitter,
      flip=self.flip,
      half_body=self.half_body,
      upper_share=upper_share,
      scale=self.scale,
      rotation=self.rotation,
      rotation_chance=self.rotation_chance,
    )
