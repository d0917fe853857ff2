"""Weights of overlapping windows, `eval.blend`: of sliding windows (sliding_window.py) and of shifted ones (tta.py)."""

from typing import Any, TypeVar, cast

import jax.numpy as jnp
import numpy as np

from vpd_jax.types import Array

Positions = TypeVar("Positions", np.ndarray, Array)

# The plain mean of overlapping windows, as published, or weights that fade toward a window's borders, which shows no
# seam.
BLENDS = ("mean", "smooth")


def smooth_profile(positions: Positions, length: int | Array) -> Positions:
  """Weights along one axis of a window whose prediction fades out toward both ends: sin^2, never 0 inside.

  Args:
    positions: 0 .. length - 1, an array; weights of positions outside are undefined.
    length: of the window.
  """
  xp = cast(Any, np if isinstance(positions, np.ndarray) else jnp)
  # Measured from the nearer end: near pi the sine of a float32 is inaccurate.
  nearer = xp.minimum(positions, length - 1 - positions)
  return xp.sin(np.pi / 2 * (2 * nearer + 1) / length) ** 2


def overlap_weights(starts: list[int], length: int, side: int, *, smooth: bool = False) -> np.ndarray:
  """1 / sum of the windows' weights at each position of an axis: float32 [side].

  Args:
    starts: first positions of the windows.
    length: of a window.
    side: of the axis.
    smooth: the weights are those of `smooth_profile`, else 1, and the sum is the number of windows.
  """
  total = np.zeros(side)
  for start in starts:
    total[start : start + length] += smooth_profile(np.arange(length), length) if smooth else 1
  return (1 / np.where(total > 0, total, 1)).astype(np.float32)
