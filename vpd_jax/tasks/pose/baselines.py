"""Trivial predictors of keypoints, as baselines that every trained network should exceed."""

from collections.abc import Callable

import cv2
import numpy as np

from vpd_jax.errors import UserError

SIDE = 8  # rows and columns of the resized crop for the regression
RIDGE = 1.0
Predictor = Callable[[np.ndarray], np.ndarray]  # crop uint8 [H, W, 3] to positions float64 [K, 2] in its pixels


class Fit:
  """Accumulates statistics of training crops for two predictors.

  "mean_pose": the mean position of each keypoint where it is labeled; "linear_crop": ridge regression from the colors
  of the crop, resized to 8 x 8, to the position of each keypoint.
  """

  def __init__(self, count: int):
    inputs = 3 * SIDE * SIDE + 1
    self.number, self.total = np.zeros(count), np.zeros((count, 2))
    self.gram, self.target = np.zeros((count, inputs, inputs)), np.zeros((count, inputs, 2))

  def add(self, crop: np.ndarray, keypoints: np.ndarray) -> None:
    """Adds a training crop: uint8 [H, W, 3], and float [K, 3] (x, y, 1 where labeled)."""
    inputs = regressors(crop)
    outer = np.outer(inputs, inputs)
    for k in np.flatnonzero(keypoints[:, 2] > 0):
      self.number[k] += 1
      self.total[k] += keypoints[k, :2]
      self.gram[k] += outer
      self.target[k] += np.outer(inputs, keypoints[k, :2])

  def predictors(self) -> dict[str, Predictor]:
    """The predictors by name.

    Raises:
      ValueError: no training crop has a labeled keypoint.
    """
    if not self.number.any():
      raise UserError("no training crop has a labeled keypoint; check the data set.")
    mean = self.total / np.maximum(self.number, 1)[:, None]
    offsets = self.target - np.einsum("ki,kj->kij", self.gram[:, :, -1], mean)  # of the positions minus their mean
    ridge = RIDGE * np.eye(self.gram.shape[1])
    ridge[-1, -1] = 1e-9  # almost none for the constant
    weights = np.stack([np.linalg.solve(gram + ridge, offset) for gram, offset in zip(self.gram, offsets, strict=True)])
    return {
      "mean_pose": lambda crop: mean,
      "linear_crop": lambda crop: mean + np.tensordot(weights, regressors(crop), axes=(1, 0)),
    }


def regressors(crop: np.ndarray) -> np.ndarray:
  """Colors in [0, 1] of the shrunk crop, and 1: float64 [3 * SIDE^2 + 1]."""
  small = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
  return np.append(small.ravel() / 255.0, 1.0)
