"""Pictures of results: color maps for depth, and one row of input, prediction, truth and error."""

import functools

import numpy as np

INVALID = (128, 128, 128)  # gray: neither end of a color map in use


def depth_panel(image: np.ndarray, prediction: np.ndarray, truth: np.ndarray, max_depth: float) -> np.ndarray:
  """Input, prediction, truth and error of one image, side by side.

  Prediction and truth share one color scale, near red to far blue, which spans the valid truth; where no pixel is
  valid it spans 0 to `max_depth`. The error |prediction - truth| runs from black (0) to light yellow at a tenth of
  `max_depth` and beyond. Pixels without a value are gray.

  Args:
    image: uint8 [H, W, 3].
    prediction: float [H, W], metres.
    truth: float [H, W], metres; 0 or NaN marks a pixel without ground truth.
    max_depth: metres.

  Returns:
    uint8 [H, 4 * W, 3].
  """
  truth = np.where(_valid(truth), truth, 0.0)
  low, high = (truth[truth > 0].min(), truth.max()) if truth.any() else (0.0, max_depth)
  error = np.where(_valid(truth), np.abs(prediction - truth), np.nan)
  return np.concatenate(
    [
      image,
      color_depth(prediction, high, min_depth=low),
      color_depth(truth, high, min_depth=low),
      paint(error, 0.0, max_depth / 10, "magma"),
    ],
    axis=1,
  )


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
  depth = np.where(_valid(depth), depth, np.nan)
  known = depth[~np.isnan(depth)]
  low = (known.min() if known.size else 0.0) if min_depth is None else min_depth
  high = (known.max() if known.size else 1.0) if max_depth is None else max_depth
  return paint(depth, low, high, "Spectral")


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
