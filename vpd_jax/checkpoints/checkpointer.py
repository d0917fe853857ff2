"""Checkpoints of a run: state, step and config in one orbax directory.

`<workdir>/checkpoints/<step>/` contains `state` (the TrainState), `config` (JSON) and optionally `metrics`. A directory
gets its final name only when it is complete. With several processes, all of them make the same calls in the same order,
and each writes its own shards of the arrays.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from vpd_jax.errors import UserError, check_choice, first_items, one_line
from vpd_jax.files import paths, read_errors
from vpd_jax.models import lora
from vpd_jax.types import Fields, Options, ParamDict, PyTree

WEIGHTS = ("params", "frozen", "stats", "ema")
FOLDER = "checkpoints"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # device, quota and file size: not enough space
_STATUS = re.compile(r"[A-Z_]+: ")  # prefix of errors of the array storage library, which are ValueErrors


def _is_relevant(record: logging.LogRecord) -> bool:
  """Whether a log record is not one of orbax's warnings about intended behavior, such as a read-only folder."""
  return record.levelno >= logging.ERROR or "orbax" not in record.pathname or absl_logging.level_debug()


absl_logging.get_absl_logger().addFilter(_is_relevant)


class Checkpoints:
  """The checkpoints of one workdir: keeps the newest `keep` and the best `keep_best`.

  Saving is asynchronous: `save` returns when the state has been copied, so that it can be donated; `close` (or leaving
  the `with`) waits until everything is written. The first `save` also waits, and verifies what it has written.

  Args:
    workdir: a local folder or a bucket ('gs://...').
    keep: number of newest checkpoints to keep.
    keep_best: number of best checkpoints to keep in addition.
    best_metric: full name of the metric, e.g. 'eval/nyu/rmse'; None: no best checkpoints.
    best_mode: 'min' or 'max': which values are better. NaN and missing values are the worst.
    read_only: do not create, clean up or write anything.

  Raises:
    ValueError: an invalid option, or a workdir that cannot be created, read or written.
  """

  def __init__(
    self,
    workdir: str | epath.PathLike,
    *,
    keep: int = 3,
    keep_best: int = 1,
    best_metric: str | None = None,
    best_mode: str = "min",
    read_only: bool = False,
  ):
    check_choice("best_mode", best_mode, ["max", "min"])
    if keep < 1 or keep_best < 0:
      raise UserError(f"keep={keep} and keep_best={keep_best}: keep at least one checkpoint, and no fewer than 0 best.")
    self._best_metric, self._keep, self._keep_best = best_metric, keep, keep_best
    self._sign = 1 if best_mode == "max" else -1
    self._directory, self._read_back = _directory(workdir), False
    paths.check_name(self._directory, "workdir")
    # Orbax's own max_to_keep with best_fn would drop the newest checkpoint where it is not among the best.
    preserved: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
    if best_metric is not None:
      preserved.append(policies.BestN(get_metric_fn=self._score, n=keep_best, keep_checkpoints_without_metrics=False))
    try:
      self._manager = _Manager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policies.AnyPreservationPolicy(preserved),
          best_fn=self._score if best_metric is not None else None,
          best_mode="max",
          create=not read_only,
          read_only=read_only,
          cleanup_tmp_directories=not read_only,
        ),
        # Limits the memory of copies during writing, otherwise up to the size of the state.
        item_handlers={
          "state": ocp.StandardCheckpointHandler(save_concurrent_gb=1),
          "config": ocp.JsonCheckpointHandler(),
        },
      )
    except Exception as error:
      if not isinstance(error, OSError) and "://" not in str(workdir):  # buckets raise errors of any type
        raise
      raise UserError(f"workdir={str(workdir)!r} cannot be used: {error}; choose another.") from error

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def save(
    self,
    step: int,
    state: PyTree,
    config: str | Options,
    metrics: Mapping[str, float] | None = None,
    *,
    force: bool = False,
  ) -> bool:
    """Saves asynchronously, after waiting for an earlier save; returns False if this step is already saved.

    Args:
      step: the number of finished steps.
      state: a TrainState, or any tree of arrays.
      config: as a mapping or as JSON.
      metrics: metrics of this state, stored with it; `best_metric` selects the best checkpoints.
      force: waits until the checkpoint is on disk, as needed before an exit.

    Raises:
      OSError: this checkpoint or the previous one could not be written; one line with the cause and the newest
        remaining checkpoint.
    """
    saved = False
    if step not in self._manager.all_steps():
      self.wait()
      self._writing, self._bytes = step, sum(x.nbytes for x in jax.tree.leaves(state))
      items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        config=ocp.args.JsonSave(json.loads(config) if isinstance(config, str) else dict(config)),
      )
      with self._reported():
        saved = self._manager.save(step, args=items, metrics=_floats(metrics) if metrics else None)
    if force or (saved and not self._read_back):
      self.wait()
    if saved and not self._read_back:
      self._read_back = True
      if _described(self._saved(step)) != _described(state):
        raise UserError(f"checkpoint {step} of {self._directory} cannot be read back; choose another --workdir.")
    return saved

  def scores(self, step: int) -> dict[str, float]:
    """The metrics of a saved step; empty if it has none."""
    with self._read(step):
      return self._manager.metrics(step) or {}

  def add_scores(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds metrics to a saved step that has none, as if they had been saved with it; waits until they are on disk."""
    self.wait()
    self._check_exists(step)
    self._writing, self._bytes = step, 2**20
    with self._reported("scores"), ocp.Checkpointer(ocp.JsonCheckpointHandler("metrics")) as writer:
      writer.save(self._directory / str(step) / "metrics", args=ocp.args.JsonSave(_floats(metrics)))
    self._manager.reload()
    if self._best_metric is not None:
      steps = self.steps()
      scored = sorted((s for s in steps if self.scores(s)), key=lambda s: self._score(self.scores(s)))
      steps_to_keep = {*steps[-self._keep :], *scored[max(len(scored) - self._keep_best, 0) :]}
      # Earlier best checkpoints would remain until the next save. All processes must have listed the steps before the
      # first one deletes any: deleting is collective.
      ocp.multihost.sync_global_processes(f"vpd_jax/add_scores/{step}")
      for other in sorted(set(steps) - steps_to_keep):
        self._manager.delete(other)

  def steps(self) -> list[int]:
    """The saved steps in ascending order."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest step; None without checkpoints."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step with the best metric; None if none has one that is a number."""
    step = self._manager.best_step() if self._best_metric is not None else None
    # Orbax ranks a step with other metrics, too: below all others, but it may be the only one.
    return step if step is not None and self._score(self.scores(step)) > -math.inf else None

  def restore(self, step: int, state: PyTree) -> PyTree:
    """Restores the state onto the devices of `state`, independent of the mesh it was saved from.

    Args:
      step: one of `steps()`.
      state: ShapeDtypeStructs with shardings, e.g. from `sharding.abstract`.

    Raises:
      ValueError: names, shapes or dtypes differ; states their number and lists the first ten.
    """
    self._check_same(step, state)
    with self._read(step):
      return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(state)))["state"]

  def restore_config(self, step: int) -> Fields:
    """The config this step was trained with, as plain values; tuples are restored as lists."""
    self._check_exists(step)
    with self._read(step):
      return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

  def evaluated(self, step: int, weights: Mapping[str, ParamDict]) -> ParamDict:
    """All arrays of the model for evaluation, from the `restore_weights` of this step.

    Uses the moving average if there is one, and merges LoRA into its kernels.
    """
    named = weights["params"] | weights["frozen"] | weights["stats"] | weights.get("ema", {})
    if not any(name.startswith(lora.PREFIX) for name in named):
      return named
    return lora.merged(named, self.restore_config(step)["lora"]["alpha"])

  def restore_weights(self, step: int, skip: tuple[str, ...] = ()) -> dict[str, dict[str, np.ndarray]]:
    """Restores parameters and statistics to the host: {'params', 'frozen', 'stats'} and, if saved, 'ema'.

    Skips the optimizer state, which is two thirds of a checkpoint, and names that start with one of `skip`.
    """
    saved = self._saved(step)
    template = {
      k: w for k in WEIGHTS if (w := {n: x for n, x in (saved.get(k) or {}).items() if not n.startswith(skip)})
    }
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
    with self._read(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      weights = reader.restore(
        self._directory / str(step) / "state",
        args=ocp.args.PyTreeRestore(item=template, restore_args=arguments, partial_restore=True),
      )
    return {"params": {}, "frozen": {}, "stats": {}} | weights

  def wait(self) -> None:
    """Waits until all saves are on disk; raises like `save`."""
    with self._reported():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then stops the background threads; raises like `save`."""
    try:
      self.wait()
    finally:
      self._manager.close()

  @contextlib.contextmanager
  def _reported(self, what: str = "checkpoint") -> Iterator[None]:
    """Converts a write error to one line, and removes the incomplete files, which frees their space."""
    try:
      yield
    except (OSError, ValueError) as error:
      if isinstance(error, ValueError) and not _STATUS.match(str(error)):
        raise
      for part in self._directory.glob(f"{self._writing}.*"):  # unfinished; a finished one has no suffix
        with contextlib.suppress(OSError):
          part.rmtree()
      code = error.errno if isinstance(error, OSError) else None
      text = one_line(error)
      full = [os.strerror(number) for number in _FULL if number == code or os.strerror(number) in text]
      cause, remedy = (
        (full[0], f"Free up to {self._bytes / 2**20:,.0f} MiB of disk space") if full else (text, "Fix that")
      )
      newest = max(ocp.utils.checkpoint_steps(self._directory), default=None)
      raise OSError(
        f"the {what} of step {self._writing} could not be written to {self._directory}: {cause}; "
        + ("no checkpoint is available. " if newest is None else f"step {newest} is still available. ")
        + f"{remedy}, and run the same command again: it continues from step {newest or 0}."
      ) from error

  def _score(self, metrics: Mapping[str, float]) -> float:
    """The metric as a score: larger is better in both modes."""
    value = self._sign * metrics.get(cast(str, self._best_metric), math.nan)
    return -math.inf if math.isnan(value) else value

  def _check_exists(self, step: int) -> None:
    """Raises if there is no such checkpoint."""
    if step not in self._manager.all_steps():
      raise UserError(f"{self._directory} holds no checkpoint of step {step}; it holds {self.steps() or 'none'}.")

  def _saved(self, step: int) -> Fields:
    """Names, shapes and dtypes of the arrays on disk."""
    self._check_exists(step)
    with self._read(step):
      return ocp.StandardCheckpointHandler().metadata(self._directory / str(step) / "state").tree

  def _read(self, step: int) -> contextlib.AbstractContextManager:
    """A context that converts read errors, see read_errors.explained."""
    older = max((other for other in self.steps() if other < step), default=None)
    consequence = "start in another workdir" if older is None else f"step {older} is then used"
    return read_errors.explained(f"checkpoint {step} of {self._directory}", self._directory / str(step), consequence)

  def _check_same(self, step: int, state: PyTree) -> None:
    """Raises if the arrays on disk differ from `state`: orbax would silently cast, truncate or pad them."""
    saved, expected = _described(self._saved(step)), _described(state)
    problems = [
      f"{name}: {saved.get(name, 'absent')} on disk, {expected.get(name, 'absent')} in the config"
      for name in sorted(saved.keys() | expected.keys())
      if saved.get(name) != expected.get(name)
    ]
    if problems:
      raise UserError(
        f"checkpoint {step} of {self._directory} does not fit the config in {len(problems)} arrays: "
        f"{first_items(problems, '; ')}. Undo the change of the config, or give --config.init.run="
        f"{self._directory.parent} and another workdir, which starts from these weights."
      )


class _Manager(ocp.CheckpointManager):
  """Orbax's manager without preemption handling, which conflicts with preemption.PreemptionGuard."""

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def is_workdir(path: str | epath.PathLike) -> bool:
  """Whether a folder contains at least one complete checkpoint of a run; raises if it is not accessible."""
  try:
    folder = _directory(path)
    is_folder = folder.is_dir() if "://" in str(folder) else stat.S_ISDIR(os.stat(folder).st_mode)
    return is_folder and bool(ocp.utils.checkpoint_steps(folder))
  except (PermissionError, ConnectionError, TimeoutError) as error:
    raise UserError(f"{path} cannot be searched for checkpoints ({error}); fix that and try again.") from error
  except Exception:  # other errors of the file system are reported when the source is read
    return False


def newest_config(workdir: str | epath.PathLike) -> Fields:
  """The config of the newest checkpoint of a workdir, which must have one; see Checkpoints.restore_config."""
  with Checkpoints(workdir, read_only=True) as saved:
    return saved.restore_config(cast(int, saved.latest_step()))


def _directory(workdir: str | epath.PathLike) -> epath.Path:
  """The folder of the checkpoints; absolute, as required by orbax."""
  try:
    path = epath.Path(workdir)
  except KeyError as error:
    raise UserError(f"workdir={str(workdir)!r}: the scheme {error} is unknown; use a path or 'gs://BUCKET'.") from error
  return (path if "://" in str(workdir) else path.expanduser().resolve()) / FOLDER


def _floats(metrics: Mapping[str, float]) -> dict[str, float]:
  """Metrics as JSON numbers."""
  return {name: float(value) for name, value in metrics.items()}


def _described(tree: PyTree) -> dict[str, str]:
  """{path: 'dtype [shape]'} of arrays, or of orbax's metadata of them."""
  # A simple path, because fields of named tuples are stored as keys.
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {name(path): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}" for path, leaf in leaves}
