"""Color maps for pictures of depth."""

import functools
from collections.abc import Iterable

import numpy as np

INVALID = (128, 128, 128)  # gray: neither end of a color map in use
DEPTH, ERROR = "Spectral", "magma"  # near red to far blue; none black to large light yellow


def stacked(pictures: list[np.ndarray]) -> np.ndarray:
  """uint8 [N, H, W, 3] of pictures of any sizes, gray at the right and bottom of smaller ones; N may be 0."""
  height, width = (max((p.shape[axis] for p in pictures), default=1) for axis in (0, 1))
  result = np.full((len(pictures), height, width, 3), INVALID[0], np.uint8)
  for row, picture in zip(result, pictures, strict=True):
    row[: picture.shape[0], : picture.shape[1]] = picture
  return result


def color_depth(depth: np.ndarray, max_depth: float | None = None, *, min_depth: float | None = None) -> np.ndarray:
  """A depth map in color, near red to far blue.

  Args:
    depth: float [H, W]; what is not positive and finite is painted gray.
    max_depth: depth of the last color, which also holds for what lies beyond; None: the largest of this map.
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
  """The smallest and the largest depth of several maps that is positive and finite; None where there is none."""
  known = [depth[_valid(depth)] for depth in maps]
  known = [values for values in known if values.size]
  return (float(min(map(np.min, known))), float(max(map(np.max, known)))) if known else None


def paint(values: np.ndarray, low: float, high: float, colors: str) -> np.ndarray:
  """Values through one of matplotlib's color maps.

  Args:
    values: float [...]; NaN is painted gray, what lies outside the ends is painted as the nearer end.
    low: value of the first color.
    high: value of the last color.
    colors: name of the map.

  Returns:
    uint8 [..., 3].
  """
  known = ~np.isnan(values)
  fraction = (np.where(known, values, low) - low) / max(high - low, 1e-12)
  painted = _color_table(colors)[np.round(255 * fraction.clip(0, 1)).astype(np.uint8)]
  return np.where(known[..., None], painted, np.array(INVALID, np.uint8))


def _valid(depth: np.ndarray) -> np.ndarray:
  """Positive and finite."""
  return np.isfinite(depth) & (depth > 0)


@functools.cache
def _color_table(colors: str) -> np.ndarray:
  """uint8 [256, 3]; matplotlib is imported here, at the first picture."""
  import matplotlib

  return np.round(255 * matplotlib.colormaps[colors](np.arange(256))[:, :3]).astype(np.uint8)
