"""Depth in color with a bar in meters, and panels for evaluation."""

import numpy as np

from vpd_jax.tasks import colormaps, drawing


def colored(depth: np.ndarray, contours: float = 0.0) -> np.ndarray:
  """A depth map in color, scaled to its range, with a color bar in meters at its right.

  Args:
    depth: float [H, W], meters; values that are not positive and finite are gray. Without valid values there is no bar.
    contours: meters between contour lines; 0: none.

  Returns:
    uint8 [H, W', 3].
  """
  picture, span = colormaps.color_depth(depth), colormaps.depth_span([depth])
  if not span:
    return picture
  picture = drawing.contours(picture, depth, contours) if contours else picture
  return with_bar(picture, *span)


def with_bar(picture: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
  """Adds a color bar in meters at the right of a depth image, uint8 [H, W, 3]: uint8 [H, W', 3]."""
  return np.concatenate([picture, drawing.color_bar(nearest, farthest, colormaps.DEPTH, picture.shape[:2])], axis=1)


def painted(
  prediction: np.ndarray, truth: np.ndarray, span: tuple[float, float], largest_error: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Prediction, truth and error of one image in color: uint8 [H, W, 3] each.

  Prediction and truth share one scale, near red to far blue. The error |prediction - truth| runs from black (0) to
  light yellow at `largest_error` and beyond. Pixels without a value are gray.

  Args:
    prediction: float [H, W], meters.
    truth: float [H, W], meters; 0 or NaN marks a pixel without ground truth.
    span: depth of the first and of the last color, meters.
    largest_error: meters.
  """
  truth = np.where(np.isfinite(truth) & (truth > 0), truth, np.nan)
  paint = lambda depth: colormaps.color_depth(depth, span[1], min_depth=span[0])
  error = colormaps.paint(np.abs(prediction - truth), 0.0, largest_error, colormaps.ERROR)
  return paint(prediction), paint(truth), error


def panel(
  image: np.ndarray, prediction: np.ndarray, truth: np.ndarray, span: tuple[float, float], largest_error: float
) -> np.ndarray:
  """Input, truth, prediction and error of one image, side by side below their titles, with bars in meters.

  Args:
    image: uint8 [H, W, 3].
    prediction, truth, span, largest_error: see `painted`.

  Returns:
    uint8 [H + h, W', 3], W' above 4 W.
  """
  size = truth.shape
  prediction, truth, error = painted(prediction, truth, span, largest_error)
  return drawing.row(
    [
      ("input", image),
      ("truth", truth),
      ("prediction", prediction),
      ("", drawing.color_bar(*span, colormaps.DEPTH, size)),
      ("error", error),
      ("", drawing.color_bar(0.0, largest_error, colormaps.ERROR, size)),
    ]
  )
