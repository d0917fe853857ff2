"""Object keypoint similarity on the host: rescoring, suppression of doubles, COCO's average precision.

Source: mmpose 0.x core/post_processing/nms.py, datasets/datasets/top_down/topdown_coco_dataset.py; pycocotools
cocoeval.py, which makes the scores.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from vpd_jax.tasks import finite
from vpd_jax.types import Fields

SCORES = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")  # in pycocotools' order
MOST = 20  # people per picture that COCO's keypoint scores look at


def similarity(
  points: np.ndarray, others: np.ndarray, area: float | np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
  """Similarity of one prediction with others: the mean over keypoints of exp(-d^2 / (2 (2 sigma)^2 A)).

  A is the mean of both areas. 1 where they are the same.

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
  """Which predictions of one picture stay, best first: those no more similar than `threshold` to a better one kept.

  Args:
    points: float [N, K, 2 or more].
    scores, areas: [N].
    sigmas: [K].
    threshold: of the similarity.
  """
  order, kept = np.argsort(-np.asarray(scores), kind="stable"), []
  while len(order):
    best, order = order[0], order[1:]
    kept.append(int(best))
    order = order[similarity(points[best], points[order], areas[best], areas[order], sigmas) <= threshold]
  return kept


def rescored(box_scores: np.ndarray, joint_scores: np.ndarray, threshold: float) -> np.ndarray:
  """Score of each person: that of the box times the mean of the keypoints' scores above `threshold`, 0 where none is.

  Args:
    box_scores: [N].
    joint_scores: [N, K].
    threshold: which keypoints count.

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
  """Entries of a COCO results file, picture by picture, doubles suppressed.

  Args:
    points: float [N, K, 3], x, y, score.
    scores, areas: [N], of the persons.
    pictures: int [N], number of the picture.
    sigmas, threshold: see `suppress`.
    image_ids: COCO's id of each picture.
    category: COCO's id of the category.

  What is not finite becomes 0: pycocotools 2.0.11 takes a similarity of NaN for a match.
  """
  points, scores, areas = finite.points(points)[0], np.nan_to_num(scores, posinf=0), np.nan_to_num(areas, posinf=0)
  entries = []
  for picture in np.unique(pictures):
    own = np.flatnonzero(pictures == picture)
    for i in own[suppress(points[own], scores[own], areas[own], sigmas, threshold)]:
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
  """COCO's keypoint scores over all pictures of the truth, those without people included.

  Args:
    truth: a COCO file's content: "images", "annotations", "categories".
    entries: of a results file; they may be none.
    sigmas: [K].

  Returns:
    those of SCORES that are defined, each in [0, 1]: M and L need medium and large people in the truth.
  """
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  with contextlib.redirect_stdout(io.StringIO()):  # it prints each step
    known = cast(Any, COCO())
    known.dataset = {"info": {}} | truth  # pycocotools 2.0.10 copies it without asking whether it is there
    known.createIndex()
    if entries:
      found = known.loadRes([dict(entry) for entry in entries])
    else:
      found = cast(Any, COCO())
      found.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": []}
      found.createIndex()
    evaluation = COCOeval(known, found, "keypoints")
    evaluation.params.kpt_oks_sigmas = np.asarray(sigmas, np.float64)
    evaluation.params.maxDets = [MOST]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
  return {name: float(value) for name, value in zip(SCORES, evaluation.stats, strict=True) if value >= 0}
