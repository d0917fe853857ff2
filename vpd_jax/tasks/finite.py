"""Handling of NaN and infinity in predictions: counted, never correct, and excluded from scores and files."""

from typing import cast

import jax.numpy as jnp
import numpy as np

from vpd_jax.types import Array, Fields, Rows

KEY = "not_finite"  # of the counts in rows and scores


def count(prediction: Array) -> Array:
  """Number of pixels of each image with a value that is not finite: [B, H, W] or [B, H, W, K] to int32 [B]."""
  invalid = ~jnp.isfinite(prediction)
  invalid = invalid.any(axis=-1) if prediction.ndim == 4 else invalid
  return invalid.sum(axis=(1, 2), dtype=jnp.int32)


def labels(prediction: Array) -> tuple[dict[str, Array], Array]:
  """Counts by KEY, and the class of every pixel, int [B, H, W], with K as an invalid class where a score is not finite.

  Args:
    prediction: scores float [B, H, W, K]; or classes [B, H, W], which are returned unchanged without a count.
  """
  if prediction.ndim == 3:
    return {}, prediction
  invalid = ~jnp.isfinite(prediction).all(axis=-1)
  return {KEY: count(prediction)}, jnp.where(invalid, prediction.shape[-1], jnp.argmax(prediction, axis=-1))


def total(rows: Rows) -> dict[str, float]:
  """The total count by KEY, for the scores; empty if rows have no counts."""
  return {KEY: float(rows[KEY].sum(dtype=np.int64))} if KEY in rows else {}


def points(keypoints: np.ndarray) -> tuple[np.ndarray, int]:
  """Keypoints [..., 3] with x, y and score 0 where they are not finite, and the number of these."""
  invalid = cast(np.ndarray, ~np.isfinite(keypoints).all(axis=-1))
  return np.where(invalid[..., None], 0, keypoints), int(invalid.sum())


def ends(values: np.ndarray) -> Fields:
  """{"min", "max"} of the finite values, None if there are none, and by KEY the number of other values."""
  valid = values[np.isfinite(values)]
  least, most = (float(valid.min()), float(valid.max())) if valid.size else (None, None)
  return {"min": least, "max": most, KEY: int(values.size - valid.size)}
