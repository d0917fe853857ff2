"""Scores of an evaluation: nothing is scored that was not predicted, and everything is scored."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpd_jax.config import loader
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError
from vpd_jax.evaluation import evaluate
from vpd_jax.inference import sliding_window
from vpd_jax.tasks.depth.task import Depth
from vpd_jax.tasks.segmentation.task import Segmentation
from vpd_jax.types import Source


class Numbers(list, Source):
  """A source whose examples are numbers."""


def evaluator(rows, records=3, task=None):
  """An Evaluator around made-up rows of measurements."""
  made = object.__new__(evaluate.Evaluator)
  made.config = loader.load("configs/my_depth.py:tiny")
  made.experiment = types.SimpleNamespace(task=task or Depth(max_depth=10.0))
  made.source, made._truth = Numbers(range(records)), {}
  made.dataset = types.SimpleNamespace(source=lambda split: made.source, notes=lambda split: [])
  made._baselines = {}

  def measured(weights, panels):
    yield from ((row, ()) for row in rows)

  made._measured = measured
  return made


def rows_of(predictions, real):
  """Measurements of depths of 1 m, as a step of evaluation gives them."""
  prediction = jnp.asarray(predictions, jnp.float32)[:, None, None] * jnp.ones((1, 4, 4))
  rows = Depth(max_depth=10.0).measure(prediction, {"depth": jnp.ones_like(prediction)})
  return jax.device_get(rows) | {"real": np.asarray(real)}


@pytest.mark.parametrize("rows", [[], [([1.0, 1.0], [True, True])], [([1.0] * 4, [True] * 4)]])
def test_an_evaluation_that_has_not_scored_every_record_is_an_error(rows):
  made = evaluator([rows_of(*row) for row in rows])
  with pytest.raises(ValueError, match=r"scored [024] of the 3 records of data set 'depth_list'") as told:
    made.run(None)
  assert "\n" not in str(told.value)


def test_predictions_that_are_not_finite_are_counted_beside_the_scores():
  rows = [rows_of([1.0, np.nan], [True, True]), rows_of([np.inf, np.nan], [True, False])]
  made = evaluator(rows)
  scores = made.run(None).scores
  assert scores["eval/depth_list/not_finite"] == 32 and scores["eval/depth_list/images"] == 3
  assert "\n  32 pixels were predicted as NaN or infinity" in made.report(scores)
  sound = evaluator([rows_of([1.0] * 4, [True, True, True, False])])
  scores = sound.run(None).scores
  assert scores["eval/depth_list/not_finite"] == 0 and "infinity" not in sound.report(scores)


def test_a_pixel_that_is_not_finite_has_no_class():
  scores = np.ones((3, 4, 5), np.float32)
  scores[0, 0], scores[2, 3, 4] = np.nan, np.inf
  label = np.asarray(sliding_window.finite_label(jnp.asarray(scores)))
  assert (label == 5).sum() == 2 and label[0, 0] == label[2, 3] == 5 and label[1, 1] == 0


def test_label_maps_are_not_right_where_scores_are_not_finite(monkeypatch):
  """The evaluation picture by picture, of a network that gives NaN for the white half of a picture of one class."""
  monkeypatch.setattr(evaluate, "on_mesh", lambda step, *_: step)
  image = np.zeros((128, 128, 3), np.uint8)
  image[:64] = 255
  picture = {"image": image, "label": np.zeros((128, 128), np.int32)}

  def model(batch, training):
    white = batch["image"][..., :1] > 0.5
    return {"logits": jnp.where(white, jnp.nan, jnp.array([9.0, 0.0, 0.0]))}

  exp = types.SimpleNamespace(
    task=Segmentation(classes=3),
    spec=types.SimpleNamespace(merge=lambda *weights: model),
    method=types.SimpleNamespace(needs=frozenset(), prepare=None),
    classes=("wall", "sky", "cat"),
  )
  config = loader.load("configs/my_segmentation.py:tiny")
  dataset = types.SimpleNamespace(source=lambda split: [picture], eval_transform=lambda example: example)
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  ((row, _),) = evaluate._Images(config, exp, dataset, mesh)(({}, {}, {}), 0)
  scores = exp.task.summarize({name: value for name, value in row.items() if name != "real"})
  assert scores["not_finite"] == 64 * 128 and scores["aAcc"] == 0.5


def labeled():
  """An Evaluator around one picture of four pixels, three of them right, and its task."""
  task = Segmentation(classes=3, class_names=("wall", "sky", "cat"))
  label = jnp.asarray([[[0, 0, 1, 1]]])
  rows = jax.device_get(task.measure(jnp.asarray([[[0, 1, 1, 1]]]), {"label": label}))
  return evaluator([rows | {"not_finite": np.zeros(1, np.int32), "real": np.array([True])}], records=1, task=task), task


def test_predictions_follow_the_records_whatever_the_order_of_the_devices():
  """On some TPU pods a mesh has devices of other hosts between those of one."""
  found = evaluate._in_order(jnp.asarray([[10.0], [30.0], [0.0], [20.0]]), jnp.asarray([1, 3, 0, 2]))
  np.testing.assert_array_equal(found, [[0], [10], [20], [30]])


def test_only_the_first_process_makes_panels(monkeypatch):
  """Others have predictions of other records."""
  made = evaluator([rows_of([1.0], [True])], records=1)
  made._panels = lambda shown: shown
  made._measured = lambda weights, panels: ((row, ["a prediction"]) for row in [rows_of([1.0], [True])])
  assert made.run(None).panels == ["a prediction"]
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert made.run(None).panels == []


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_baselines_skip_the_records_that_training_skips(choice):
  class Damaged(Numbers):
    def __getitem__(self, index):
      if index == 1:
        raise UserError("1.png is damaged")
      return {"image": super().__getitem__(index)}

  made = evaluator([])
  made.config = loader.changed(made.config, {"data.on_bad_record": choice})
  source = Damaged(range(3))
  made.dataset = types.SimpleNamespace(source=lambda split: source, eval_transform=lambda example: example)
  if choice == "skip":
    assert [example["image"] for example in made._examples("train", 2)] == [0, 2]
  else:
    with pytest.raises(UserError, match="damaged"):
      list(made._examples("train", 2))
  with pytest.raises(UserError, match="damaged"):  # a score over fewer records is not comparable
    list(made._examples("eval"))


def test_the_scores_of_every_class_are_in_the_report_and_in_the_result():
  made, task = labeled()
  result = made.run(None)
  lines = made.report(result.scores, result.rows).splitlines()
  assert [line.split() for line in lines[:-1]] == [
    ["class", "IoU", "Acc"],
    ["-----", "------", "------"],
    ["wall", "0.5000", "0.5000"],
    ["sky", "0.6667", "1.0000"],
    ["cat", "-", "-"],
  ]
  assert lines[-1].startswith("mIoU 0.5833") and made.comparison(result.scores) == ""
  told = json.loads(json.dumps(evaluate.class_scores(task, result.rows), allow_nan=False))
  assert told[0] == {"class": "wall", "IoU": 0.5, "Acc": 0.5} and told[2] == {"class": "cat", "IoU": None, "Acc": None}
  assert evaluate.class_scores(Depth(max_depth=10.0), {}) == []  # depth has no classes


def test_the_scores_of_every_class_are_printed_and_in_eval_json(tmp_path, monkeypatch, capsys):
  made, _ = labeled()
  made.encodings = types.SimpleNamespace(lines=lambda: [])
  config = loader.changed(loader.load("configs/my_segmentation.py:tiny"), {"init.pretrained": "weights"})
  for place, name, value in (
    (evaluate.initialize, "with_backbone_sizes", lambda config, _: config),
    (evaluate.initialize, "weights_on_mesh", lambda *_, **__: (None, ["weights: made up"])),
    (evaluate.experiment, "assemble", lambda *_, **__: made.experiment),
    (evaluate.experiment, "dataset", lambda *_: made.dataset),
    (evaluate.experiment, "sentence_lines", lambda *_: []),
    (evaluate, "Evaluator", lambda *_: made),
  ):
    monkeypatch.setattr(place, name, value)
  evaluate.run(config, str(tmp_path))
  assert "wall   0.5000  0.5000\n" in capsys.readouterr().out
  assert json.loads((tmp_path / "eval.json").read_text())["classes"] == [
    {"class": "wall", "IoU": 0.5, "Acc": 0.5},
    {"class": "sky", "IoU": pytest.approx(2 / 3), "Acc": 1.0},
    {"class": "cat", "IoU": None, "Acc": None},
  ]


def depth_step(size, **changes):
  """The step of evaluation on pictures of this size, traced, of a network that is perfect on depths of 1 m."""
  fields = {"eval.test_time": ("shift:2",), "eval.coverage": "released"} | changes
  config = loader.changed(loader.load("configs/my_depth.py:tiny"), fields)
  task = Depth(max_depth=10.0, eval_crop=config.task.eval_crop)
  model = lambda batch, training: {"depth": jnp.ones(batch["image"].shape[:3])}
  spec = types.SimpleNamespace(
    merge=lambda *weights: model, model=types.SimpleNamespace(method=types.SimpleNamespace(needs=frozenset()))
  )
  exp = types.SimpleNamespace(task=task, spec=spec, method=spec.model.method, keys=("image",))
  batch = {"image": jnp.zeros((1, *size, 3)), "depth": jnp.ones((1, *size))}
  return evaluate.make_step(config, exp)((), batch)[0]


@pytest.mark.parametrize("size, holes", [((352, 1216), 352 * 512), ((480, 1280), 480 * 320), ((1216, 352), 352 * 512)])
def test_windows_that_leave_scored_pixels_out_are_refused(size, holes):
  with pytest.raises(ValueError, match=rf"'released'.* leaves {holes} pixels .*set config\.eval\.coverage='full'"):
    depth_step(size)
  rows = depth_step(size, **{"eval.coverage": "full"})
  assert float(rows["rmse"][0]) == 0 and int(rows["not_finite"][0]) == 0


def test_pixels_that_no_score_counts_may_be_left_out():
  kitti = {"eval.test_time": ("shift:16",), "task.eval_crop": "garg"}
  rows = depth_step((352, 1216), **kitti)
  assert float(rows["rmse"][0]) == 0 and int(rows["not_finite"][0]) == 0
  with pytest.raises(ValueError, match="leaves 3168 pixels"):
    depth_step((352, 1216), **kitti | {"task.eval_crop": "none"})


def test_the_refusal_comes_before_the_first_step():
  """An Evaluator looks at the first picture of the data set."""
  config = loader.changed(loader.load("configs/my_depth.py:tiny"), {"eval.coverage": "released"})
  picture = {"image": np.zeros((352, 1216, 3), np.uint8)}
  dataset = types.SimpleNamespace(source=lambda split: [picture], eval_transform=lambda example: example)
  exp = types.SimpleNamespace(task=Depth(max_depth=10.0))
  mesh = types.SimpleNamespace(size=1)
  with pytest.raises(ValueError, match="leaves 180224 pixels of each image of 352 x 1216"):
    evaluate.Evaluator(config, exp, dataset, mesh)


def test_only_the_published_protocols_leave_the_end_of_an_image_out():
  paths = sorted((loader.PROJECT / "configs").glob("*.py"))
  chosen = {path.stem: loader.load(str(path)).eval.get("coverage", "full") for path in paths}
  assert {stem for stem, coverage in chosen.items() if coverage != "full"} == {"nyu_depth", "kitti_depth"}
