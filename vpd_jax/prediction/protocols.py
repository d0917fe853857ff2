"""Pictures of any size through a network that takes one: a procedure for each way in which a task is predicted.

A procedure is called with the weights, pictures, and for each picture a dict of what else is known of it: what the
method reads ("class_id", "tokens"), and "boxes" of its people. It gives a dict of results for each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.data.readers import referring
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.evaluation import evaluate
from vpd_jax.experiment import Product
from vpd_jax.inference import image_io as pictures_lib
from vpd_jax.inference import sliding_window, top_down, tta

Known = Sequence[dict[str, Any]]
Results = list[dict[str, np.ndarray]]


class ShiftedWindowProtocol:
  """Resized so that the shorter side is the training crop; square windows along the longer one, averaged; resized back.

  There are as many windows as `eval.test_time` says, and at least as many as cover the picture. Rows that the data set
  takes off its own frames (KITTI's highest) are NaN.
  """

  def __init__(self, config: ConfigDict, product: Product):
    flip, self._windows = tta.parse(config.eval.test_time)
    self._predict = jax.jit(evaluate.make_predict(product, ("flip",) if flip else (), "full"))
    self._side, self._result = int(config.data.crop[0]), product.task.result
    self._most = max(self._windows, config.eval.batch_size)
    self._cut_top = experiment.DATASETS[config.data.name].info(config.data).cut_top
    self._dtype = _dtype(config)

  def __call__(self, weights: Any, images: Sequence[np.ndarray], known: Known) -> Results:
    pictures = [pictures_lib.unit(image, self._dtype) for image in images]
    tops = [self._cut_top(picture.shape[:2]) for picture in pictures]
    fitted = [pictures_lib.fit(picture[top:], self._side) for picture, top in zip(pictures, tops, strict=True)]
    corners = [tta.offsets(f.shape[:2], self._windows, coverage="full") for f in fitted]
    rows = [
      {**own, "image": window}
      for f, c, own in zip(fitted, corners, known, strict=True)
      for window in tta.cut(f[None], c)
    ]
    predicted = iter(_in_calls(self._predict, weights, rows, self._most))
    results = []
    for picture, top, f, c in zip(pictures, tops, fitted, corners, strict=True):
      merged = tta.merge(np.stack([next(predicted) for _ in c]), c, f.shape[:2])[0]
      whole = np.full((*picture.shape[:2], *merged.shape[2:]), np.nan, np.float32)
      whole[top:] = pictures_lib.resized(merged, picture[top:].shape[:2])
      results.append({self._result: whole})
    return results


class SlidingWindowProtocol:
  """Sliding windows and scales, see inference/sliding_window.py: the class of every pixel."""

  def __init__(self, config: ConfigDict, product: Product):
    words, options = config.eval.test_time, {"at_once": config.eval.batch_size, "small": config.eval.small}
    options["decide"] = product.task.decide
    self._labeling = sliding_window.SlidingWindowInference(
      evaluate.make_scores(product), sliding_window.parse(words), **options
    )
    self._result, self._dtype = product.task.result, _dtype(config)

  def __call__(self, weights: Any, images: Sequence[np.ndarray], known: Known) -> Results:
    # Bytes stay bytes until they are resized, as in the evaluation.
    given = [image if image.dtype == np.uint8 else pictures_lib.unit(image, self._dtype) for image in images]
    views = (self._labeling.views({"image": image, **own}) for image, own in zip(given, known, strict=True))
    return [{self._result: label} for label in self._labeling(weights, views)]


class ResizeProtocol:
  """Resized to the training crop, the aspect not kept, as in evaluation; scores resized back, bilinear."""

  def __init__(self, config: ConfigDict, product: Product):
    self._predict = jax.jit(evaluate.make_predict(product, (), "full"))
    self._size, self._most = tuple(config.data.crop), config.eval.batch_size
    self._decide, self._result = product.task.decide, product.task.result

  def __call__(self, weights: Any, images: Sequence[np.ndarray], known: Known) -> Results:
    pictures = [pictures_lib.as_bytes(image) for image in images]
    squeezed = [referring.resized_image(picture, self._size) for picture in pictures]
    rows = [{**own, "image": image} for image, own in zip(squeezed, known, strict=True)]
    scores = _in_calls(self._predict, weights, rows, self._most)
    sizes = [picture.shape[1::-1] for picture in pictures]
    back = [cv2.resize(s, size, interpolation=cv2.INTER_LINEAR) for s, size in zip(scores, sizes, strict=True)]
    return [{self._result: np.asarray(self._decide(s))} for s in back]


class TopDownProtocol:
  """A crop around each box, see inference/top_down.py; a picture of which no "boxes" are known is one person."""

  def __init__(self, config: ConfigDict, product: Product):
    task, padding = product.task, config.data.get("padding", top_down_transforms.PADDING)
    crop = top_down_transforms.Augmentation(
      tuple(config.data.crop), task.keypoints, udp=task.udp, padding=padding
    ).evaluation
    predict = jax.jit(evaluate.make_predict(product, config.eval.test_time, ""))
    self._posing = top_down.TopDownPoseEstimator(
      predict,
      crop,
      jax.jit(task.locate),
      keypoints=len(product.classes),
      rescore=task.rescored,
      at_once=config.eval.batch_size,
    )

  def __call__(self, weights: Any, images: Sequence[np.ndarray], known: Known) -> Results:
    pictures = [pictures_lib.as_bytes(image) for image in images]
    boxes = [own["boxes"] if "boxes" in own else top_down.whole(p) for p, own in zip(pictures, known, strict=True)]
    checked = [
      top_down.check_boxes(b, p.shape[:2], f"image {i}") for i, (b, p) in enumerate(zip(boxes, pictures, strict=True))
    ]
    return [found._asdict() for found in self._posing(weights, pictures, checked)]


PROTOCOLS = {
  "windows": ShiftedWindowProtocol,
  "sliding": SlidingWindowProtocol,
  "squeezed": ResizeProtocol,
  "crops": TopDownProtocol,
}


def _dtype(config: ConfigDict) -> Any:
  return np.promote_types(experiment.dtype(config, "param_dtype"), np.float32)


def _in_calls(predict: Callable, weights: Any, rows: Sequence[dict[str, Any]], most: int) -> list[np.ndarray]:
  """The prediction of each row, in calls of one static size of at most `most`; the last call is filled up."""
  if not rows:
    return []
  size = min(most, 1 << (len(rows) - 1).bit_length())  # few sizes, so few programs
  results = []
  for begin in range(0, len(rows), size):
    chosen = [rows[min(i, len(rows) - 1)] for i in range(begin, begin + size)]
    batch = {name: jnp.asarray(np.stack([row[name] for row in chosen])) for name in chosen[0]}
    results += list(np.asarray(predict(weights, batch)))
  return results[: len(rows)]
