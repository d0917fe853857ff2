"""Pose from start to end on files of COCO's layout: train, evaluate, results file, predict with boxes and without."""

import json

import cv2
import jax
import numpy as np
import pytest
from etils import epath

from tests.helpers import coco_people, tiny
from tests.helpers.buckets import bucket
from tests.helpers.coco_runs import coco
from tests.helpers.coco_scores import directly
from vpd_jax import Predictor, experiment
from vpd_jax.config import loader
from vpd_jax.data.datasets.coco_pose import CocoPose
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import predict_folder
from vpd_jax.training import train

__all__ = ["bucket"]  # a fixture
NAMES = tuple(f"{number:012}.jpg" for number in (10, 20, 30, 70))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(folder of the pictures, workdir, config) after two steps."""
  root = coco_people.write(tmp_path_factory.mktemp("coco"))
  workdir, config = tmp_path_factory.mktemp("run"), coco(root)
  train.run(config, str(workdir))
  return root, workdir, config


@pytest.fixture(scope="module")
def predictor(run):
  return Predictor.load(run[2], weights=str(run[1]))


def pictures(root):
  return [cv2.imread(str(root / "val2017" / name))[..., ::-1] for name in NAMES]


def test_training_leaves_finite_scalars_and_panels(run):
  lines = [json.loads(line) for line in (run[1] / "metrics.jsonl").read_text().splitlines()]
  losses = [line["train/joints_mse"] for line in lines if "train/joints_mse" in line]
  assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
  last = next(line for line in reversed(lines) if "eval/coco_pose/AP" in line)
  assert 0 <= last["eval/coco_pose/AP"] <= 1 and last["eval/coco_pose/people"] == 5


def test_the_evaluation_writes_what_the_official_tool_scores_alike(run, capsys):
  root, workdir, config = run
  scores = evaluate.run(config, str(workdir))
  assert "2 detected boxes without an area inside their image are left out\n" in capsys.readouterr().out
  entries = json.loads((workdir / "results.json").read_text())
  assert {entry["image_id"] for entry in entries} == {30, 20, 70} and 3 <= len(entries) <= 5
  assert all(len(entry["keypoints"]) == 51 and np.isfinite(entry["keypoints"]).all() for entry in entries)
  truth = CocoPose(root=str(root), crop=(64, 64), complete=False).truth("eval")
  stats = directly(truth, entries)
  np.testing.assert_allclose([scores[f"eval/coco_pose/{name}"] for name in ("AP", "AR")], stats[[0, 5]])
  assert json.loads((workdir / "eval.json").read_text())["scores"] == pytest.approx(scores)


def test_forward_gives_heatmaps_and_predict_people_with_scores(run, predictor):
  images = pictures(run[0])
  out = predictor.forward(np.stack(images[:2])[:, :64, :64].astype(np.float32) / 255)
  assert set(out) == {"heatmaps"} and out["heatmaps"].shape == (2, 16, 16, 17)
  assert out["heatmaps"].dtype == np.float32 and np.isfinite(out["heatmaps"]).all()
  boxes = [[[0, 30, 59, 59]], [], [[10, 10, 40, 60, 0.5], [60, 20, 30, 50]], [[20, 5, 50, 80, 0.9]]]
  results = predictor.predict(images, boxes=boxes)
  assert [result["keypoints"].shape for result in results] == [(n, 17, 3) for n in (1, 0, 2, 1)]
  for result, own in zip(results, boxes, strict=True):
    np.testing.assert_array_equal(result["boxes"], np.array([box[:4] for box in own], np.float32).reshape(-1, 4))
    expected = predictor.experiment.task.rescored([*map(lambda b: [*b, 1.0][4], own)], result["keypoints"][..., 2])
    np.testing.assert_allclose(result["scores"], expected, rtol=1e-5)
  (whole,) = predictor.predict(images[:1])
  (named,) = predictor.predict(images[:1], boxes=[[[0, 0, 120, 90]]])
  np.testing.assert_array_equal(whole["keypoints"], named["keypoints"])
  # A person's keypoints do not depend on who else is asked for.
  np.testing.assert_allclose(predictor.predict(images[3:], boxes=boxes[3:])[0]["keypoints"], results[3]["keypoints"],
                             rtol=1e-4, atol=1e-4)  # fmt: skip


def test_predictions_are_those_of_the_evaluation(run, predictor):
  """The same boxes, by hand and through --mode=eval, give the same results file."""
  root, workdir, config = run
  evaluate.run(config, str(workdir))
  entries = json.loads((workdir / "results.json").read_text())
  found = json.loads((root / "person_detection_results/COCO_val2017_detections_AP_H_56_person.json").read_text())
  boxes = [[*d["bbox"], d["score"]] for d in found if d["image_id"] == 70][:1]
  (result,) = predictor.predict(pictures(root)[3:], boxes=[boxes])
  (entry,) = [entry for entry in entries if entry["image_id"] == 70]
  np.testing.assert_allclose(np.ravel(result["keypoints"]), entry["keypoints"], rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(result["scores"][0], entry["score"], rtol=1e-4)


@pytest.mark.parametrize("given", [True, False])
def test_a_folder_gets_skeletons_and_keypoints_by_name(run, tmp_path, given):
  root, workdir, config = run
  boxes = ""
  if given:
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({NAMES[2]: [[10, 10, 40, 60, 0.5], [60, 20, 30, 50]], NAMES[0]: [[0, 30, 59, 59]]}))
  count = predict_folder.run(
    config, str(workdir), source=str(root / "val2017"), output=str(tmp_path / "out"), boxes=str(boxes)
  )
  assert count == 4
  people = [json.loads((tmp_path / "out" / f"{name[:-4]}.json").read_text())["people"] for name in NAMES]
  assert [len(found) for found in people] == ([1, 0, 2, 0] if given else [1, 1, 1, 1])
  assert people[0][0]["box"] == ([0, 30, 59, 59] if given else [0, 0, 120, 90])
  assert next(iter(people[0][0]["keypoints"])) == "nose" and len(people[0][0]["keypoints"]["right_ankle"]) == 3
  assert len(list((tmp_path / "out").glob("*.skeleton.png"))) == 4


def one_line(part, call):
  with pytest.raises(ValueError) as caught:
    call()
  assert part in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_boxes_that_have_no_place_are_one_line(run, predictor, tmp_path):
  root, workdir, config = run
  path = tmp_path / "boxes.json"
  options = {"source": str(root / "val2017"), "output": str(tmp_path / "out"), "boxes": str(path)}
  path.write_text(json.dumps({"other.jpg": [[1, 2, 3, 4]]}))
  one_line("--boxes names images that are not in", lambda: predict_folder.run(config, str(workdir), **options))
  path.write_text(json.dumps({NAMES[0]: [[500, 2, 30, 40]], NAMES[1]: [[1, 1, 0, 5]], NAMES[2]: [[10, 10, 40, 60]]}))
  one_line(f"boxes of {NAMES[1]}, 120 x 90 pixels: 1 have no area or lie outside", lambda: predict_folder.run(
    config, str(workdir), **options))  # fmt: skip
  assert sorted(file.stem for file in (tmp_path / "out").glob("*.json")) == [name[:-4] for name in NAMES[2:]]
  images = pictures(root)[:1]
  one_line("boxes: 2 for 1 images; give one each", lambda: predictor.predict(images, boxes=[[], []]))
  one_line("boxes of image 0, 120 x 90 pixels: 1 have no area or lie outside", lambda: predictor.predict(
    images, boxes=[[[1, 1, 0, 5]]]))  # fmt: skip


def test_boxes_for_another_task_and_pose_without_keypoints_are_one_line(run, tmp_path, monkeypatch):
  config = tiny.shrunk(loader.load("configs/rooms.py:depth,tiny"))
  depth = Predictor(config, experiment.assemble(config, training=False), ({}, {}, {}), [])
  image = np.zeros((64, 64, 3), np.uint8)
  one_line("boxes have no effect on method 'vpd' and task 'depth'", lambda: depth.predict(
    [image], boxes=[[[1, 1, 5, 5]]]))  # fmt: skip
  monkeypatch.setattr(Predictor, "load", lambda config, weights: depth)
  (tmp_path / "boxes.json").write_text(json.dumps({NAMES[0]: [[0, 30, 59, 59]]}))
  options = {"source": str(run[0] / "val2017"), "output": str(tmp_path / "out"), "boxes": str(tmp_path / "boxes.json")}
  one_line("has no effect: method 'vpd' with task 'depth' takes none; leave it out", lambda: predict_folder.run(
    config, str(run[1]), **options))  # fmt: skip
  assert not (tmp_path / "out").exists()
  config = tiny.shrunk(loader.load("configs/rooms.py:depth,tiny")).unlock()
  config.task, config.head = {"name": "pose", "sigma": 2}, {"name": "simple", "stride": 8, "init": "fan_in"}
  config.neck = {"name": "none"}
  one_line(
    "task 'pose' needs keypoints, which data set 'rooms' does not provide", lambda: experiment.assemble(config.lock())
  )


def test_the_results_file_goes_to_a_bucket_too(run, bucket):
  """A workdir may be gs://..., whose paths are no pathlib.Path."""
  task = experiment.assemble(run[2], training=False).task
  truth = CocoPose(root=str(run[0]), crop=(64, 64), complete=False).truth("eval")
  rows = {
    "keypoints": np.ones((1, 17, 3)),
    "area": np.ones(1),
    "box_score": np.ones(1),
    "image_index": np.zeros(1, int),
  }
  (bucket[0] / "run").mkdir(parents=True)
  task.write_results(epath.Path("gs://bucket/run") / "results.json", rows, truth)
  assert [file.name for file in (bucket[0] / "run").iterdir()] == ["results.json"]
  assert json.loads((bucket[0] / "run" / "results.json").read_text())[0]["image_id"] == 30


