"""Saving, keeping, restoring; the wish to stop."""

import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from vpd_jax.checkpoints import checkpointer
from vpd_jax.distributed import sharding
from vpd_jax.distributed.preemption import PreemptionGuard
from vpd_jax.types import TrainState

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(lambda _: -1e-2))
CONFIG = {"optim": {"lr": 5e-4, "lr_groups": [["/vae/", None]]}, "steps": 4}


def start(ema: bool = False) -> TrainState:
  numbers = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  params = {"method/unet/a/kernel": jnp.asarray(numbers), "neck/b/bias": jnp.ones(3, jnp.bfloat16)}
  return TrainState(
    step=jnp.int32(0),
    params=params,
    frozen={"method/vae/c/kernel": jnp.zeros((2, 2))},
    stats={},
    opt_state=OPTIMIZER.init(params),
    ema={name: value + 1 for name, value in params.items()} if ema else None,
  )


@jax.jit
def advance(state: TrainState) -> TrainState:
  grads = jax.tree.map(lambda p: p * (state.step + 1).astype(p.dtype), state.params)
  updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
  return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def abstract(state: TrainState) -> TrainState:
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return sharding.abstract(state, sharding.state_shardings(mesh, state))


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_four_steps_equal_two_and_two_bit_for_bit(tmp_path):
  state = advance(advance(start()))
  with checkpointer.Checkpoints(tmp_path) as saved:
    assert saved.save(2, state, CONFIG)
  with checkpointer.Checkpoints(tmp_path) as saved:
    assert saved.latest_step() == 2
    restored = saved.restore(2, abstract(start()))
    assert saved.restore_config(2) == CONFIG
  assert_same(restored, state)
  assert_same(advance(advance(restored)), advance(advance(state)))


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
  step = jax.jit(advance, donate_argnums=0)
  state, expected = advance(start()), advance(start())
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, state, CONFIG)
    for _ in range(5):
      state = step(state)
    saved.wait()
    assert_same(saved.restore(1, abstract(expected)), expected)


@pytest.mark.parametrize("mode, scores, best", [("min", (0.3, 0.1, 0.2, 0.5), 2), ("max", (0.3, 0.1, 0.2, 0.25), 1)])
def test_the_newest_and_the_best_are_kept(tmp_path, mode, scores, best):
  with checkpointer.Checkpoints(tmp_path, keep=1, best_metric="eval/x/rmse", best_mode=mode) as saved:
    for step, score in enumerate(scores, start=1):
      saved.save(step, start(), CONFIG, {"eval/x/rmse": score, "eval/x/other": 1.0})
    saved.wait()
    assert (saved.steps(), saved.latest_step(), saved.best_step()) == ([best, 4], 4, best)
  with checkpointer.Checkpoints(tmp_path, best_metric="eval/x/rmse", best_mode=mode, read_only=True) as saved:
    assert saved.best_step() == best


def test_a_missing_score_and_nan_are_never_best(tmp_path):
  with checkpointer.Checkpoints(tmp_path, keep=1, best_metric="rmse") as saved:
    for step, scores in enumerate(({"rmse": 3.0}, {"rmse": float("nan")}, None, {"other": 0.0}, None), start=1):
      saved.save(step, start(), CONFIG, scores)
    saved.wait()
    assert (saved.steps(), saved.best_step()) == ([1, 5], 1)


def test_without_scores_nothing_is_best(tmp_path):
  with checkpointer.Checkpoints(tmp_path, best_metric="rmse") as saved:
    assert (saved.latest_step(), saved.best_step(), saved.steps()) == (None, None, [])
    saved.save(1, start(), CONFIG, force=True)
    assert (saved.latest_step(), saved.best_step()) == (1, None)
    assert not saved.save(1, start(), CONFIG)
    saved.save(2, start(), CONFIG, {"other": 0.0}, force=True)
    assert (saved.latest_step(), saved.best_step()) == (2, None)


