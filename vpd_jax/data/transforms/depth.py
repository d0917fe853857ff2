"""Pure functions (Example, rng) -> Example in numpy and OpenCV.

A map is an array of an Example with the height and width of the image. Geometric transforms apply to all maps, color
transforms only to the image. Inputs are not modified.

The order and the numbers are those of the depth release, which uses albumentations 1.1.0: VPD
depth/dataset/base_dataset.py, method `augment_training_data`.
"""

import cv2
import numpy as np

from vpd_jax.errors import UserError, check_choice
from vpd_jax.types import Example

CUT_DEPTH = ("released", "scaled", "off")
CUT_DEPTH_EVERY = 4


def depth_training(
  example: Example,
  rng: np.random.Generator,
  position: int,
  *,
  crop: tuple[int, int],
  cut_depth: str = "released",
  depth_scale: float = 1000.0,
  max_depth: float = 10.0,
  color_jitter: bool = True,
) -> Example:
  """Applies the training augmentation of the depth release, in its order.

  Vertical CutDepth at every fourth position of the epoch, mirroring, random crop, then brightness and contrast, gamma,
  hue, saturation and value.

  Args:
    example: "image" uint8 [H, W, 3] RGB, "depth" float32 [H, W] meters, and further maps.
    rng: for this record.
    position: of the record in the shuffled epoch. The release counts the samples of a loader worker, which is not a
      property of the data; every fourth record of the epoch is the same number.
    crop: (height, width) of the result.
    cut_depth: see `vertical_cut_depth`.
    depth_scale: file units per meter.
    max_depth: meters, mapped to 255 for `cut_depth="scaled"`.
    color_jitter: whether to apply color augmentation.

  Returns:
    the Example with maps of size `crop`.

  Source: VPD depth/dataset/base_dataset.py.
  """
  if position % CUT_DEPTH_EVERY == 0:
    example = vertical_cut_depth(example, rng, mode=cut_depth, depth_scale=depth_scale, max_depth=max_depth)
  example = random_mirror(example, rng)
  example = random_crop(example, rng, size=crop)
  return random_color(example, rng) if color_jitter else example


def vertical_cut_depth(
  example: Example, rng: np.random.Generator, *, mode: str, depth_scale: float, max_depth: float
) -> Example:
  """Overwrites a vertical band of the image with its depth map, in all three colors.

  With alpha, beta in [0, 1) the band covers the columns l .. l + w - 1, l = int(alpha W),
  w = int(max((W - alpha W) 0.75 beta, 1)).

  Args:
    example: "image" uint8 [H, W, 3], "depth" float32 [H, W] meters.
    rng: for this record.
    mode: "released" casts the values of the depth file (millimeters for NYU) to 8 bits, modulo 256, so the band shows
      contour lines instead of depth; "scaled" writes depth / max_depth * 255, clipped, as in the CutDepth paper; "off"
      changes nothing.
    depth_scale: file units per meter.
    max_depth: meters, for "scaled".

  Returns:
    the Example with a new image.

  Source: CutDepth (Ishii and Yamashita 2021); VPD depth/dataset/base_dataset.py, `augment_training_data`.
  """
  check_choice("cut_depth", mode, CUT_DEPTH)
  if mode == "off":
    return example
  width = example["image"].shape[1]
  alpha, beta = rng.random(2)
  left = int(alpha * width)
  band = slice(left, left + int(max((width - alpha * width) * beta * 0.75, 1)))
  image = example["image"].copy()
  image[:, band] = depth_as_color(example["depth"][:, band], mode, depth_scale, max_depth)[..., None]
  return dict(example, image=image)


def depth_as_color(depth: np.ndarray, mode: str, depth_scale: float, max_depth: float) -> np.ndarray:
  """Depth in meters as uint8: file units modulo 256 ("released"), or max_depth as 255 ("scaled")."""
  if mode == "released":
    # The release truncates the numbers of the file; the margin restores integers that were divided by depth_scale.
    units = np.floor(depth.astype(np.float64) * depth_scale + 0.01)
    return (units.astype(np.int64) % 256).astype(np.uint8)
  return np.clip(depth / max_depth * 255.0, 0, 255).astype(np.uint8)


def random_mirror(example: Example, rng: np.random.Generator) -> Example:
  """Mirrors all maps left to right with probability one half.

  Source: albumentations 1.1.0 HorizontalFlip.
  """
  if rng.random() >= 0.5:
    return example
  mirrored = {name: np.ascontiguousarray(example[name][:, ::-1]) for name in map_names(example) if name != "image"}
  return {**example, **mirrored, "image": cv2.flip(example["image"], 1)}  # 30 times as fast for three bytes per pixel


def random_crop(example: Example, rng: np.random.Generator, *, size: tuple[int, int]) -> Example:
  """Cuts a window of `size` = (height, width) out of all maps, its corner at (int((H - h) u), int((W - w) v)).

  With u, v in [0, 1) the last offset of an axis is never sampled.

  Raises:
    ValueError: if the image is smaller than the window.

  Source: albumentations 1.1.0 RandomCrop, `get_random_crop_coords`.
  """
  (height, width), (h, w) = example["image"].shape[:2], size
  if h > height or w > width:
    raise UserError(
      f"crop={h}x{w} does not fit into an image of {height}x{width}; make data.crop smaller or data.resize larger."
    )
  u, v = rng.random(2)
  example = _window(example, int((height - h) * u), int((width - w) * v), size)
  return {**example, **{name: np.ascontiguousarray(example[name]) for name in map_names(example)}}