HEADS = {"fused": {"width": 8}, "simple": {"stride": 16}, "classic": {"stride": 16, "width": 8}, "direct": {}}


@pytest.mark.parametrize("method, heads, crop", [
  ("vpd", ("fused", "simple", "classic"), (384, 288)),
  ("meta_prompts", ("fused", "simple", "classic", "direct"), (384, 288)),
  ("iedp", ("fused", "simple", "classic"), (384, 288)),
  ("vpd", ("simple",), (512, 384)),
  ("meta_prompts", ("fused",), (512, 384)),
  ("iedp", ("simple",), (512, 384)),
  ("vpd", ("simple",), (1024, 768)),
  ("meta_prompts", ("fused",), (1024, 768)),
  ("iedp", ("simple",), (1024, 768)),
])  # fmt: skip
def test_larger_crops_give_heatmaps_of_a_quarter(method, heads, crop):
  """Without an array: 288 / 64 is no whole number."""
  config = tiny.shrunk(loader.load(f"configs/coco_pose.py:{method},tiny")).unlock()
  config.data.crop = crop
  for head in heads:
    config.head = {"name": head, "init": "released", **HEADS[head]} if head != "direct" else {"name": head}
    config.method.update({"prompts": 17 if head == "direct" else 20} if method == "meta_prompts" else {})
    exp = experiment.assemble(config.copy_and_resolve_references().lock(), training=False)
    shapes = exp.spec.shapes
    batch = {"image": jax.ShapeDtypeStruct((2, *crop, 3), np.uint8)}
    batch |= {name: jax.ShapeDtypeStruct((2,), np.int32) for name in exp.method.needs}
    forward = lambda weights, batch, parts=exp.spec: parts.merge(*weights)(batch, training=False)
    out = jax.eval_shape(forward, (shapes, {}, {}), batch)
    assert out["heatmaps"].shape == (2, crop[0] // 4, crop[1] // 4, 17) and out["heatmaps"].dtype == np.float32
