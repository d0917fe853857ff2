"""Color maps for depth images."""

import functools
from collections.abc import Iterable

import numpy as np

INVALID = (128, 128, 128)  # gray, which does not occur in the color maps in use
DEPTH, ERROR = "Spectral", "magma"  # near red to far blue; none black to large light yellow


def stacked(pictures: list[np.ndarray]) -> np.ndarray:
  """Stacks images of any sizes to uint8 [N, H, W, 3], padded with gray at right and bottom; N may be 0."""
  height, width = (max((p.shape[axis] for p in pictures), default=1) for axis in (0, 1))
  result = np.full((len(pictures), height, width, 3), INVALID[0], np.uint8)
  for row, picture in zip(result, pictures, strict=True):
    row[: picture.shape[0], : picture.shape[1]] = picture
  return result


def color_depth(depth: np.ndarray, max_depth: float | None = None, *, min_depth: float | None = None) -> np.ndarray:
  """A depth map in color, near red to far blue.

  Args:
    depth: float [H, W]; values that are not positive and finite become gray.
    max_depth: depth of the last color, also used for larger values; None: the largest of this map.
    min_depth: depth of the first color; None: the smallest of this map.

  Returns:
    uint8 [H, W, 3].
  """
  nearest, farthest = depth_span([depth]) or (0.0, 1.0)
  low = nearest if min_depth is None else min_depth
  high = farthest if max_depth is None else max_depth
  depth = np.where(_valid(depth), depth, np.nan)
  return paint(depth, low, high, DEPTH)


def depth_span(maps: Iterable[np.ndarray]) -> tuple[float, float] | None:
  """The smallest and largest positive and finite depth of several maps; None if there is none."""
  valid = [depth[_valid(depth)] for depth in maps]
  valid = [values for values in valid if values.size]
  return (float(min(map(np.min, valid))), float(max(map(np.max, valid)))) if valid else None


def paint(values: np.ndarray, low: float, high: float, colors: str) -> np.ndarray:
  """Applies one of matplotlib's color maps to values.

  Args:
    values: float [...]; NaN becomes gray, values outside the range get the color of the nearer end.
    low: value of the first color.
    high: value of the last color.
    colors: name of the map.

  Returns:
    uint8 [..., 3].
  """
  valid = ~np.isnan(values)
  fraction = (np.where(valid, values, low) - low) / max(high - low, 1e-12)
  painted = _color_table(colors)[np.round(255 * fraction.clip(0, 1)).astype(np.uint8)]
  return np.where(valid[..., None], painted, np.array(INVALID, np.uint8))


def _valid(depth: np.ndarray) -> np.ndarray:
  """Positive and finite."""
  return np.isfinite(depth) & (depth > 0)


@functools.cache
def _color_table(colors: str) -> np.ndarray:
  """uint8 [256, 3]; imports matplotlib lazily."""
  import matplotlib

  return np.round(255 * matplotlib.colormaps[colors](np.arange(256))[:, :3]).astype(np.uint8)
