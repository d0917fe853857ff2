"""The augmentation of the segmentation releases.

Pure functions on numpy arrays and maps, as in depth.py. The order and the parameters are those of mmsegmentation 0.30
with mmcv 1.7: rescale, crop, mirror, color, pad. The releases use BGR, this module RGB: only the conversion to HSV
depends on the channel order, and OpenCV has it for both.

The releases pad with 0 after normalizing the image to [-1, 1], which is 127.5 of 255. uint8 images cannot represent
this, so they are padded with PAD_GRAY, and "valid_size" states where padding begins: the device replaces it by 0.

Source: mmseg/datasets/pipelines/transforms.py (Resize, RandomCrop, RandomFlip, PhotoMetricDistortion, Pad);
mmcv/image/geometric.py (rescale_size).
"""

import dataclasses

import cv2
import numpy as np

from vpd_jax.data import validation
from vpd_jax.data.readers.label_maps import IGNORE
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.errors import UserError
from vpd_jax.types import Example

TRIES = 10  # maximum number of windows rejected for their labels
PAD_GRAY = 128  # 0.004 instead of 0 if "valid_size" is ignored
ADDED = frozenset({"valid_size"})  # keys added to an Example


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """The validated options of the augmentation.

  Args:
    crop: (height, width) of a training example; smaller images are padded.
    scale: maximum (long, short) side, in either order, to which images are resized with fixed aspect ratio.
    ratio_range: (lowest, highest) factor on `scale` in training.
    cat_max_ratio: maximum fraction of one class among the labeled pixels of a window; 1 accepts any window.
    color_jitter: whether to apply color augmentation.

  Raises:
    ValueError: one line that lists all problems.
  """

  crop: tuple[int, int] = (512, 512)
  scale: tuple[int, int] = (2048, 512)
  ratio_range: tuple[float, float] = (0.5, 2.0)
  cat_max_ratio: float = 0.75
  color_jitter: bool = True

  def __post_init__(self):
    validation.check_size("crop", self.crop)
    sides = tuple(self.scale) if isinstance(self.scale, tuple | list) else ()
    problems = []
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
      problems.append(f"scale={self.scale!r} must be (long side, short side), two positive whole numbers")
    ratios = tuple(self.ratio_range) if isinstance(self.ratio_range, tuple | list) else ()
    if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1]:
      problems.append(f"ratio_range={self.ratio_range!r} must be (lowest, highest), both above 0")
    if not 0 < self.cat_max_ratio <= 1:
      problems.append(f"cat_max_ratio={self.cat_max_ratio} must lie above 0 and be at most 1")
    if problems:
      raise UserError(f"data: {'; '.join(problems)}.")

  def training(self, example: Example, rng: np.random.Generator) -> Example:
    """One augmented training example.

    Args:
      example: "image" uint8 [H, W, 3] RGB, "label" uint8 [H, W], and further maps.
      rng: for this record.

    Returns:
      the Example with maps of size `crop`, and "valid_size" int32 [2], the (height, width) without padding.
    """
    example = random_rescale(example, rng, scale=self.scale, ratio_range=self.ratio_range)
    example = random_crop(example, rng, size=self.crop, cat_max_ratio=self.cat_max_ratio)
    example = depth_transforms.random_mirror(example, rng)
    if self.color_jitter:
      example = dict(example, image=photometric_distortion(example["image"], rng))
    return pad(example, size=self.crop)

  def evaluation(self, example: Example) -> Example:
    """The unchanged image and labels, with "valid_size" int32 [2] of the full image.

    The test-time protocol rescales the image and computes scores at the original size.
    """
    return dict(example, valid_size=_size(example["image"]))


