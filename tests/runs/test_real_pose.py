"""COCO keypoints on real files, no network: annotated people and a detector's boxes through the whole evaluation.

VPD_REAL=FOLDER must name a folder with coco/ in it: a few pictures, their annotations and detections:
VPD_REAL=FOLDER python -m pytest -m slow -s tests/runs/test_real_pose.py
"""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from tests.helpers import coco_people
from tests.helpers.coco_runs import coco
from tests.helpers.coco_scores import directly
from vpd_jax.data import pipeline
from vpd_jax.data.datasets.coco_pose import CocoPose
from vpd_jax.data.transforms.top_down import COCO
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import predict_folder
from vpd_jax.tasks.pose import heatmaps
from vpd_jax.tasks.pose.task import Pose
from vpd_jax.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root():
  folder = os.environ.get("VPD_REAL")
  if not folder:
    pytest.skip("VPD_REAL=FOLDER must name the folder that holds coco/")
  return pathlib.Path(folder) / "coco"


def evaluated(data, task, size, keypoints_of=None):
  """Rows of the evaluation's own batches, with heatmaps of the annotated keypoints in place of a network's."""

  @jax.jit
  def measure(batch):
    maps, _ = heatmaps.targets(batch["keypoints"], data.augmentation.crop, size, sigma=task.sigma, udp=task.udp)
    return task.measure(maps, batch)

  rows = []
  for batch in pipeline.eval_batches(data, batch_size=4, keys=data.provides):
    batch = keypoints_of(batch) if keypoints_of else batch
    measured = jax.device_get(measure({key: batch[key] for key in Pose.needs}))
    rows.append({key: value[batch["real"]] for key, value in measured.items()})
  return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("crop, sigma", [((256, 192), 2), ((384, 288), 3), ((512, 384), 4), ((1024, 768), 6)])
@pytest.mark.parametrize("udp", [True, False])
def test_annotated_keypoints_through_heatmaps_and_back_score_above_99(root, crop, sigma, udp):
  data = CocoPose(root=str(root), crop=crop, udp=udp, boxes="annotated", complete=False)
  task = Pose(keypoints=COCO, udp=udp, sigma=sigma)
  rows, truth = evaluated(data, task, tuple(side // 4 for side in crop)), data.truth("eval")
  scores = task.summarize(rows, truth)
  print(f"crop {crop}, sigma {sigma}, udp {udp}: {scores}")
  assert scores["people"] == 7 and scores["AP"] > 0.99, scores
  np.testing.assert_allclose(scores["AP"], directly(truth, task.results(rows, truth))[0])


def test_boxes_of_the_detector_run_to_the_results_file(root, tmp_path):
  """Each detection gets the annotated keypoints of the person it overlaps most: the best that any network could do."""
  data = CocoPose(root=str(root), complete=False)
  task, truth = Pose(keypoints=COCO), data.truth("eval")
  source = data.source("eval")
  assert len(source) == 81

  def nearest(batch):
    points = batch["keypoints"].copy()
    for row, (center, extent, picture) in enumerate(
      zip(batch["center"], batch["extent"], batch["image_index"], strict=True)
    ):
      own = [p for p in truth["annotations"] if p["image_id"] == truth["images"][int(picture)]["id"]]
      middle = lambda person: np.array(person["bbox"][:2]) + np.array(person["bbox"][2:]) / 2
      best = min(
        own, key=lambda person: np.abs(middle(person) - center).sum() + abs(person["bbox"][3] - extent[1] / 1.25)
      )
      known = np.array(best["keypoints"], np.float32).reshape(17, 3)
      place = (known[:, :2] - center + extent / 2) / extent * (np.array([192, 256]) - 1)
      points[row] = np.concatenate([place, np.ones((17, 1))], 1) * (known[:, 2:] > 0)
    return {**batch, "keypoints": points}

  rows = evaluated(data, task, (64, 48), nearest)
  path = task.write_results(tmp_path / "results.json", rows, truth)
  entries = json.loads(path.read_text())
  scores = task.summarize(rows, truth)
  print(f"{len(entries)} of 81 detections are left: {scores}")
  assert 7 <= len(entries) < 81  # doubles are gone
  np.testing.assert_allclose(scores["AP"], directly(truth, entries)[0])
  assert scores["AP"] > 0.8, scores


def test_the_commands_run_on_them_from_boxes_to_skeletons(root, tmp_path):
  """One step on made-up people, so the scores mean nothing; every detection ends in the file or is a double."""
  train.run(coco(coco_people.write(tmp_path / "made"), num_steps=1, eval_every=2), str(tmp_path / "run"))
  scores = evaluate.run(coco(root), str(tmp_path / "run"))
  entries = json.loads((tmp_path / "run" / "results.json").read_text())
  truth = CocoPose(root=str(root), crop=(64, 64), complete=False).truth("eval")
  names = {image["id"]: image["file_name"] for image in truth["images"]}
  assert {entry["image_id"] for entry in entries} == set(names) and len(entries) <= 81
  np.testing.assert_allclose(scores["eval/coco_pose/AR"], directly(truth, entries)[5])
  found = json.loads((root / "person_detection_results/COCO_val2017_detections_AP_H_56_person.json").read_text())
  sure = [d for d in found if d["category_id"] == 1 and d["score"] > 0.5 and d["image_id"] in names]
  boxes = [{"file_name": names[d["image_id"]], "bbox": d["bbox"], "score": d["score"]} for d in sure]
  (tmp_path / "boxes.json").write_text(json.dumps(boxes))
  source = {"source": str(root / "val2017"), "output": str(tmp_path / "out")}
  assert predict_folder.run(coco(root), str(tmp_path / "run"), boxes=str(tmp_path / "boxes.json"), **source) == 3
  people = [json.loads(path.read_text())["people"] for path in (tmp_path / "out").glob("*.json")]
  assert sum(map(len, people)) == len(sure) >= 7
