"""Keypoints of people in pictures of any size: one crop for each box, crops in calls of few shapes."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpd_jax.errors import UserError
from vpd_jax.files import reading
from vpd_jax.types import Array, Example

Predict = Callable[[Any, dict[str, Array]], Array]  # weights and batch of n crops to heatmaps [n, h, w, K]


class PersonSource(NamedTuple):
  """The people of one picture.

  Attributes:
    keypoints: float32 [N, K, 3], x and y in the picture, score.
    boxes: float32 [N, 4], x, y, width, height.
    scores: float32 [N], of the boxes times the mean of the keypoints' that count.
  """

  keypoints: np.ndarray
  boxes: np.ndarray
  scores: np.ndarray


def whole(image: np.ndarray) -> np.ndarray:
  """The box float32 [1, 4] of a picture that shows one person."""
  return np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32)


def check_boxes(boxes: Any, size: tuple[int, int], what: str) -> np.ndarray:
  """Boxes float32 [N, 5], x, y, width, height, score, of which N may be 0.

  Args:
    boxes: N of 4 or 5 numbers each; the fifth is the score, else 1.
    size: (H, W) of the picture.
    what: for messages.

  Raises:
    ValueError: other shapes, numbers that are not finite, boxes without area or outside the picture (all are named).
  """
  number = lambda value: isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
  try:
    rows = [box.tolist() if isinstance(box, np.ndarray | Array) else list(box) for box in boxes]
    if not all(number(value) for row in rows for value in row):
      raise TypeError
    # One may have a score and another not.
    array = np.asarray([[*row, *(1.0,) * (len(row) == 4)] for row in rows] or np.zeros((0, 5)), np.float32)
  except (TypeError, ValueError, OverflowError):
    array = np.zeros((0, 0))
  if array.ndim != 2 or array.shape[1] != 5 or not np.isfinite(array).all():
    raise UserError(f"boxes of {what} must be lists of x, y, width, height and, if known, a score: finite numbers.")
  x, y, width, height = array[:, :4].T
  inside = (width > 0) & (height > 0) & (x < size[1]) & (y < size[0]) & (x + width > 0) & (y + height > 0)
  if not inside.all():
    wrong = ", ".join(str(array[i, :4].tolist()) for i in np.flatnonzero(~inside)[:10])
    raise UserError(
      f"boxes of {what}, {size[1]} x {size[0]} pixels: {np.sum(~inside)} have no area or lie outside: {wrong}."
    )
  return array


def read_boxes(path: str | Path) -> dict[str, list[list[float]]]:
  """Boxes by the name of the picture: a JSON object {"name.jpg": [[x, y, width, height, score], ..]}, scores at will.

  Also a list of {"file_name", "bbox", "score"}, the form of COCO's detections with names for ids.

  Raises:
    ValueError: missing, or of another form; names the file.
  """
  content = reading.read_json(path, called=f"boxes {str(path)!r}")
  if isinstance(content, list) and all(map(_is_entry, content)):
    result: dict[str, list[list[float]]] = {}
    for entry in content:
      result.setdefault(entry["file_name"], []).append([*entry["bbox"], entry.get("score", 1.0)])
    return result
  if isinstance(content, dict) and all(isinstance(boxes, list) for boxes in content.values()):
    return content
  raise UserError(
    f'boxes {str(path)!r} must be an object {{"name.jpg": [[x, y, width, height], ..]}}, or a list of objects with '
    "file_name, bbox and score."
  )


def _is_entry(entry: Any) -> bool:
  """Whether this is one of {"file_name", "bbox", "score"}; the numbers are checked with their picture."""
  return isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and isinstance(entry.get("bbox"), list)


class TopDownPoseEstimator:
  """Keypoints of the people in pictures, given their boxes."""

  def __init__(
    self,
    predict: Predict,
    crop: Callable[[Example], Example],
    locate: Callable[[Array, Array, Array], Array],
    *,
    keypoints: int,
    rescore: Callable[[np.ndarray, np.ndarray], np.ndarray],
    at_once: int = 8,
  ):
    """
    Args:
      predict: compiled; weights and {"image": uint8 [n, H, W, 3]} to heatmaps.
      crop: an example with "image", "keypoints" [K, 3], "box" and "box_score" to one with "image" uint8 [H, W, 3],
        "center" and "extent", as in evaluation.
      locate: compiled; heatmaps, center [n, 2], extent [n, 2] to keypoints [n, K, 3] in the picture.
      keypoints: K.
      rescore: scores of boxes [N] and keypoints' [N, K] to scores of people [N].
      at_once: the largest n; where there are fewer people it is the power of two above their number.
    """
    self._predict, self._crop, self._locate = predict, crop, locate
    self._keypoints, self._rescore, self._at_once = keypoints, rescore, at_once

  def __call__(self, weights: Any, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[PersonSource]:
    """The people of each picture, in the order of its boxes; none are left out.

    Args:
      weights: for `predict`.
      images: uint8 [H, W, 3] each.
      boxes: of `check_boxes`, float32 [N, 5], for each picture.
    """
    found = [np.zeros((len(own), self._keypoints, 3), np.float32) for own in boxes]
    places = [(i, j) for i, own in enumerate(boxes) for j in range(len(own))]
    size = min(self._at_once, 1 << max(len(places) - 1, 0).bit_length())  # few sizes, so few programs
    for begin in range(0, len(places), size):
      chosen = places[begin : begin + size]
      crops = self._crops([(images[i], boxes[i][j]) for i, j in chosen], size)
      heatmaps = self._predict(weights, {"image": crops["image"]})
      located = np.asarray(self._locate(heatmaps, crops["center"], crops["extent"]))
      for (i, j), points in zip(chosen, located, strict=False):
        found[i][j] = points
    return [
      PersonSource(points, own[:, :4], self._rescore(own[:, 4], points[..., 2]).astype(np.float32))
      for points, own in zip(found, boxes, strict=True)
    ]

  def _crops(self, chosen: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> dict[str, Any]:
    """A batch of that size, filled by repeating its last crop."""
    zero = np.int32(0)
    nothing = {"keypoints": np.zeros((self._keypoints, 3), np.float32), "image_index": zero, "index": zero}
    made = [self._crop({"image": im, "box": box[:4], "box_score": box[4], **nothing}) for im, box in chosen]
    made += made[-1:] * (size - len(made))
    return {key: np.stack([one[key] for one in made]) for key in ("image", "center", "extent")}