def rescaled_size(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
  """(height, width) of an image of `size` scaled to the largest size that fits into `scale`.

  With f = min(long / longer side, short / shorter side): int(side f + 0.5), at least 1. `scale` bounds the longer side
  by its larger number and the shorter side by its smaller one, whichever of them is the height.

  Source: mmcv/image/geometric.py, rescale_size.
  """
  factor = min(max(scale) / max(size), min(scale) / min(size))
  height, width = (max(int(side * factor + 0.5), 1) for side in size)
  return height, width


def random_rescale(
  example: Example, rng: np.random.Generator, *, scale: tuple[int, int], ratio_range: tuple[float, float]
) -> Example:
  """Rescales all maps into (int(long r), int(short r)) with r uniform in `ratio_range`.

  The image is interpolated bilinearly, without antialiasing; labels use nearest neighbor.

  Source: mmseg Resize, random_sample_ratio.
  """
  low, high = ratio_range
  ratio = rng.random() * (high - low) + low
  size = rescaled_size(example["image"].shape[:2], (int(scale[0] * ratio), int(scale[1] * ratio)))
  return depth_transforms.resize(example, size=size)


def random_crop(
  example: Example, rng: np.random.Generator, *, size: tuple[int, int], cat_max_ratio: float = 1.0
) -> Example:
  """Crops all maps to a window of at most `size`, with a uniform corner, the last position included.

  A window is rejected, up to TRIES times, if fewer than two classes occur or the most frequent one has at least the
  fraction `cat_max_ratio` of the labeled pixels; the next window is always accepted. Image sides that are shorter than
  the window are not cropped.

  Source: mmseg RandomCrop.
  """
  margin_y, margin_x = (
    max(side - crop_side, 0) for side, crop_side in zip(example["image"].shape[:2], size, strict=True)
  )
  for tries in range(TRIES + 1):
    top, left = (int(rng.integers(0, margin + 1)) for margin in (margin_y, margin_x))
    window = np.s_[top : top + size[0], left : left + size[1]]
    if cat_max_ratio >= 1 or tries == TRIES or is_varied(example["label"][window], cat_max_ratio):
      break
  maps = {name: np.ascontiguousarray(example[name][window]) for name in depth_transforms.map_names(example)}
  return {**example, **maps}


def is_varied(label: np.ndarray, cat_max_ratio: float) -> bool:
  """Whether uint8 [h, w] has two classes and none with the fraction `cat_max_ratio` of the labeled pixels or more."""
  counts = np.bincount(label.ravel(), minlength=256)[:IGNORE]
  return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio)


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Brightness, contrast, saturation and hue of uint8 [H, W, 3] RGB, each with probability one half.

  Brightness U(-32, 32) first; contrast U(0.5, 1.5) right after it or, with probability one half, last; saturation
  U(0.5, 1.5); hue an integer from -18 to 17. Each change truncates to uint8; saturation and hue convert to HSV and back
  separately, and round twice.

  Source: mmseg PhotoMetricDistortion. Its documentation mentions swapped channels, which it does not implement.
  """
  if rng.integers(2):
    image = change_levels(image, shift=rng.uniform(-32, 32))
  contrast_first = rng.integers(2)
  if contrast_first and rng.integers(2):
    image = change_levels(image, factor=rng.uniform(0.5, 1.5))
  if rng.integers(2):
    image = change_saturation(image, factor=rng.uniform(0.5, 1.5))
  if rng.integers(2):
    image = change_hue(image, shift=int(rng.integers(-18, 18)))
  if not contrast_first and rng.integers(2):
    image = change_levels(image, factor=rng.uniform(0.5, 1.5))
  return image


def change_levels(image: np.ndarray, *, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
  """Maps each level i to clip(i factor + shift, 0, 255) in float32, truncated. Source: mmseg `convert`."""
  return cv2.LUT(image, _levels(factor, shift))


def change_saturation(image: np.ndarray, *, factor: float) -> np.ndarray:
  """Multiplies the saturation of OpenCV's uint8 HSV, clipped and truncated. Source: mmseg `saturation`."""
  same = np.arange(256, dtype=np.uint8)
  return _in_hsv(image, (same, _levels(factor, 0.0), same))


def change_hue(image: np.ndarray, *, shift: int) -> np.ndarray:
  """Adds to the hue of OpenCV's uint8 HSV, modulo 180, in steps of two degrees. Source: mmseg `hue`."""
  same = np.arange(256, dtype=np.uint8)
  return _in_hsv(image, (((np.arange(256) + shift) % 180).astype(np.uint8), same, same))


def pad(example: Example, *, size: tuple[int, int]) -> Example:
  """Pads the maps at the bottom and right to `size`: the image with PAD_GRAY, labels with IGNORE, other maps with 0.

  Returns:
    the Example with "valid_size" int32 [2], the (height, width) before padding.

  Raises:
    ValueError: if the image is larger than `size`.
  """
  height, width = example["image"].shape[:2]
  if height > size[0] or width > size[1]:
    raise UserError(f"a picture of {height}x{width} cannot be padded to {size[0]}x{size[1]}.")
  valid = _size(example["image"])
  if (height, width) == tuple(size):
    return dict(example, valid_size=valid)
  maps = {}
  for name in depth_transforms.map_names(example):
    fill = {"image": PAD_GRAY, "label": IGNORE}.get(name, 0)
    array = example[name]
    maps[name] = np.full((*size, *array.shape[2:]), fill, array.dtype)
    maps[name][:height, :width] = array
  return {**example, **maps, "valid_size": valid}


def _levels(factor: float, shift: float) -> np.ndarray:
  table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(table, 0, 255).astype(np.uint8)


def _in_hsv(image: np.ndarray, tables: tuple[np.ndarray, ...]) -> np.ndarray:
  """Applies look-up tables to hue, saturation and value."""
  changed = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), np.stack(tables, axis=-1)[None])
  return cv2.cvtColor(changed, cv2.COLOR_HSV2RGB)


def _size(image: np.ndarray) -> np.ndarray:
  """(height, width) as int32 [2]."""
  return np.array(image.shape[:2], np.int32)
