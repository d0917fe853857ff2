"""The loop around the training step, with a state of two numbers in place of a network."""

import contextlib
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpd_jax.checkpoints import checkpointer, initialize
from vpd_jax.config import loader
from vpd_jax.distributed import multiprocess, sharding
from vpd_jax.evaluation import evaluate
from vpd_jax.tasks.depth.task import Depth
from vpd_jax.training import compilation, session, startup_report, train
from vpd_jax.types import TrainState

OPTIMIZER = optax.scale_by_adam()
METRIC = "eval/rooms/rmse"


def begun():
  params = {"a/kernel": jnp.zeros(2)}
  return TrainState(jnp.int32(0), params, {}, {}, OPTIMIZER.init(params))


class Scored:
  """In place of evaluate.Evaluator: the score of each step from a table; a missing one is a fault."""

  encodings = types.SimpleNamespace(lines=lambda: [], __call__=None)
  scores: dict[int, float]
  held: list[list[int]]
  folder = None

  def __init__(self, *_):
    pass

  def run(self, weights, stop):
    step = int(weights[0]["a/kernel"][0])
    self.held.append([int(path.name) for path in (self.folder / "checkpoints").iterdir() if path.name.isdigit()])
    if step not in self.scores:
      raise OSError(f"step {step} cannot be scored")
    return evaluate.Evaluation({METRIC: self.scores[step]}, np.zeros((0, 1, 1, 3), np.uint8), {})

  def baselines(self):
    return {}

  def report(self, scores, rows):
    return str(scores)

  def comparison(self, scores):
    return ""


class Batches:
  skipped = 0

  def __iter__(self):
    return self

  def __next__(self):
    return {"image": jnp.zeros((6, 2, 2, 3))}

  def mean_wait_ms(self):
    return 0.0

  def close(self):
    pass