def test_weights_are_read_without_the_optimizer(tmp_path):
  state = start(ema=True)
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(7, state, CONFIG)
  with checkpointer.Checkpoints(tmp_path, read_only=True) as saved:
    weights = saved.restore_weights(7)
  assert weights.keys() == {"params", "frozen", "stats", "ema"}
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(weights))
  assert weights["params"]["neck/b/bias"].dtype == ml_dtypes.bfloat16
  assert_same({key: getattr(state, key) for key in ("ema", "frozen", "params", "stats")}, weights)


def test_a_state_that_does_not_fit_is_refused_with_the_names(tmp_path):
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, start(), CONFIG, force=True)
    other = start()
    other.params["neck/b/bias"] = jnp.ones(4, jnp.float32)
    other.stats["head/mean"] = jnp.ones(2)
    with pytest.raises(ValueError, match="does not fit the config in 2 arrays") as error:
      saved.restore(1, abstract(other))
    assert "params.neck/b/bias: bfloat16 [3] on disk, float32 [4] in the config" in str(error.value)
    assert "stats.head/mean: absent on disk, float32 [2] in the config" in str(error.value)
    assert str(error.value).endswith(
      f"or give --config.init.run={tmp_path} and another workdir, which starts from these weights."
    )
    with pytest.raises(ValueError, match=r"no checkpoint of step 9; it holds \[1\]"):
      saved.restore(9, abstract(start()))


def test_an_unusable_workdir_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "below"):
    assert not checkpointer.is_workdir(folder)
    with pytest.raises(ValueError, match=r"workdir=.* cannot be used") as error:
      checkpointer.Checkpoints(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"best_mode": "low"}, {"keep": 0}, {"keep_best": -1}])
def test_bad_options_are_refused(tmp_path, options):
  with pytest.raises(ValueError, match=next(iter(options))):
    checkpointer.Checkpoints(tmp_path, **options)


