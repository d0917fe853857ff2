"""NaN and infinity among predictions: counted, never right, and in no score and no file."""

from typing import cast

import jax.numpy as jnp
import numpy as np

from vpd_jax.types import Array, Fields, Rows

KEY = "not_finite"  # of the counts, in rows and in scores


def count(prediction: Array) -> Array:
  """Pixels of each image that hold a number that is not finite: [B, H, W] or [B, H, W, K] to int32 [B]."""
  wrong = ~jnp.isfinite(prediction)
  wrong = wrong.any(axis=-1) if prediction.ndim == 4 else wrong
  return wrong.sum(axis=(1, 2), dtype=jnp.int32)


def labels(prediction: Array) -> tuple[dict[str, Array], Array]:
  """Counts by KEY, and the class of every pixel, int [B, H, W]; K, which is no class, where a score is not finite.

  Args:
    prediction: scores float [B, H, W, K]; or classes [B, H, W], which are as they are and have no count.
  """
  if prediction.ndim == 3:
    return {}, prediction
  wrong = ~jnp.isfinite(prediction).all(axis=-1)
  return {KEY: count(prediction)}, jnp.where(wrong, prediction.shape[-1], jnp.argmax(prediction, axis=-1))


def total(rows: Rows) -> dict[str, float]:
  """The counts of all images together, by KEY, for the scores; nothing where rows have none."""
  return {KEY: float(rows[KEY].sum(dtype=np.int64))} if KEY in rows else {}


def points(found: np.ndarray) -> tuple[np.ndarray, int]:
  """Keypoints [..., 3], those that are not finite as x, y and score 0; and how many those are."""
  wrong = cast(np.ndarray, ~np.isfinite(found).all(axis=-1))
  return np.where(wrong[..., None], 0, found), int(wrong.sum())


def ends(values: np.ndarray) -> Fields:
  """{"min", "max"} of the finite values, None where there are none; and by KEY the number of others."""
  known = values[np.isfinite(values)]
  least, most = (float(known.min()), float(known.max())) if known.size else (None, None)
  return {"min": least, "max": most, KEY: int(values.size - known.size)}
