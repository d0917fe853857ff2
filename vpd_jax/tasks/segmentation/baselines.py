"""Trivial predictors of labels, as baselines that every trained network should exceed."""

from collections.abc import Callable

import numpy as np

from vpd_jax.errors import UserError

GRID = 32  # cells per side of the positions
Predictor = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] to int [H, W]


class Fit:
  """Accumulates statistics of training images of any sizes for three predictors, with the memory of one image.

  "most_frequent": the class with the most pixels; "position_mode": the most frequent class in each cell of a grid of
  32 x 32 over the image; "linear_rgb_position": linear discriminants of red, green, blue, x and y, the Bayes rule
  for normally distributed classes with a shared covariance.
  """

  def __init__(self, classes: int, ignore_label: int = 255):
    self.classes, self.ignore_label = classes, ignore_label
    self.cells = np.zeros((GRID * GRID, classes), np.int64)
    self.sums, self.squares = np.zeros((classes, 5)), np.zeros((5, 5))

  def add(self, image: np.ndarray, label: np.ndarray) -> None:
    """Adds a training image: uint8, or float in [0, 1], [H, W, 3], and int [H, W]."""
    valid = label != self.ignore_label
    numbers = label[valid].astype(np.int64)
    joint = cells(label.shape)[valid] * self.classes + numbers
    self.cells += np.bincount(joint, minlength=self.cells.size).reshape(self.cells.shape)
    inputs = regressors(image)[valid]
    for i in range(5):
      self.sums[:, i] += np.bincount(numbers, inputs[:, i], self.classes)
    self.squares += inputs.T @ inputs

  def predictors(self) -> dict[str, Predictor]:
    """The predictors by name.

    Raises:
      ValueError: no training image has a labeled pixel.
    """
    counts = self.cells.sum(0)
    if not counts.any():
      raise UserError("no training image has a labeled pixel; check the data set.")
    most = int(counts.argmax())
    position = np.where(self.cells.any(1), self.cells.argmax(1), most)
    weights, bias = self._discriminants(counts)
    return {
      "most_frequent": lambda image: np.full(image.shape[:2], most),
      "position_mode": lambda image: position[cells(image.shape[:2])],
      "linear_rgb_position": lambda image: (regressors(image) @ weights.T + bias).argmax(-1),
    }

  def _discriminants(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [K, 5] and biases [K] whose largest value is the class; -inf for classes without pixels."""
    total = counts.sum()
    means = self.sums / np.maximum(counts, 1)[:, None]
    within = self.squares / total - (means.T * counts) @ means / total
    weights = means @ np.linalg.pinv(within, hermitian=True)
    with np.errstate(divide="ignore"):
      return weights, np.log(counts / total) - 0.5 * (weights * means).sum(1)


def cells(size: tuple[int, int]) -> np.ndarray:
  """int [H, W]: index of the grid cell of each pixel."""
  rows, columns = (np.arange(side) * GRID // side for side in size)
  return rows[:, None] * GRID + columns[None]


def regressors(image: np.ndarray) -> np.ndarray:
  """Red, green, blue, x and y, all in [0, 1]: float64 [H, W, 5]."""
  height, width = image.shape[:2]
  result = np.empty((height, width, 5))
  result[..., :3] = image / 255.0 if image.dtype == np.uint8 else image
  result[..., 3] = np.linspace(0, 1, width)
  result[..., 4] = np.linspace(0, 1, height)[:, None]
  return result
