"""Base class of the depth data sets: options and augmentation."""

import dataclasses

import numpy as np

from vpd_jax.data import validation
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.errors import UserError, check_choice
from vpd_jax.types import Dataset, Example


@dataclasses.dataclass(eq=False, kw_only=True)
class DepthDataset(Dataset):
  """Images with depth maps, with the augmentation of the depth release.

  Subclasses define `depth_scale`, `max_depth`, `info` and `source`, and call `__post_init__`.

  Args:
    crop: (height, width) of a training example.
    resize: (height, width) to which images and depth are resized first; () keeps the files' sizes. Scores on resized
      data are not comparable to published ones.
    cut_depth: "released", "scaled" or "off", see depth_transforms.vertical_cut_depth.
    color_jitter: whether to apply color augmentation.

  Attributes:
    provides: keys of an Example: "image" uint8 [H, W, 3] RGB, "depth" float32 [H, W] meters (0 is missing),
      "index" int32 [], position in the list file, and for data sets with classes "class_id" int32 [] into `classes`.
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
    check_choice("cut_depth", self.cut_depth, depth_transforms.CUT_DEPTH)
    self.crop = validation.check_size("crop", self.crop)
    self.resize = validation.check_size("resize", self.resize) if self.resize else ()

  def check_crop(self, option: str, size: tuple[int, ...]) -> None:
    """Raises ValueError if the crop is larger than `size`, the value of the given option, unless that is ()."""
    if size and (self.crop[0] > size[0] or self.crop[1] > size[1]):
      raise UserError(f"crop={self.crop} does not fit into {option}={size}; make data.crop smaller.")

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The released augmentation of one frame, see depth_transforms.depth_training."""
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
    """The full frame, resized if `resize` is set."""
    return depth_transforms.resize(example, size=self.resize) if self.resize else example
