"""Predictions that are not finite: in no score and no file of any task, counted, and never better than right."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import coco_people
from vpd_jax.data.datasets.coco_pose import CocoPose
from vpd_jax.data.transforms.top_down import COCO
from vpd_jax.tasks.depth.task import Depth
from vpd_jax.tasks.pose import heatmaps, oks
from vpd_jax.tasks.pose.task import Pose
from vpd_jax.tasks.referring.task import Referring
from vpd_jax.tasks.segmentation.task import Segmentation

BAD = [np.nan, np.inf, -np.inf]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
  data = CocoPose(root=str(coco_people.write(tmp_path_factory.mktemp("coco"))), complete=False, boxes="annotated")
  source = data.source("eval")
  examples = [data.eval_transform(source[i]) for i in range(len(source))]
  batch = {key: jnp.asarray(np.stack([example[key] for example in examples])) for key in Pose.needs}
  return batch, data.truth("eval")


def made(name, people):
  """(task, perfect prediction, batch, what summarize takes beside)."""
  rng = np.random.default_rng(0)
  if name == "depth":
    truth = rng.uniform(1, 9, (2, 8, 12)).astype(np.float32)
    return Depth(max_depth=10.0), truth, {"depth": jnp.asarray(truth)}, {}
  if name == "segmentation":
    label = rng.integers(0, 3, (2, 8, 12))
    return Segmentation(classes=3), np.eye(3, dtype=np.float32)[label], {"label": jnp.asarray(label)}, {}
  if name.startswith("referring"):
    mask = rng.integers(0, 2, (2, 8, 12))
    batch = {"mask": mask, "full_mask": mask.astype(np.uint8), "full_size": np.full((2, 2), (8, 12))}
    task = Referring(eval_at="original" if name.endswith("original") else "network")
    return task, np.eye(2, dtype=np.float32)[mask], {key: jnp.asarray(value) for key, value in batch.items()}, {}
  batch, truth = people
  task = Pose(keypoints=COCO, udp=not name.endswith("quarter"))
  maps, _ = heatmaps.targets(batch["keypoints"], (256, 192), (64, 48), sigma=2, udp=task.udp)
  return task, np.asarray(maps), batch, {"truth": truth}


TASKS = ["depth", "segmentation", "referring", "referring original", "pose", "pose quarter"]


def finite_rows(task, prediction, batch):
  rows = {key: np.asarray(value) for key, value in jax.jit(task.measure)(jnp.asarray(prediction), batch).items()}
  for key, value in rows.items():
    assert np.isfinite(value).all(), key
  return rows


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_what_is_not_finite_is_counted_and_never_scored_well(name, people, bad, share):
  task, prediction, batch, more = made(name, people)
  best, least = task.best_metric, task.best_mode == "min"
  perfect = task.summarize(finite_rows(task, prediction, batch), **more)
  assert perfect["not_finite"] == 0
  where = np.random.default_rng(1).random(prediction.shape[:3]) < share
  spoilt = np.where(where[(..., *(None,) * (prediction.ndim - 3))], bad, prediction).astype(np.float32)
  scores = task.summarize(finite_rows(task, spoilt, batch), **more)
  assert scores["not_finite"] == where.sum() and np.isfinite(list(scores.values())).all()
  worse = scores[best] > perfect[best] if least else scores[best] < perfect[best]
  assert worse and (share < 1 or least or scores[best] < 0.05)


@pytest.mark.parametrize("name", ["segmentation", "referring", "referring original"])
def test_an_infinite_score_of_the_right_class_is_not_right(name, people):
  """The other scores of the pixel are finite: the largest of them all, and the difference of two, are known."""
  task, prediction, batch, more = made(name, people)
  scores = task.summarize(finite_rows(task, np.where(prediction == 1, np.inf, prediction), batch), **more)
  assert scores[task.best_metric] == 0 and scores["not_finite"] == prediction[..., 0].size


@pytest.mark.parametrize("value", [0.0, -1.0, 3e38, -3e38, 1e-30])
def test_depth_that_no_logarithm_and_no_square_holds_has_finite_scores(people, value):
  task, prediction, batch, _ = made("depth", people)
  rows = finite_rows(task, np.full_like(prediction, value), batch)
  assert rows["not_finite"].sum() == 0 and (rows["d1"] == 0).all()


def test_an_image_without_scored_pixels_has_finite_rows(people):
  task, prediction, batch, _ = made("depth", people)
  finite_rows(task, prediction, {"depth": batch["depth"].at[1].set(0)})


def test_similarities_that_are_not_finite_are_no_match(people):
  task, maps, batch, more = made("pose", people)
  rows = finite_rows(task, maps, batch)
  best = task.summarize(rows, **more)["AP"]
  for key, bad in [("keypoints", np.nan), ("keypoints", np.inf), ("box_score", np.nan), ("area", np.inf)]:
    spoilt = rows | {key: np.full_like(rows[key], bad)}
    scores = task.summarize(spoilt, **more)
    assert np.isfinite(list(scores.values())).all() and scores["AP"] <= (0 if key == "keypoints" else best), key
    json.dumps(task.results(spoilt, **more), allow_nan=False)


def test_scores_of_people_are_finite():
  joints = np.array([[np.nan, 0.5], [np.inf, 0.5], [-np.inf, 0.5]])
  np.testing.assert_array_equal(oks.rescored(np.ones(3), joints, 0.2), [0.5, 0.5, 0.5])


def refuse(constant):
  raise AssertionError(f"{constant} is not valid JSON")


@pytest.mark.parametrize("bad", BAD)
def test_files_hold_no_number_that_is_not_finite(tmp_path, bad):
  image = np.zeros((6, 8, 3), np.uint8)
  depth = np.full((6, 8), bad)
  read = lambda: json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
  Depth(max_depth=10.0).save(tmp_path / "a", depth, {}, image)
  assert read()["not_finite"] == 48 and read()["min"] is None and read()["max"] is None
  depth[0, :2] = 2, 3
  Depth(max_depth=10.0).save(tmp_path / "a", depth, {}, image)
  assert read()["not_finite"] == 46 and (read()["min"], read()["max"]) == (2, 3)
  found = np.full((1, 17, 3), 4.0)
  found[0, 2, 1] = bad
  Pose(keypoints=COCO).save(tmp_path / "a", found, {"people": [{"score": 0.5}]}, image)
  assert read()["not_finite"] == 1 and read()["people"][0]["keypoints"][COCO.names[2]] == [0, 0, 0]
  scores = np.full((6, 8, 2), bad)
  Referring().save(tmp_path / "a", scores, {"sentence": "it"}, image)
  assert read()["share"] == 0
