"""Trivial predictors of depth, as baselines that every trained network should exceed."""

from collections.abc import Iterable

import numpy as np

from vpd_jax.errors import UserError
from vpd_jax.types import Example

STEP = 0.005  # meters, resolution of the best constant


def depth_baselines(
  train_examples: Iterable[Example],
  eval_examples: Iterable[Example],
  *,
  min_depth: float = 1e-3,
  max_depth: float = 10.0,
  region: tuple[int, int, int, int] | None = None,
) -> dict[str, float]:
  """RMSE of three predictors that are fitted on full training images and use no neighboring pixels.

  Each iterable is read once. All images must have the same size. Predictions are clipped to the valid range.

  Args:
    train_examples: "image" uint8 [H, W, 3], "depth" float32 [H, W] meters, 0 for no measurement; not augmented.
    eval_examples: the same.
    min_depth, max_depth: meters; pixels with min_depth < depth < max_depth count, as in NYU's protocol.
    region: (top, bottom, left, right) rows and columns that are scored; None is the whole image.

  Returns:
    meters, per image over its valid pixels, then the mean over images that have any:
    "constant": the constant depth that is best on the training images,
    "position_mean": the mean depth of each pixel position,
    "linear_rgb_position": least squares on red, green, blue, x, y and 1.

  Raises:
    ValueError: no valid pixel in one of the sets, or images of different sizes.
  """
  fit = Fit(min_depth, max_depth)
  for example in train_examples:
    fit.add(example)
  predictors = fit.predictors()
  window = np.s_[:, :] if region is None else np.s_[region[0] : region[1], region[2] : region[3]]
  errors: dict[str, list[float]] = {name: [] for name in predictors}
  for example in eval_examples:
    fit.check_size(example["depth"].shape)
    truth = example["depth"][window].astype(np.float64)
    valid = (truth > min_depth) & (truth < max_depth)
    for name, predict in predictors.items():
      if valid.any():
        error = (np.clip(predict(example), min_depth, max_depth)[window] - truth)[valid]
        errors[name].append(float(np.sqrt(np.mean(error**2))))
  if not errors["constant"]:
    raise UserError("no evaluation image has a valid depth; check the data set and max_depth.")
  return {name: float(np.mean(values)) for name, values in errors.items()}


class Fit:
  """Accumulates statistics of training images for the three predictors, with the memory of one image."""

  def __init__(self, min_depth: float, max_depth: float):
    self.min_depth, self.max_depth = min_depth, max_depth
    self.size = None
    self.moments = []  # mean and mean square of the depth of each image
    self.gram, self.target = np.zeros((6, 6)), np.zeros(6)

  def check_size(self, size: tuple[int, ...]):
    if self.size is None:
      self.size, self.total, self.count = size, np.zeros(size), np.zeros(size)
    if size != self.size:
      raise UserError(f"depth maps of {self.size} and {size}: the baselines need all images of one size.")

  def add(self, example: Example):
    """Adds a training image."""
    depth = example["depth"].astype(np.float64)
    self.check_size(depth.shape)
    valid = (depth > self.min_depth) & (depth < self.max_depth)
    if not valid.any():
      return
    self.total += np.where(valid, depth, 0)
    self.count += valid
    self.moments.append((depth[valid].mean(), (depth[valid] ** 2).mean()))
    inputs = regressors(example["image"])[valid]
    self.gram += inputs.T @ inputs
    self.target += inputs.T @ depth[valid]

  def predictors(self) -> dict:
    """Functions Example -> depth float64 [H, W]."""
    if not self.moments:
      raise UserError("no training image has a valid depth; check the data set and max_depth.")
    constant = best_constant(np.array(self.moments), self.max_depth)
    position = np.where(self.count > 0, self.total / np.maximum(self.count, 1), constant)
    weights = np.linalg.lstsq(self.gram, self.target, rcond=None)[0]
    return {
      "constant": lambda example: np.full(example["depth"].shape, constant),
      "position_mean": lambda example: position,
      "linear_rgb_position": lambda example: regressors(example["image"]) @ weights,
    }


def best_constant(moments: np.ndarray, max_depth: float) -> float:
  """The depth with the least mean over images of the RMSE, from the images' means and mean squares [N, 2]."""
  candidates = np.arange(0, max_depth + STEP, STEP)[:, None]
  squares = moments[:, 1] - 2 * candidates * moments[:, 0] + candidates**2
  return float(candidates[np.sqrt(np.maximum(squares, 0)).mean(1).argmin(), 0])


def regressors(image: np.ndarray) -> np.ndarray:
  """Red, green, blue in [0, 1], x and y in [0, 1], and 1: float64 [H, W, 6]."""
  height, width = image.shape[:2]
  result = np.ones((height, width, 6))
  result[..., :3] = image / 255.0
  result[..., 3] = np.linspace(0, 1, width)
  result[..., 4] = np.linspace(0, 1, height)[:, None]
  return result
