"""Top-down pose estimation in images of any size: one crop per person box, crops in batches of few sizes."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpd_jax.errors import UserError, first_items
from vpd_jax.files import reading
from vpd_jax.types import Array, Example, Fields, Weights

Predict = Callable[[Weights, dict[str, Array]], Array]  # weights and batch of n crops to heatmaps [n, h, w, K]


class ImagePoses(NamedTuple):
  """The poses of the people in one image.

  Attributes:
    keypoints: float32 [N, K, 3], (x, y) in pixels of the image, and score.
    boxes: float32 [N, 4], x, y, width, height.
    scores: float32 [N], of the people, computed by `rescore`.
  """

  keypoints: np.ndarray
  boxes: np.ndarray
  scores: np.ndarray


def full_image_box(image: np.ndarray) -> np.ndarray:
  """The box of the whole image, float32 [1, 4] of x, y, width, height."""
  return np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32)


def check_boxes(boxes: Any, size: tuple[int, int], what: str) -> np.ndarray:
  """Validates boxes, and returns them as float32 [N, 5] of x, y, width, height, score; N may be 0.

  Args:
    boxes: N lists of 4 or 5 numbers; the fifth is the score, 1 by default.
    size: (H, W) of the image.
    what: name of the image for messages.

  Raises:
    ValueError: another shape, numbers that are not finite, boxes without area or outside the image (lists them).
  """
  number = lambda value: isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
  try:
    rows = [box.tolist() if isinstance(box, np.ndarray | Array) else list(box) for box in boxes]
    if not all(number(value) for row in rows for value in row):
      raise TypeError
    # Scores may be given for some boxes only.
    array = np.asarray([[*row, *(1.0,) * (len(row) == 4)] for row in rows] or np.zeros((0, 5)), np.float32)
  except (TypeError, ValueError, OverflowError):
    array = np.zeros((0, 0))
  if array.ndim != 2 or array.shape[1] != 5 or not np.isfinite(array).all():
    raise UserError(f"boxes of {what} must be lists of x, y, width, height and an optional score: finite numbers.")
  x, y, width, height = array[:, :4].T
  inside = (width > 0) & (height > 0) & (x < size[1]) & (y < size[0]) & (x + width > 0) & (y + height > 0)
  if not inside.all():
    wrong = first_items(array[~inside, :4].tolist())
    raise UserError(
      f"boxes of {what}, {size[1]} x {size[0]} pixels: {np.sum(~inside)} have no area or lie outside: {wrong}."
    )
  return array


def read_boxes(path: str | Path) -> dict[str, list[list[float]]]:
  """Reads boxes by image name: a JSON object {"name.jpg": [[x, y, width, height, score], ..]} (score optional).

  A list of {"file_name", "bbox", "score"}, COCO's detection format with file names for ids, is accepted too.

  Raises:
    ValueError: a missing file, or another format; names the file.
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


def _is_entry(entry: object) -> bool:
  """Whether this is {"file_name", "bbox", "score"}; `check_boxes` validates the numbers."""
  return isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and isinstance(entry.get("bbox"), list)


class TopDownPoseEstimator:
  """Estimates the keypoints of people, given their boxes."""

  def __init__(
    self,
    predict: Predict,
    crop: Callable[[Example], Example],
    locate: Callable[[Array, Array, Array], Array],
    *,
    keypoints: int,
    rescore: Callable[[np.ndarray, np.ndarray], np.ndarray],
    batch_size: int = 8,
  ):
    """
    Args:
      predict: compiled; weights and {"image": uint8 [n, H, W, 3]}, plus the `inputs` of a call by name, to heatmaps.
      crop: an example with "image", "keypoints" [K, 3], "box" and "box_score" to one with "image" uint8 [H, W, 3],
        "center" and "extent", as in evaluation.
      locate: compiled; heatmaps, center [n, 2], extent [n, 2] to keypoints [n, K, 3] in the image.
      keypoints: K.
      rescore: scores of boxes [N] and of keypoints [N, K] to scores of people [N].
      batch_size: the largest n; for fewer people it is the next power of two.
    """
    self._predict, self._crop, self._locate = predict, crop, locate
    self._keypoints, self._rescore, self._batch_size = keypoints, rescore, batch_size

  def __call__(
    self,
    weights: Weights,
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    inputs: Sequence[Fields] | None = None,
  ) -> list[ImagePoses]:
    """The poses of the people in each image, one per box and in the order of the boxes.

    Args:
      weights: for `predict`.
      images: uint8 [H, W, 3] each.
      boxes: of `check_boxes`, float32 [N, 5], for each image.
      inputs: what the network reads of each image besides its crops, such as "tokens" int32 [T], the same names for
        all images; None: nothing.
    """
    inputs = [{} for _ in images] if inputs is None else inputs
    keypoints = [np.zeros((len(image_boxes), self._keypoints, 3), np.float32) for image_boxes in boxes]
    indices = [(i, j) for i, image_boxes in enumerate(boxes) for j in range(len(image_boxes))]
    size = min(self._batch_size, 1 << max(len(indices) - 1, 0).bit_length())  # few sizes, to compile few programs
    for begin in range(0, len(indices), size):
      chosen = indices[begin : begin + size]
      crops = self._crops([(images[i], boxes[i][j]) for i, j in chosen], size)
      padded = chosen + chosen[-1:] * (size - len(chosen))
      batch: Fields = {name: np.stack([inputs[i][name] for i, _ in padded]) for name in inputs[chosen[0][0]]}
      heatmaps = self._predict(weights, batch | {"image": crops["image"]})
      located = np.asarray(self._locate(heatmaps, crops["center"], crops["extent"]))
      for (i, j), points in zip(chosen, located, strict=False):
        keypoints[i][j] = points
    return [
      ImagePoses(points, image_boxes[:, :4], self._rescore(image_boxes[:, 4], points[..., 2]).astype(np.float32))
      for points, image_boxes in zip(keypoints, boxes, strict=True)
    ]

  def _crops(self, chosen: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> Fields:
    """A batch of the given size, padded by repeating the last crop."""
    zero = np.int32(0)
    unused = {"keypoints": np.zeros((self._keypoints, 3), np.float32), "image_index": zero, "index": zero}
    crops = [self._crop({"image": im, "box": box[:4], "box_score": box[4], **unused}) for im, box in chosen]
    crops += crops[-1:] * (size - len(crops))
    return {key: np.stack([one[key] for one in crops]) for key in ("image", "center", "extent")}
