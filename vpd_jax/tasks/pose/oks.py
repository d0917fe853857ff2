"""Object keypoint similarity on the host: rescoring, non-maximum suppression, COCO's average precision.

Source: mmpose 0.x core/post_processing/nms.py, datasets/datasets/top_down/topdown_coco_dataset.py; pycocotools
cocoeval.py, which computes the scores.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from vpd_jax.tasks import finite
from vpd_jax.types import Fields

SCORES = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")  # in pycocotools' order
MAX_DETECTIONS = 20  # people per image in COCO's keypoint evaluation


def similarity(
  points: np.ndarray, others: np.ndarray, area: float | np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
  """Similarity of one prediction to others: the mean over keypoints of exp(-d^2 / (2 (2 sigma)^2 A)).

  A is the mean of both areas. 1 for identical keypoints.

  Args:
    points: float [K, 2 or more], x and y first.
    others: float [N, K, 2 or more].
    area, areas: of the padded boxes, [] and [N].
    sigmas: [K].

  Returns:
    float64 [N].
  """
  squares = ((others[..., :2].astype(np.float64) - points[None, :, :2]) ** 2).sum(-1)  # [N, K]
  mean = (area + np.asarray(areas, np.float64)) / 2 + np.spacing(1)
  return np.exp(-squares / (2 * (2 * np.asarray(sigmas, np.float64)[None]) ** 2 * mean[:, None])).mean(-1)


def suppress(
  points: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: np.ndarray, threshold: float
) -> list[int]:
  """Non-maximum suppression in one image: drops predictions more similar than `threshold` to a better kept one.

  Args:
    points: float [N, K, 2 or more].
    scores, areas: [N].
    sigmas: [K].
    threshold: of the similarity.

  Returns:
    indices of the kept predictions, best first.
  """
  order, kept = np.argsort(-np.asarray(scores), kind="stable"), []
  while len(order):
    best, order = order[0], order[1:]
    kept.append(int(best))
    order = order[similarity(points[best], points[order], areas[best], areas[order], sigmas) <= threshold]
  return kept


def rescored(box_scores: np.ndarray, joint_scores: np.ndarray, threshold: float) -> np.ndarray:
  """Score of each person: the box score times the mean of the keypoint scores above `threshold`, or 0 without any.

  Args:
    box_scores: [N].
    joint_scores: [N, K].
    threshold: minimum score of a keypoint, exclusive.

  Returns:
    float64 [N].
  """
  joint_scores = np.nan_to_num(np.asarray(joint_scores, np.float64), posinf=0)
  counted = joint_scores > threshold
  total = np.where(counted, joint_scores, 0).sum(-1)
  return np.asarray(box_scores, np.float64) * total / np.maximum(counted.sum(-1), 1)


def detections(
  points: np.ndarray,
  scores: np.ndarray,
  areas: np.ndarray,
  pictures: np.ndarray,
  *,
  sigmas: np.ndarray,
  threshold: float,
  image_ids: Sequence[int],
  category: int,
) -> list[Fields]:
  """Entries of a COCO results file, image by image, after non-maximum suppression.

  Args:
    points: float [N, K, 3], x, y, score.
    scores, areas: [N], of the persons.
    pictures: int [N], index of the image.
    sigmas, threshold: see `suppress`.
    image_ids: COCO's id of each image.
    category: COCO's id of the category.

  Values that are not finite become 0, since pycocotools 2.0.11 treats a similarity of NaN as a match.
  """
  points, scores, areas = finite.points(points)[0], np.nan_to_num(scores, posinf=0), np.nan_to_num(areas, posinf=0)
  entries = []
  for picture in np.unique(pictures):
    indices = np.flatnonzero(pictures == picture)
    for i in indices[suppress(points[indices], scores[indices], areas[indices], sigmas, threshold)]:
      entries.append(
        {
          "image_id": image_ids[int(picture)],
          "category_id": category,
          "keypoints": [float(number) for number in points[i].ravel()],
          "score": float(scores[i]),
        }
      )
  return entries


def coco_scores(truth: Fields, entries: list[Fields], sigmas: np.ndarray) -> dict[str, float]:
  """COCO's keypoint scores over all images of the truth, including those without people.

  Args:
    truth: a COCO file's content: "images", "annotations", "categories".
    entries: of a results file; may be empty.
    sigmas: [K].

  Returns:
    the defined SCORES, each in [0, 1]: M and L require medium and large people in the truth.
  """
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each step
    ground_truth = cast(Any, COCO())
    ground_truth.dataset = {"info": {}} | truth  # pycocotools 2.0.10 requires "info"
    ground_truth.createIndex()
    if entries:
      results = ground_truth.loadRes([dict(entry) for entry in entries])
    else:
      results = cast(Any, COCO())
      results.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": []}
      results.createIndex()
    evaluation = COCOeval(ground_truth, results, "keypoints")
    evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, np.float64)
    evaluation.params.maxDets = [MAX_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
  return {name: float(value) for name, value in zip(SCORES, evaluation.stats, strict=True) if value >= 0}
