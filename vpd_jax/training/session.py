"""The objects of a training run, and its actions at each event of the loop."""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.checkpoints import initialize, workdir_lock
from vpd_jax.config import fields, loader
from vpd_jax.convert.finite import check_finite
from vpd_jax.data import pipeline
from vpd_jax.distributed import sharding
from vpd_jax.distributed.preemption import PreemptionGuard
from vpd_jax.evaluation import evaluate
from vpd_jax.experiment import Experiment
from vpd_jax.monitoring import chips, progress, writers, xla_cost
from vpd_jax.monitoring.profiler import Profiler
from vpd_jax.monitoring.writers import log
from vpd_jax.training import compilation, startup_report
from vpd_jax.types import Array, Batch


class _Dispatched(NamedTuple):
  """A step that has not been checked for NaN and infinity, and that the devices may not have finished."""

  step: int
  loss: Any  # an Array, whose type stub lacks is_ready
  gradient_norm: Array


class TrainingSession:
  """A training run from the last checkpoint of its workdir, or from its initial weights; use it in a `with`.

  Attributes:
    state: TrainState after `step`.
    step: finished steps.
    scores: of the last evaluation; empty before the first.
    guard: notices a request to stop.
  """

  def __init__(self, config: ConfigDict, workdir: str, *, accept_changes: bool = False):
    """Assembles the run and finds its files; nothing is written yet.

    Args:
      config, workdir, accept_changes: see train.run.

    Raises:
      ValueError: in one line, for anything that cannot be assembled or found.
    """
    with progress.phase("assemble"):
      config = with_keypoint_names(initialize.with_backbone_sizes(config, initialize.source_of(config)))
      self._config, self._workdir, self._accept_changes = config, os.path.expanduser(workdir), accept_changes
      self._experiment = experiment.assemble(config)
    initialize.check_training(config, self._experiment)
    self._mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    pipeline.check_batch_size(config.data.batch_size // config.optim.accumulation, self._mesh.size, "devices")
    with progress.phase("open data"):
      self._dataset = experiment.dataset(config, self._experiment)
      self._dataset.source("train")  # raises for a missing file before anything is written
      self._evaluator = evaluate.Evaluator(config, self._experiment, self._dataset, self._mesh)
    self._scored_step: int | None = None
    self._unchecked: list[_Dispatched] = []
    self._logs: dict[str, Array] = {}
    self.scores: dict[str, float] = {}

  def __enter__(self) -> "TrainingSession":
    with contextlib.ExitStack() as stack:
      self._resume(stack)
      self._stack = stack.pop_all()
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool | None:
    if isinstance(error, KeyboardInterrupt):
      saved = self._checkpoints.latest_step()
      error.add_note(
        "nothing is saved" if saved is None else f"step {saved} is saved, the same command continues from there"
      )
    return self._stack.__exit__(kind, error, trace)

  def _resume(self, stack: contextlib.ExitStack) -> None:
    """Locks the workdir, restores the state and writes the start-up report."""
    config, exp, mesh = self._config, self._experiment, self._mesh
    # Before opening the checkpoints, which removes unfinished ones that another run may be writing.
    lock_warnings = [] if jax.process_index() else stack.enter_context(workdir_lock.claimed(self._workdir))
    self._checkpoints = stack.enter_context(initialize.checkpoints(config, exp, self._workdir))
    self.guard = stack.enter_context(PreemptionGuard())
    with progress.phase("load weights"):
      self.state, lines = initialize.resume_or_start(
        config, exp, mesh, self._checkpoints, accept_changes=self._accept_changes
      )
    self.step = self._begin = int(self.state.step)
    lines += lock_warnings
    lines += self._dataset.describe(skip_unreadable=config.data.on_bad_record == "skip")
    lines += [*experiment.sentence_lines(exp, self._dataset), *self._evaluator.encodings.lines()]
    # Only now, so that a rejected workdir is not changed.
    self._writer = stack.enter_context(
      writers.create(self._workdir, just_logging=jax.process_index() > 0, backend=config.writer)
    )
    startup_report.describe(config, exp, mesh, self._writer, self._workdir, lines, self.step)
    self._progress = writers.Progress(config.num_steps, config.data.batch_size, start=self.step, devices=mesh.size)

  def prepare(self) -> None:
    """Opens the input at the next step, and compiles the training step."""
    with self._progress.pause():
      batches = self._batches = self._stack.enter_context(contextlib.closing(self._read(self.step)))
      with progress.phase("first batch"):
        first = next(batches)
      self._input: Iterator[Batch] = itertools.chain([first], batches)
      begin = time.monotonic()
      with progress.phase("trace"):
        lowered = compilation.lower_step(self._config, self._experiment, self._mesh, first)
      traced = time.monotonic()
      with progress.phase("compile"):
        compiled = self._compiled = lowered.compile(xla_cost.compiler_options(self._mesh))
      seconds = f"traced in {traced - begin:.1f} s, compiled in {time.monotonic() - traced:.1f} s"
      # XLA counts the body of a loop once: multiply by the number of accumulated parts.
      self._flops = (compiled.cost_analysis() or {}).get("flops", 0.0) * self._config.optim.accumulation
      # Counting takes seconds of tracing, and is only needed for accelerators with a known peak.
      known = chips.chip_for(self._mesh.devices.flat[0].device_kind)
      self._model_flops = compilation.model_flops(self._config, first) / self._mesh.size if known else 0.0
      memory = xla_cost.memory_summary(compiled)
      log(f"compiled; {self._flops / 1e9:.1f} GFLOP and {memory} per device and step; {seconds}")
      text = lambda: xla_cost.text(compiled)
      self._profiler = self._stack.enter_context(Profiler(self._config.profile, self._workdir, log, text))

  def train_step(self) -> None:
    """Trains on the next batch; returns before the devices have finished."""
    batch = next(self._input)
    self.step += 1
    self._profiler.on_step_start(self.step - self._begin, self._logs)
    with progress.phase("first step") if self.step == self._begin + 1 else contextlib.nullcontext():
      self.state, self._logs = self._compiled(self.state, batch)
      if self.step == self._begin + 1:
        jax.block_until_ready(self._logs)
    self._unchecked.append(_Dispatched(self.step, self._logs["train/loss"], self._logs["norm/gradients"]))

  def finished_steps(self) -> int:
    """Steps that the devices have finished, including earlier runs; `step` counts the dispatched ones."""
    return self.step - sum(not dispatched.loss.is_ready() for dispatched in [*self._unchecked])

  def write_logs(self) -> None:
    """Writes the logs of the step and the speed of the run.

    Raises:
      FloatingPointError: the loss or a gradient is not finite; names the step.
    """
    self._check_finite()
    line, speed = self._progress.report(self.step, float(self._logs["train/loss"]))
    speed |= xla_cost.rates(speed.get("perf/step_ms", math.inf) / 1e3, self._flops, self._model_flops)
    speed |= {"perf/input_wait_ms": self._batches.mean_wait_ms(), "data/skipped_rows": self._batches.skipped}
    self._writer.write_scalars(self.step, jax.device_get(self._logs) | speed)
    log(line)

  def save(self, *, wait: bool = False) -> None:
    """Saves the state in the background; with `wait`, returns when it is on disk. Raises as `write_logs` does."""
    with self._progress.pause():
      self._check_finite()
      with progress.phase(f"save step {self.step}"):
        self._checkpoints.save(self.step, self.state, initialize.to_json(self._config), force=wait)

  def evaluate(self) -> None:
    """Evaluates, adds the scores to the checkpoint, and logs them; does nothing if it is stopped."""
    with self._progress.pause():
      state = self.state
      result = self._evaluator.run((state.ema or state.params, state.frozen, state.stats), self.guard.should_stop)
      if result is None:
        return
      self._checkpoints.add_scores(self.step, result.scores)
      self.scores, self._scored_step = result.scores, self.step
      if jax.process_index() == 0:
        log(self._evaluator.report(result.scores, result.rows))
        trivial = {f"eval/trivial/{name}": value for name, value in self._evaluator.baselines().items()}
        self._writer.write_scalars(self.step, result.scores | trivial)
        self._writer.write_images(self.step, {f"panels/{self._config.data.name}": result.panels})
        if comparison := self._evaluator.comparison(result.scores):
          log(comparison)

  def has_scores(self) -> bool:
    """Whether the checkpoint of this step has scores."""
    return bool(self._checkpoints.scores(self.step))

  def report_stop(self) -> None:
    """Logs that the run was stopped early, after the checkpoint is on disk."""
    if self.guard.requested and (self.step < self._config.num_steps or self._scored_step != self.step):
      self._checkpoints.wait()
      log(
        f"stopped by {self.guard.cause} after step {self.step}, which is saved; the same command continues from there"
      )

  def _read(self, begin: int) -> pipeline.Prefetch:
    encode = lambda local: self._evaluator.encodings(local, self.state.frozen)
    return training_batches(self._config, self._experiment, self._dataset, self._mesh, begin, encode)

  def _check_finite(self) -> None:
    def batch_of(step: int) -> Batch:
      with contextlib.closing(self._read(step - 1)) as batches:
        return next(batches)

    self._unchecked = check_finite(self._unchecked, self.state, batch_of)


def with_keypoint_names(config: ConfigDict) -> ConfigDict:
  """The config with the names of keypoints that its data set reads from its files, which prediction then does not need.

  Raises:
    ValueError: the file cannot be read, or names no keypoints.
  """
  if config.data.get("keypoints") != ():
    return config
  known = fields.look_up(experiment.DATASETS, config.data, "data", more=experiment.NOT_OF_THE_DATASET)
  return loader.changed(config, {"data.keypoints": known.info(config.data).keypoints.names})


def training_batches(
  config: ConfigDict,
  exp: Experiment,
  dataset: Any,
  mesh: Mesh,
  begin: int,
  encode: Callable[[pipeline.Batches], Any] = lambda local: local,
) -> pipeline.Prefetch:
  """The training batches after `begin` finished steps, on the mesh, after `encode` of this process' rows."""
  local = pipeline.train_batches(
    dataset,
    batch_size=config.data.batch_size,
    seed=config.seed,
    start_step=begin,
    workers=config.data.workers,
    keys=experiment.batch_keys(exp, dataset),
    prepare=exp.method.prepare,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    on_bad_record=config.data.on_bad_record,
    reshuffle_each_epoch=config.data.get("reshuffle_each_epoch", True),
  )
  return pipeline.Prefetch(encode(local), sharding.batch_sharding(mesh))
