"""Test-time protocols: predictions for images of any size from a network with a fixed input size.

A protocol is called with the weights, the images, and a dict for each image with the other inputs of the network
("class_id", "tokens") and, for poses, the "boxes" of its people. It returns or yields a dict of results for each image,
in order. `input_size` is the (height, width) of the network's input, and `preprocessing` describes the protocol in
words, for exported networks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.data.readers import referring
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.evaluation import evaluate
from vpd_jax.experiment import Experiment
from vpd_jax.inference import images as images_lib
from vpd_jax.inference import sliding_window, top_down, tta
from vpd_jax.types import Array, DecidingTask, Fields, TopDownTask, Weights

Inputs = Sequence[Fields]  # by image
Results = list[dict[str, np.ndarray]]


class ShiftedWindowProtocol:
  """Resizes the shorter side to the training crop, merges square windows along the longer one, and resizes back.

  Overlapping windows are averaged, with smooth weights if `eval.blend` is "smooth". The number of windows is that of
  `eval.test_time`, or as many as are needed to cover the image. With "halves:N" in `eval.test_time`, the network
  predicts two halves of the resized image instead, as in evaluation, and is compiled for each size of images. Rows that
  the data set crops off its images (the top of KITTI's) are NaN.
  """

  preprocessing = (
    "crop the top rows that the data set crops (KITTI); resize so that the shorter side is that of the input (area "
    "averaging when shrinking, otherwise bilinear); cover the longer side with windows of the input's size; average "
    "the predictions where windows overlap, weighted by sin^2 of the position in the window if eval.blend is 'smooth'; "
    "with 'flip' in eval.test_time, also average with the prediction of the flipped image; resize back bilinearly"
  )
  preprocessing_of_halves = (
    "crop the top rows that the data set crops (KITTI); resize so that the height is that of the input (area averaging "
    "when shrinking, otherwise bilinear); predict the left and the right half, which share the N columns of 'halves:N' "
    "in eval.test_time (their width depends on the image; the exported input has the width of data.crop); blend the "
    "predictions linearly in the shared columns; with 'flip' in eval.test_time, also average with the prediction of "
    "the flipped image; resize back bilinearly"
  )

  def __init__(self, config: ConfigDict, exp: Experiment):
    flip, self._windows, self._overlap = tta.parse(config.eval.test_time)
    words = config.eval.test_time if self._overlap else ("flip",) if flip else ()
    self._predict = jax.jit(evaluate.make_predict(exp, words, "full"))
    self._side, self._result = int(config.data.crop[0]), exp.task.result
    self._smooth = config.eval.blend == "smooth"
    self.input_size = tuple(config.data.crop) if self._overlap else (self._side, self._side)
    self.preprocessing = self.preprocessing_of_halves if self._overlap else self.preprocessing
    self._batch_size = _batch_size(config)
    self._cut_top = experiment.DATASETS[config.data.name].info(config.data).cut_top
    self._dtype = _dtype(config)

  def __call__(self, weights: Weights, images: Sequence[np.ndarray], inputs: Inputs) -> Results:
    images = [images_lib.to_float(image, self._dtype) for image in images]
    tops = [self._cut_top(image.shape[:2]) for image in images]
    fitted = [images_lib.resize_shorter_side(image[top:], self._side) for image, top in zip(images, tops, strict=True)]
    rows = [{**row, "image": resized} for resized, row in zip(fitted, inputs, strict=True)]
    predicted = self._halved(weights, rows) if self._overlap else self._windowed(weights, rows)
    results = []
    for image, top, merged in zip(images, tops, predicted, strict=True):
      full = np.full((*image.shape[:2], *merged.shape[2:]), np.nan, np.float32)
      full[top:] = images_lib.resize(merged, image[top:].shape[:2])
      results.append({self._result: full})
    return results

  def _halved(self, weights: Weights, rows: Sequence[Fields]) -> Iterator[np.ndarray]:
    """The predictions of resized images from two halves."""
    return (_in_batches(self._predict, weights, [row], 1)[0] for row in rows)

  def _windowed(self, weights: Weights, rows: Sequence[Fields]) -> Iterator[np.ndarray]:
    """The predictions of resized images from square windows."""
    corners = [tta.offsets(row["image"].shape[:2], self._windows, coverage="full") for row in rows]
    windows = [
      {**row, "image": window}
      for row, offsets in zip(rows, corners, strict=True)
      for window in tta.cut(row["image"][None], offsets)
    ]
    predicted = iter(_in_batches(self._predict, weights, windows, self._batch_size))
    for row, offsets in zip(rows, corners, strict=True):
      parts = np.stack([next(predicted) for _ in offsets])
      yield tta.merge(parts, offsets, row["image"].shape[:2], smooth=self._smooth)[0]


class SlidingWindowProtocol:
  """Classifies every pixel with sliding windows and scales, see inference/sliding_window.py."""

  preprocessing = (
    "resize the image to each scale of eval.test_time; cover it with overlapping windows of the input's size; average "
    "the scores where windows overlap; resize them back bilinearly; average their softmax over scales and, with "
    "'flip' in eval.test_time, flipped images"
  )

  def __init__(self, config: ConfigDict, exp: Experiment):
    test_time = config.eval.test_time
    window = sliding_window.parse(test_time).window
    self.input_size = (window, window) if window else tuple(config.data.crop)
    options = {"batch_size": _batch_size(config), "small_images": config.eval.small_images}
    options["smooth"] = config.eval.blend == "smooth"
    options["postprocess"] = cast(DecidingTask, exp.task).decide
    self._inference = sliding_window.SlidingWindowInference(
      evaluate.make_scores(exp), sliding_window.parse(test_time), **options
    )
    self._result, self._dtype = exp.task.result, _dtype(config)

  def __call__(self, weights: Weights, images: Sequence[np.ndarray], inputs: Inputs) -> Iterator[dict[str, np.ndarray]]:
    # uint8 images are converted after resizing, as in the evaluation.
    arrays = [image if image.dtype == np.uint8 else images_lib.to_float(image, self._dtype) for image in images]
    views = (self._inference.views({"image": image, **row}) for image, row in zip(arrays, inputs, strict=True))
    return ({self._result: label} for label in self._inference(weights, views))


class ResizeProtocol:
  """Resizes to the training crop, ignoring the aspect ratio as in evaluation; scores are resized back, bilinear."""

  preprocessing = "resize the image to the input's size, ignoring the aspect ratio; resize the scores back bilinearly"

  def __init__(self, config: ConfigDict, exp: Experiment):
    self._predict = jax.jit(evaluate.make_predict(exp, (), "full"))
    self._size, self._batch_size = tuple(config.data.crop), _batch_size(config)
    self.input_size = self._size
    task = cast(DecidingTask, exp.task)
    self._decide, self._result = task.decide, task.result

  def __call__(self, weights: Weights, images: Sequence[np.ndarray], inputs: Inputs) -> Results:
    images = [images_lib.to_uint8(image) for image in images]
    resized = [referring.resized_image(image, self._size) for image in images]
    rows = [{**row, "image": image} for image, row in zip(resized, inputs, strict=True)]
    scores = _in_batches(self._predict, weights, rows, self._batch_size)
    sizes = [image.shape[1::-1] for image in images]
    back = [cv2.resize(s, size, interpolation=cv2.INTER_LINEAR) for s, size in zip(scores, sizes, strict=True)]
    return [{self._result: np.asarray(self._decide(cast(Array, s)))} for s in back]


class TopDownProtocol:
  """Crops around each box, see inference/top_down.py; without "boxes" the full image is one person."""

  preprocessing = (
    "one crop per person: extend the box to the input's aspect ratio, enlarge it by data.padding, and warp it to the "
    "input's size; with 'flip' in eval.test_time, also average with the heatmaps of the flipped crop"
  )

  def __init__(self, config: ConfigDict, exp: Experiment):
    self.input_size = tuple(config.data.crop)
    task, padding = cast(TopDownTask, exp.task), config.data.get("padding", top_down_transforms.PADDING)
    crop = top_down_transforms.Augmentation(
      tuple(config.data.crop), task.keypoints, udp=task.udp, padding=padding
    ).evaluation
    predict = jax.jit(evaluate.make_predict(exp, config.eval.test_time, ""))
    self._estimator = top_down.TopDownPoseEstimator(
      predict,
      crop,
      jax.jit(task.locate),
      keypoints=len(exp.classes),
      rescore=task.rescored,
      batch_size=config.eval.batch_size,
    )

  def __call__(self, weights: Weights, images: Sequence[np.ndarray], inputs: Inputs) -> Results:
    images = [images_lib.to_uint8(image) for image in images]
    checked = []
    for image, row in zip(images, inputs, strict=True):
      boxes = row["boxes"] if "boxes" in row else top_down.full_image_box(image)
      checked.append(top_down.check_boxes(boxes, image.shape[:2], row.get("image_name", "the image")))
    others = [{name: value for name, value in row.items() if name not in ("boxes", "image_name")} for row in inputs]
    return [people._asdict() for people in self._estimator(weights, images, checked, others)]


PROTOCOLS = {
  "windows": ShiftedWindowProtocol,
  "sliding": SlidingWindowProtocol,
  "squeezed": ResizeProtocol,
  "crops": TopDownProtocol,
}


def _batch_size(config: ConfigDict) -> int:
  """Windows per call of the network: `eval.batch_size`; on CPUs one, since more take memory and save no time."""
  return 1 if jax.default_backend() == "cpu" else config.eval.batch_size


def _dtype(config: ConfigDict) -> np.dtype:
  return np.promote_types(experiment.dtype(config, "param_dtype"), np.float32)


def _in_batches(predict: Callable, weights: Weights, rows: Sequence[Fields], batch_size: int) -> list[np.ndarray]:
  """The prediction of each row, in batches of one static size of at most `batch_size`; the last one is padded."""
  if not rows:
    return []
  size = min(batch_size, 1 << (len(rows) - 1).bit_length())  # few sizes, to compile few programs
  results = []
  for begin in range(0, len(rows), size):
    chosen = [rows[min(i, len(rows) - 1)] for i in range(begin, begin + size)]
    batch = {name: jnp.asarray(np.stack([row[name] for row in chosen])) for name in chosen[0]}
    results += list(np.asarray(predict(weights, batch)))
  return results[: len(rows)]