def test_a_read_only_look_creates_nothing(tmp_path):
  with checkpointer.Checkpoints(tmp_path / "none", read_only=True) as saved:
    assert saved.latest_step() is None
  assert not (tmp_path / "none").exists()


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, start(), CONFIG)
  assert checkpointer.is_workdir(tmp_path)
  (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
  with checkpointer.Checkpoints(tmp_path) as saved:
    assert saved.steps() == [1]
    assert saved.save(2, start(), CONFIG, force=True)
    assert saved.steps() == [1, 2]
  (tmp_path / "empty" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
  assert not checkpointer.is_workdir(tmp_path / "empty")
  assert not checkpointer.is_workdir(tmp_path / "absent")


@pytest.mark.multidevice
def test_saved_on_eight_devices_restored_on_one_and_on_four_and_without_any(tmp_path):
  large = {"a/kernel": jnp.arange(512 * 1024, dtype=jnp.float32).reshape(512, 1024)}
  state = start(ema=True)
  params = state.params | large
  state = state.replace(params=params, opt_state=OPTIMIZER.init(params))
  state = sharding.place(state, sharding.state_shardings(sharding.make_mesh(2, 4), state))
  assert state.params["a/kernel"].addressable_shards[0].data.shape == (512, 256)
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, state, CONFIG, force=True)
  with checkpointer.Checkpoints(tmp_path, read_only=True) as saved:
    for devices, part in ((1, 1024), (4, 256), (8, 128)):
      mesh = sharding.make_mesh(1, devices, devices=jax.devices()[:devices])
      restored = saved.restore(1, sharding.abstract(state, sharding.state_shardings(mesh, state)))
      assert restored.params["a/kernel"].addressable_shards[0].data.shape == (512, part)
      assert_same(restored, state)
    assert_same({key: getattr(state, key) for key in ("ema", "frozen", "params", "stats")}, saved.restore_weights(1))


@contextlib.contextmanager
def files_up_to(size):
  """The system refuses to let a file grow beyond that many bytes, as it does on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("force", [True, False])
def test_without_room_the_older_checkpoint_survives_and_the_line_says_so(tmp_path, force):
  state = {"a/b": jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)}
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, state, CONFIG, force=True)
    with files_up_to(100_000), pytest.raises(OSError, match="step 2 could not be written") as error:
      saved.save(2, state, CONFIG, force=force)
      saved.close()
    assert re.search(
      r"checkpoints: File too large; step 1 is still available\. Free up to 1 MiB of .* continues from step 1\.$",
      str(error.value),
    )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
  with checkpointer.Checkpoints(tmp_path) as saved:
    assert saved.steps() == [1] and saved.save(2, state, CONFIG, force=True)
    assert (saved.steps(), saved.restore_config(2)) == ([1, 2], CONFIG)
  with (
    files_up_to(100_000),
    pytest.raises(OSError, match=r"no checkpoint is available\. .* continues from step 0"),
    checkpointer.Checkpoints(tmp_path / "first") as saved,
  ):
    saved.save(1, state, CONFIG)


def test_scores_may_come_later(tmp_path):
  with checkpointer.Checkpoints(tmp_path, keep=1, best_metric="rmse") as saved:
    saved.save(1, start(), CONFIG, force=True)
    assert (saved.scores(1), saved.best_step()) == ({}, None)
    saved.add_scores(1, {"rmse": 0.5})
    assert (saved.scores(1), saved.best_step()) == ({"rmse": 0.5}, 1)
    for step in (2, 3):
      saved.save(step, start(), CONFIG, {"rmse": 0.7})
    saved.wait()
    assert saved.steps() == [1, 3]
    with pytest.raises(ValueError, match="no checkpoint of step 2"):
      saved.add_scores(2, {"rmse": 0.1})
  with checkpointer.Checkpoints(tmp_path, best_metric="rmse", read_only=True) as saved:
    assert (saved.best_step(), saved.scores(1)) == (1, {"rmse": 0.5})
    assert_same(saved.restore(1, abstract(start())), start())


def test_an_unknown_kind_of_workdir_is_one_line():
  with pytest.raises(ValueError, match=r"the scheme 'memory://' is unknown; use a path or 'gs://BUCKET'"):
    checkpointer.Checkpoints("memory://bucket/run")


def test_a_relative_workdir_is_taken_from_here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with checkpointer.Checkpoints("run") as saved:
    saved.save(1, {"a/b": jnp.ones(3)}, CONFIG, force=True)
  assert checkpointer.is_workdir("run") and checkpointer.is_workdir(tmp_path / "run")


def test_sigterm_is_a_request_and_the_old_handler_returns():
  before = signal.getsignal(signal.SIGTERM)
  with PreemptionGuard() as stop:
    assert not stop.requested and not stop.should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested and stop.should_stop()
  assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_signals_are_left_alone():
  seen = []

  def run():
    with PreemptionGuard() as stop:
      seen.append(stop.requested)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [False]


def test_an_exit_by_exception_still_finishes_the_save(tmp_path):
  code = f"""
import jax.numpy as jnp
from vpd_jax.checkpoints import checkpointer
with checkpointer.Checkpoints({str(tmp_path)!r}) as saved:
  saved.save(1, {{"a/b": jnp.ones(3)}}, {{}})
  raise RuntimeError("stop")
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert "RuntimeError: stop" in done.stderr
  assert checkpointer.is_workdir(tmp_path)


DAMAGE = {
  "state/manifest.ocdbt": ("cut", "remove"),
  "state/_METADATA": ("cut", "empty", "garble", "remove"),
  "state/d/*": ("cut", "garble", "remove"),
  "config/metadata": ("cut", "empty", "garble", "remove"),
}
HARM = {
  "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
  "empty": lambda file: file.write_bytes(b""),
  "garble": lambda file: file.write_bytes(b"\xeb" * file.stat().st_size),
  "remove": lambda file: file.unlink(),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads, after the error
def test_damage_is_called_damage(tmp_path):
  with checkpointer.Checkpoints(tmp_path / "whole") as saved:
    saved.save(1, start(), CONFIG, force=True)
  for pattern, kinds in DAMAGE.items():
    for kind in kinds:
      shutil.rmtree(tmp_path / "run", ignore_errors=True)
      shutil.copytree(tmp_path / "whole", tmp_path / "run")
      (file,) = (tmp_path / "run" / "checkpoints" / "1").glob(pattern)
      HARM[kind](file)
      with (
        checkpointer.Checkpoints(tmp_path / "run", read_only=True) as saved,
        pytest.raises(ValueError, match=r"checkpoint 1 of .* is damaged .*remove .*checkpoints/1,"),
      ):
        saved.restore_config(1) if "config" in pattern else saved.restore_weights(1)


@pytest.mark.parametrize(
  "error",
  [
    ConnectionResetError(104, "Connection reset by peer"),
    PermissionError(13, "Permission denied"),
    OSError(5, "Input/output error"),
    MemoryError(),
    ValueError('PERMISSION_DENIED: Error opening "zarr" driver: Error reading local file'),
    ValueError("UNAVAILABLE: CURL error[6] Could not resolve hostname"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
  ],
  ids=lambda error: type(error).__name__ + str(error)[:12],
)
def test_what_is_no_damage_is_not_called_so(tmp_path, monkeypatch, error):
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, start(), CONFIG, force=True)
    monkeypatch.setattr(saved._manager, "restore", mock.Mock(side_effect=error))
    monkeypatch.setattr(saved._manager, "metrics", mock.Mock(side_effect=error))
    reads = (lambda: saved.restore_config(1), lambda: saved.restore(1, abstract(start())), lambda: saved.scores(1))
    for read in reads:
      with pytest.raises(ValueError, match=r"cannot be read now \(.* keep it, check the connection") as caught:
        read()
      assert "remove" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_of_the_program_while_reading_stays_itself(tmp_path, monkeypatch):
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, start(), CONFIG, force=True)
    for error in (TypeError("a bug"), ValueError("a bug"), KeyError("bug")):
      monkeypatch.setattr(
        saved._manager, "restore", lambda *_, error=error, **__: exec("raise error", {"error": error})
      )
      with pytest.raises(type(error)) as caught:
        saved.restore_config(1)
      assert caught.value is error


@pytest.mark.parametrize("name", ["a[1]", "a[", "b]", "[!a]", "a*", "a?", "a\\b"])
def test_a_workdir_that_could_not_be_read_again_is_refused_before_anything_is_made(tmp_path, name):
  with pytest.raises(ValueError, match=r"workdir=.* holds .*; choose one without them"):
    checkpointer.Checkpoints(tmp_path / name / "run")
  assert not list(tmp_path.iterdir())


def test_the_first_save_of_a_run_is_read_back(tmp_path, monkeypatch):
  seen = []
  real = checkpointer.Checkpoints._saved
  monkeypatch.setattr(checkpointer.Checkpoints, "_saved", lambda self, step: seen.append(step) or real(self, step))
  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(1, start(), CONFIG)
    assert seen == [1]
    saved.save(2, start(), CONFIG)
  assert seen == [1]
  monkeypatch.setattr(checkpointer.Checkpoints, "_saved", lambda *_: {})
  with (
    checkpointer.Checkpoints(tmp_path / "other") as saved,
    pytest.raises(ValueError, match=r"checkpoint 1 of .*other.* cannot be read back; choose another --workdir"),
  ):
    saved.save(1, start(), CONFIG)


def test_a_folder_that_must_not_be_looked_into_is_not_taken_for_empty(tmp_path, monkeypatch):
  def refuse(path, *_, **__):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(os, "stat", refuse)
  with pytest.raises(ValueError, match=r"cannot be searched for checkpoints .*Permission denied"):
    checkpointer.is_workdir(tmp_path)


def test_orbax_says_nothing_of_what_is_as_it_should_be(tmp_path, caplog):
  with checkpointer.Checkpoints(tmp_path, best_metric="rmse") as held:
    held.save(1, start(), CONFIG, {}, force=True)
  with checkpointer.Checkpoints(tmp_path, read_only=True) as held:
    held.restore_weights(1)
  assert [record.getMessage() for record in caplog.records if record.name == "absl"] == []


def test_scores_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with checkpointer.Checkpoints(tmp_path) as saved:
    saved.save(2, start(), CONFIG, force=True)
    monkeypatch.setattr(checkpointer.ocp.Checkpointer, "save", full)
    words = "the scores of step 2 could not be written to .*: No space left on device; step 2 is still available"
    with pytest.raises(OSError, match=words):
      saved.add_scores(2, {"rmse": 0.5})
