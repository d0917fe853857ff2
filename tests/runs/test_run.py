"""A run from start to end: train, stop, resume, evaluate, predict; in small, on the embedded rooms."""

import contextlib
import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import vpd_jax
from tests.helpers import one_convolution
from vpd_jax import experiment
from vpd_jax.checkpoints import workdir_lock
from vpd_jax.config import loader, stored
from vpd_jax.convert.finite import check_finite
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import evaluate
from vpd_jax.monitoring import progress
from vpd_jax.planning import plan
from vpd_jax.prediction import predict_folder
from vpd_jax.training import compilation, train


def small(**changes):
  """The same of one convolution: what is tested here surrounds the network."""
  return one_convolution.rooms(**changes)


@pytest.fixture(scope="module", autouse=True)
def _the_method_is_known():
  with one_convolution.known():
    yield


@pytest.fixture(scope="module")
def compilations():
  """What jax says of each program that it compiles while this file's undisturbed run runs."""
  return []


@contextlib.contextmanager
def listening(messages):
  """Puts what jax says of compiling into `messages`."""
  handler = logging.Handler()
  handler.emit = lambda record: messages.append(record.getMessage())
  logging.getLogger("jax").addHandler(handler)
  try:
    with jax.log_compiles():
      yield
  finally:
    logging.getLogger("jax").removeHandler(handler)


