"""What the depth data sets share: options, augmentation."""

import dataclasses

import numpy as np

from vpd_jax.data import validation
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.errors import UserError
from vpd_jax.types import Dataset, Example


@dataclasses.dataclass(eq=False, kw_only=True)
class DepthDataset(Dataset):
  """Pictures with a depth map each, with the augmentation of the depth release.

  A data set gives `depth_scale`, `max_depth`, `info` and `source`, and calls `__post_init__`.

  Args:
    crop: (height, width) of a training example.
    resize: (height, width) that images and depth get before anything else; () keeps the files' sizes. Scores of
      resized data are not the published ones.
    cut_depth: "released", "scaled" or "off", see transforms.vertical_cut_depth.
    color_jitter: False trains without the changes of color.

  Attributes:
    provides: keys of an Example: "image" uint8 [H, W, 3] RGB, "depth" float32 [H, W] meters (0 is no measurement),
      "index" int32 [], position in the list file, and where there are classes "class_id" int32 [] into `classes`.
    depth_scale: units per meter in the files.
    max_depth: meters, the range of the data set.
  """

  crop: tuple[int, int]
  resize: tuple[int, int] | tuple[()] = ()
  cut_depth: str = "released"
  color_jitter: bool = True

  depth_scale: float = dataclasses.field(init=False, repr=False)
  max_depth: float = dataclasses.field(init=False, repr=False)

  provides = frozenset({"image", "depth", "class_id", "index"})

  def __post_init__(self):
    depth_transforms.check_cut_depth(self.cut_depth)
    self.crop = validation.check_size("crop", self.crop)
    self.resize = validation.check_size("resize", self.resize) if self.resize else ()

  def check_crop(self, option: str, whole: tuple[int, ...]) -> None:
    """Raises ValueError where the crop does not fit into the size `whole` of this option, unless that is ()."""
    if whole and (self.crop[0] > whole[0] or self.crop[1] > whole[1]):
      raise UserError(f"crop={self.crop} does not fit into {option}={whole}; make data.crop smaller.")

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The released augmentation of one frame, see transforms.depth_training."""
    return depth_transforms.depth_training(
      self.eval_transform(example),
      rng,
      position,
      crop=self.crop,
      cut_depth=self.cut_depth,
      depth_scale=self.depth_scale,
      max_depth=self.max_depth,
      color_jitter=self.color_jitter,
    )

  def eval_transform(self, example: Example) -> Example:
    """The whole frame, resized where asked."""
    return depth_transforms.resize(example, size=self.resize) if self.resize else example