def kb_crop(example: Example, *, size: tuple[int, int] = (352, 1216)) -> Example:
  """Crops all maps to the window of the KITTI depth benchmark: the bottom rows, the center columns.

  The corner lies at (H - h, int((W - w) / 2)); a frame of 375 x 1242 loses its 23 top rows, where LiDAR has no
  points, and 13 columns on each side.

  Raises:
    ValueError: if the image is smaller than the window.

  Source: "do_kb_crop" of BTS, which the loader of MetaPrompts also uses.
  """
  (height, width), (h, w) = example["image"].shape[:2], size
  if h > height or w > width:
    raise UserError(f"kb_crop={h}x{w} does not fit into an image of {height}x{width}; make data.kb_crop smaller.")
  return _window(example, height - h, (width - w) // 2, size)


def resize(example: Example, *, size: tuple[int, int]) -> Example:
  """Resizes all maps to `size` = (height, width): the image bilinearly, the others to the nearest pixel.

  Depth is not interpolated, which would mix foreground and background, or measurements and 0. The release resizes depth
  bilinearly, in a branch that its published commands do not use.

  Source: VPD depth/dataset/nyudepthv2.py, `scale_size`.
  """
  interpolation = {name: cv2.INTER_LINEAR if name == "image" else cv2.INTER_NEAREST for name in map_names(example)}
  return {
    **example,
    **{name: cv2.resize(example[name], size[::-1], interpolation=mode) for name, mode in interpolation.items()},
  }


def resize_to_cover(example: Example, *, size: tuple[int, int]) -> Example:
  """Resizes all maps to cover `size` = (height, width), keeping the aspect ratio, and takes the center crop.

  The image is area-averaged if it shrinks, or else bilinearly interpolated; the other maps use nearest neighbor, so
  that depth is never mixed.
  """
  (height, width), (h, w) = example["image"].shape[:2], size
  scale = max(h / height, w / width)
  new = max(h, round(height * scale)), max(w, round(width * scale))
  if new != (height, width):
    image_mode = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    modes = {name: image_mode if name == "image" else cv2.INTER_NEAREST_EXACT for name in map_names(example)}
    example = {**example, **{name: cv2.resize(example[name], new[::-1], interpolation=modes[name]) for name in modes}}
  return _window(example, (new[0] - h) // 2, (new[1] - w) // 2, size)


def random_color(example: Example, rng: np.random.Generator) -> Example:
  """Brightness and contrast, gamma, hue saturation and value: in this order, each with probability one half.

  Contrast 1 + U(-0.2, 0.2), brightness U(-0.2, 0.2), gamma an integer percentage from 80 to 120, hue U(-20, 20),
  saturation U(-30, 30), value U(-20, 20).

  Source: the defaults of albumentations 1.1.0, which VPD depth/dataset/base_dataset.py uses.
  """
  image = example["image"]
  if rng.random() < 0.5:
    contrast, brightness = rng.uniform(-0.2, 0.2, 2)
    image = change_contrast(image, contrast=1 + contrast, brightness=brightness)
  if rng.random() < 0.5:
    image = change_gamma(image, gamma=rng.integers(80, 121) / 100)
  if rng.random() < 0.5:
    hue, saturation, value = rng.uniform((-20, -30, -20), (20, 30, 20))
    image = shift_hsv(image, hue=hue, saturation=saturation, value=value)
  return dict(example, image=image)


def change_contrast(image: np.ndarray, *, contrast: float, brightness: float) -> np.ndarray:
  """Maps each level i to clip(i contrast + 255 brightness, 0, 255), truncated; the table is computed in float32.

  Source: albumentations 1.1.0 functional.py, `_brightness_contrast_adjust_uint` with beta_by_max.
  """
  table = np.arange(256, dtype=np.float32) * np.float32(contrast) + np.float32(brightness * 255)
  return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def change_gamma(image: np.ndarray, *, gamma: float) -> np.ndarray:
  """Maps each level i to 255 (i/255)^gamma, truncated.

  i/255 is computed as i times 1/255, as released: its rounding shifts some levels by one, even at gamma 1.

  Source: albumentations 1.1.0 functional.py, `gamma_transform`.
  """
  table = (np.arange(256) * (1.0 / 255)) ** gamma * 255
  return cv2.LUT(image, table.astype(np.uint8))


def shift_hsv(image: np.ndarray, *, hue: float, saturation: float, value: float) -> np.ndarray:
  """Shifts hue (modulo 180), saturation and value (clipped to 0..255) of an RGB image; each is truncated.

  Source: albumentations 1.1.0 functional.py, `_shift_hsv_uint8`; the color space is OpenCV's HSV of uint8.
  """
  levels = np.arange(256)
  tables = np.stack(
    (np.mod(levels + hue, 180), np.clip(levels + saturation, 0, 255), np.clip(levels + value, 0, 255)), axis=-1
  ).astype(np.uint8)
  shifted = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), tables[None])
  return cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB)


def _window(example: Example, top: int, left: int, size: tuple[int, int]) -> Example:
  """Crops all maps at (top, left), without a copy."""
  part = np.s_[top : top + size[0], left : left + size[1]]
  return {**example, **{name: example[name][part] for name in map_names(example)}}


def map_names(example: Example) -> list[str]:
  """Names of the arrays that have the image's height and width."""
  shape = example["image"].shape[:2]
  return [name for name, array in example.items() if np.shape(array)[:2] == shape]