class Step:
  """In place of the compiled step: counts in the parameters."""

  def compile(self, options):
    del options
    return self

  def cost_analysis(self):
    return {}

  def __call__(self, state, batch):
    params = {name: x + 1 for name, x in state.params.items()}
    logs = {"train/loss": jnp.float32(1), "norm/gradients": jnp.float32(1)}
    return state.replace(step=state.step + 1, params=params), logs


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Runs the loop with the scores of its steps; gives the steps on disk at each evaluation."""
  config = loader.load("configs/rooms.py:depth,tiny").unlock()
  config.update(num_steps=6, eval_every=2, save_every=3, log_every=1, keep=2, keep_best=1)
  exp = types.SimpleNamespace(
    task=Depth(max_depth=10.0), method=types.SimpleNamespace(notes=(), prepare=None), keys=("image",)
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])

  def resume(config, exp, mesh, checkpoints, **_):
    last = checkpoints.latest_step()
    abstract = sharding.abstract(begun(), sharding.state_shardings(mesh, begun()))
    return (checkpoints.restore(last, abstract) if last else begun()), []

  for place, name, value in (
    (session.experiment, "assemble", lambda config: exp),
    (
      session.experiment,
      "dataset",
      lambda *_: types.SimpleNamespace(source=lambda split: [0], describe=lambda **_: []),
    ),
    (session.experiment, "sentence_lines", lambda *_: []),
    (session.sharding, "make_mesh", lambda *_: mesh),
    (evaluate, "Evaluator", Scored),
    (startup_report, "describe", lambda *_: None),
    (initialize, "resume_or_start", resume),
    (session, "training_batches", lambda *_: Batches()),
    (compilation, "lower_step", lambda *_: Step()),
    (session.xla_cost, "memory_summary", lambda _: ""),
  ):
    monkeypatch.setattr(place, name, value)

  def go(scores):
    Scored.scores, Scored.held, Scored.folder = scores, [], tmp_path
    return train.run(config.lock(), str(tmp_path)), Scored.held

  return go


def checkpoints_of(folder):
  return checkpointer.Checkpoints(folder, keep=2, best_metric=METRIC, best_mode="min")


def test_a_step_is_saved_before_it_is_scored_and_a_fault_in_scoring_costs_nothing(run, tmp_path):
  with pytest.raises(OSError, match="step 2 cannot be scored"):
    run({})
  with checkpoints_of(tmp_path) as held:
    assert (held.steps(), held.scores(2)) == ([2], {})
  scores, on_disk = run({2: 0.5, 4: 0.25, 6: 0.75})
  assert scores == {METRIC: 0.75} and on_disk[0] == [2]
  with checkpoints_of(tmp_path) as held:
    assert (held.steps(), held.best_step()) == ([4, 6], 4)
    assert [held.scores(step)[METRIC] for step in (4, 6)] == [0.25, 0.75]


@pytest.mark.parametrize("blame", ["weights", "data", "neither"])
def test_a_loss_that_is_not_finite_is_blamed_on_what_its_step_was_given(run, monkeypatch, blame):
  """The second step is lost; the batch of that step, which is read again, or a frozen array holds infinity."""

  class Lost(Step):
    def __call__(self, state, batch):
      state, logs = super().__call__(state, batch)
      frozen = {"method/vae/a": jnp.full(2, np.inf if blame == "weights" else 1.0)}
      lost = {"train/loss": jnp.float32(np.nan)} if state.step == 2 else {}
      return state.replace(frozen=frozen), logs | lost

  class From(Batches):
    def __init__(self, begin):
      self.begin = begin

    def __next__(self):
      return {"image": jnp.full((6, 2, 2, 3), np.inf if blame == "data" and self.begin == 1 else 0.0)}

  monkeypatch.setattr(compilation, "lower_step", lambda *_: Lost())
  monkeypatch.setattr(session, "training_batches", lambda config, exp, dataset, mesh, begin, *_: From(begin))
  words = {
    "weights": r"The weights are to blame: .*method/vae/a \(2 numbers\)",
    "data": r"The data are to blame: .*image \(72 numbers\)",
    "neither": r"hold finite numbers only\. Lower config\.optim\.lr",
  }
  with pytest.raises(FloatingPointError, match=rf"^the loss of step 2 is nan, .*{words[blame]}"):
    run({})


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_the_step_under_way_and_twice_ends_at_once(run, tmp_path, monkeypatch, capsys, times):
  class Interrupted(Step):
    def __call__(self, state, batch):
      if state.step == 4:
        for _ in range(times):
          signal.raise_signal(signal.SIGINT)
      return super().__call__(state, batch)

  monkeypatch.setattr(compilation, "lower_step", lambda *_: Interrupted())
  with contextlib.nullcontext() if times == 1 else pytest.raises(SystemExit) as caught, multiprocess.report_errors():
    run({2: 0.5, 4: 0.25})
  printed = capsys.readouterr()
  assert printed.err.startswith("Ctrl-C: finishing and saving this step; press again to stop immediately\n")
  with checkpoints_of(tmp_path) as held:
    assert held.latest_step() == (5 if times == 1 else 4)
  if times == 1:
    assert "stopped by Ctrl-C after step 5, which is saved; the same command continues from there" in printed.out
  else:
    assert caught.value.code == 130
    assert printed.err.splitlines()[1:] == ["interrupted; step 4 is saved, the same command continues from there"]


def test_a_stop_during_the_evaluation_of_the_last_step_is_told(run, tmp_path, monkeypatch, capsys):
  with pytest.raises(OSError, match="step 6 cannot be scored"):
    run({2: 0.5, 4: 0.25})

  def stopped(scored, weights, should_stop):
    signal.raise_signal(signal.SIGTERM)
    assert should_stop()

  monkeypatch.setattr(Scored, "run", stopped)
  assert run({})[0] == {}
  printed = capsys.readouterr().out
  assert "stopped by SIGTERM at step 6" in printed and "nothing to do" not in printed


def test_the_newest_and_the_best_are_kept_whichever_it_is(run, tmp_path):
  run({2: 0.25, 4: 0.5, 6: 0.75})
  with checkpoints_of(tmp_path) as held:
    assert (held.steps(), held.best_step()) == ([2, 4, 6], 2)


def test_the_best_of_before_goes_when_the_last_is_better(run, tmp_path):
  run({2: 0.5, 4: 0.75, 6: 0.25})
  with checkpoints_of(tmp_path) as held:
    assert (held.steps(), held.best_step()) == ([4, 6], 6)