@pytest.fixture(scope="module")
def run(tmp_path_factory, compilations):
  """(workdir, scores) of an undisturbed run of four steps."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  with listening(compilations):
    return workdir, train.run(small(), str(workdir))


def test_a_run_compiles_its_step_once(run, compilations):
  made = [message for message in compilations if "Finished XLA compilation of jit(train_step)" in message]
  assert len(made) == 1, made


def test_a_finished_run_has_nothing_to_do(run, capsys):
  assert train.run(small(), str(run[0])) == {}
  assert "nothing to do: step 4 of 4" in capsys.readouterr().out


def test_another_config_is_refused_with_the_difference(run):
  with pytest.raises(ValueError, match=r"optim.lr: 0.001 -> 0.5.*--accept_config_changes"):
    train.run(small(**{"optim.lr": 0.5}), str(run[0]))
  assert train.run(small(log_every=3), str(run[0])) == {}


def test_the_run_leaves_scalars_panels_config_and_overview(run):
  workdir, scores = run
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  named = {name for line in lines for name in line}
  assert named >= {
    "train/loss",
    "train/silog",
    "eval/rooms/rmse",
    "eval/rooms/d1",
    "lr/rest",
    "norm/gradients",
    "perf/step_ms",
    "perf/img_per_sec_per_chip",
    "perf/tflops_per_sec_per_chip",
    "perf/input_wait_ms",
    "eval/trivial/constant",
  }
  assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
  events = EventAccumulator(str(workdir), size_guidance={"tensors": 0, "images": 0})
  events.Reload()
  assert {"train/loss", "eval/rooms/rmse", "panels/rooms"} <= set(
    events.Tags()["tensors"] + events.Tags()["scalars"] + events.Tags()["images"]
  )
  assert json.loads((workdir / "config.json").read_text())["optim"]["lr"] == 1e-3
  assert "method/only/kernel" in (workdir / "parameters.txt").read_text()
  assert scores["eval/rooms/images"] == 5


def test_evaluation_prints_the_scores_of_training_and_the_trivial_predictors(run, capsys):
  workdir, scores = run
  again = evaluate.run(small(), str(workdir))
  assert again == pytest.approx(scores, rel=1e-6)
  text = capsys.readouterr().out
  assert "checkpoint of step 4" in text and "linear_rgb_position" in text
  assert json.loads((workdir / "eval.json").read_text())["scores"] == pytest.approx(again)


def test_a_run_is_used_without_its_config(run):
  workdir, _ = run
  assert loader.changes(loader.load(stored.config_string(str(workdir))), small()) == []
  predictor = vpd_jax.Predictor.load(workdir=workdir)
  again = vpd_jax.Predictor.load(small(), str(workdir))
  image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
  np.testing.assert_array_equal(predictor.predict(image)["depth"], again.predict(image)["depth"])
  for words, message in (
    ({"workdir": workdir / "none"}, "none' holds no checkpoint; give the workdir of a run"),
    ({"workdir": workdir, "weights": "a.pth"}, "give one of them"),
    ({"weights": "a.pth"}, r"has no config: give one, .* or workdir=RUN"),
  ):
    with pytest.raises(ValueError, match=message):
      vpd_jax.Predictor.load(**words)


def test_a_library_is_silent_and_a_command_names_its_phases(run, tmp_path, capsys):
  (tmp_path / "in").mkdir()
  Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "in" / "a.png")
  vpd_jax.Predictor.load(workdir=run[0]).predict(str(tmp_path / "in" / "a.png"))
  assert capsys.readouterr() == ("", "")
  workdir = str(shutil.copytree(run[0], tmp_path / "run"))
  progress.show()
  try:
    predict_folder.run(small(), workdir, source=str(tmp_path / "in"), output=str(tmp_path / "out"))
    evaluate.run(small(), workdir)
    train.run(small(num_steps=5), workdir, accept_changes=True)
  finally:
    progress.hide()
  said = capsys.readouterr().out
  phases = re.findall(r"^([a-z ]+\d?): (?:\d+ \w+ in )?[\d.]+ s", said, re.MULTILINE)
  of_train = ["assemble", "open data", "load weights", "first batch", "trace", "compile", "first step", "save step 5"]
  assert phases[:3] == ["assemble", "load weights", "predict"]
  assert phases[3:8] == ["assemble", "open data", "load weights", "evaluate", "trivial predictors"]
  assert phases[8:16] == of_train, said


def test_a_second_run_in_a_workdir_is_refused_and_an_evaluation_is_not(run):
  workdir, scores = run
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  with workdir_lock.claimed(workdir):
    with pytest.raises(ValueError, match="is in use by another run"):
      train.run(small(), str(workdir))
    assert {
      path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path != workdir / workdir_lock.LOCK
    } == before
    assert evaluate.run(small(), str(workdir)) == pytest.approx(scores, rel=1e-6)


def test_a_workdir_below_the_home_folder_is_one_folder(run, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  shutil.copytree(run[0], tmp_path / "run")
  written = [tmp_path / "run" / name for name in ("config.json", "eval.json")]
  for path in written:
    path.unlink(missing_ok=True)
  train.run(small(), "~/run")
  evaluate.run(small(), "~/run")
  assert all(path.exists() for path in written) and not (tmp_path / "~").exists()


def test_evaluation_of_nothing_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no trained weights to evaluate"):
    evaluate.run(small(), str(tmp_path))
  with pytest.raises(ValueError, match=r"holds no checkpoint and config\.init\.pretrained is empty"):
    predict_folder.run(small(), str(tmp_path / "x"), source=str(tmp_path), output=str(tmp_path / "out"))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_whose_loss_is_not_finite_stops_and_names_the_step(tmp_path):
  with pytest.raises(FloatingPointError, match=r"the loss of step \d is nan"):
    train.run(small(**{"optim.lr": 1e30, "log_every": 4, "optim.schedule.warmup": 0}), str(tmp_path))


@pytest.mark.parametrize("loss, norm", [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan)])
def test_a_loss_or_gradient_that_is_not_finite_is_named_by_its_first_step(loss, norm):
  assert check_finite([(7, np.float32(0.5), np.float32(1))]) == []
  with pytest.raises(FloatingPointError, match=r"step 8 "):
    check_finite([(i, np.float32(loss), np.float32(norm)) for i in (8, 9)])


def test_the_learning_rate_of_no_step_is_lost_by_a_resume(run, tmp_path):
  """Steps 3 and 4 of the logs follow the schedule of the optimizer's own count."""
  lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
  rates = [line["lr/rest"] for line in lines if "lr/rest" in line]
  exp = experiment.assemble(small())
  np.testing.assert_allclose(rates, [float(exp.rate(np.int32(i))) for i in range(4)], rtol=1e-5, atol=1e-12)


def test_a_second_start_finds_its_step_compiled(run):
  config, messages = small(), []
  exp, mesh = experiment.assemble(config), sharding.make_mesh()
  jax.clear_caches()  # the last test of this file
  with listening(messages):
    compilation.compile_step(config, exp, mesh, plan.batch_shapes(config, exp.keys, "train"))
  assert any("compilation cache hit for 'jit_train_step'" in message for message in messages), messages
