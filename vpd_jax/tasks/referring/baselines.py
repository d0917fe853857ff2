"""The best mask that looks at nothing: what a network that reads no sentence reaches by knowing where objects stand."""

from collections.abc import Sequence

import numpy as np

from vpd_jax.errors import UserError


def best_constant(masks: Sequence[np.ndarray]) -> np.ndarray:
  """The one mask with the highest overall IoU on the given ones, among all masks.

  For a mask M the sum of intersections is the sum over M of c(p), in how many masks pixel p lies, and the sum of unions
  is n |M| + A less that, with n masks of A pixels together. Among masks of one area that with the largest c is best, so
  a threshold on c gives the best of all.

  Args:
    masks: bool or int [H, W] each, of one size, 1 on the object.

  Returns:
    bool [H, W].

  Raises:
    ValueError: there are none, or all are empty, or sizes differ.
  """
  shapes = {mask.shape for mask in masks}
  if len(shapes) > 1:
    raise UserError(f"masks of the sizes {sorted(shapes)} have no best constant mask; resize them to one.")
  counts = sum((mask.astype(bool).astype(np.int64) for mask in masks), np.zeros((), np.int64))
  if not counts.any():
    raise UserError("no training example has an object; check the masks of the data set.")
  falling = np.sort(counts.ravel())[::-1]
  inside = np.cumsum(falling)
  union = len(masks) * np.arange(1, falling.size + 1) + counts.sum() - inside
  best = int((inside / union).argmax())
  return counts >= falling[best]


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[H, W] at another size, by the nearest pixel."""
  rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True))
  return mask[rows[:, None], columns[None]]
