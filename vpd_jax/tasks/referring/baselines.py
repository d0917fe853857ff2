"""The best constant mask: a baseline without sentences that only knows where objects are located."""

from collections.abc import Sequence

import numpy as np

from vpd_jax.errors import UserError


def best_constant(masks: Sequence[np.ndarray]) -> np.ndarray:
  """The mask with the highest overall IoU with the given masks, among all possible masks.

  For a mask M, the sum of intersections is the sum of c(p) over M, where c(p) is the number of masks that contain pixel
  p; the sum of unions is n |M| + A minus that, for n masks with A pixels in total. Among masks of the same area, the
  one with the largest c is best, so the optimum is a threshold on c.

  Args:
    masks: bool or int [H, W] each, all of the same size, 1 on the object.

  Returns:
    bool [H, W].

  Raises:
    ValueError: no masks, only empty ones, or different sizes.
  """
  shapes = {mask.shape for mask in masks}
  if len(shapes) > 1:
    raise UserError(f"masks of the sizes {sorted(shapes)} have no best constant mask; resize them to one.")
  counts = sum((mask.astype(bool).astype(np.int64) for mask in masks), np.zeros((), np.int64))
  if not counts.any():
    raise UserError("no training example has an object; check the masks of the data set.")
  descending = np.sort(counts.ravel())[::-1]
  inside = np.cumsum(descending)
  union = len(masks) * np.arange(1, descending.size + 1) + counts.sum() - inside
  best = int((inside / union).argmax())
  return counts >= descending[best]


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[H, W] resized to another size with nearest-neighbor interpolation."""
  rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True))
  return mask[rows[:, None], columns[None]]
