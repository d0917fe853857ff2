"""Runs that are ended from outside: killed at any instant, stopped in the middle of things, left without room on disk.

What follows is always the undisturbed run, bit for bit.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.rooms_runs import arrays
from tests.helpers.stopped_runs import STEPS, assert_final, command, config
from vpd_jax.checkpoints.checkpointer import Checkpoints
from vpd_jax.evaluation import evaluate
from vpd_jax.training import train

KILLS = 20
SECONDS = 300  # after which a process is ended


def begin(workdir, **changes):
  return subprocess.Popen(
    command(workdir, **changes), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
  )


def read_until(process, start):
  """Reads lines up to the one that begins so."""
  seen = []
  for line in process.stdout:
    seen.append(line)
    if line.startswith(start):
      return
  raise AssertionError("".join(seen))


def kill(process):
  process.kill()
  process.communicate()


def unfinished(workdir):
  """Checkpoints that a save has begun and not ended."""
  return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """(final arrays, scores)."""
  workdir = tmp_path_factory.mktemp("undisturbed")
  scores = train.run(config(), str(workdir))
  return arrays(workdir, STEPS), scores


@pytest.mark.slow
def test_killed_inside_a_save_and_inside_a_step_a_run_continues_bit_for_bit(undisturbed, tmp_path):
  first = begin(tmp_path)
  deadline = time.time() + SECONDS
  while not unfinished(tmp_path) and time.time() < deadline:
    assert first.poll() is None, first.stdout.read()
  first.kill()  # a save takes a second or so: the folder was seen milliseconds ago
  first.communicate()
  assert unfinished(tmp_path)
  second = begin(tmp_path)
  read_until(second, "step 3/")
  kill(second)
  with Checkpoints(tmp_path, read_only=True) as held:
    assert held.latest_step() in (1, 2, 3, 4)
  train.run(config(**{"data.workers": 2}), str(tmp_path))  # their number changes nothing
  assert not unfinished(tmp_path)
  assert_final(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_killed_at_twenty_instants_a_run_continues_bit_for_bit(undisturbed, tmp_path):
  """Every fifth instant is one of the whole life of the process, the others lie between its first step and its end."""
  whole = begin(tmp_path / "measured")
  zero = time.time()
  read_until(whole, "compiled")
  compiled = time.time() - zero
  whole.communicate(timeout=SECONDS)
  end = time.time() - zero
  chance, kills, inside = random.Random(0), 0, 0
  while kills < KILLS:
    workdir = tmp_path / "killed"
    process = begin(workdir)
    if kills % 5:
      read_until(process, "compiled")
      time.sleep(chance.uniform(0, end - compiled))
    else:
      time.sleep(chance.uniform(0, end))
    alive = process.poll() is None
    kill(process)
    if alive:
      with Checkpoints(workdir, read_only=True) as held:
        step = held.latest_step()
      kills, inside = kills + 1, inside + bool(unfinished(workdir))
      print(f"kill {kills}: newest checkpoint {step}, unfinished {len(unfinished(workdir))}", flush=True)
      again = subprocess.run(command(workdir), cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
      assert again.returncode == 0, again.stderr
      assert_final(workdir, undisturbed[0])
    shutil.rmtree(workdir, ignore_errors=True)
  print(f"{kills} kills, {inside} of them inside a save")
  assert inside >= KILLS // 5


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_step_ends_with_code_0_and_the_rest_follows(undisturbed, tmp_path):
  process = begin(tmp_path, save_every=STEPS, eval_every=STEPS)
  read_until(process, "step 1/")
  process.terminate()  # the second step is under way
  rest, _ = process.communicate(timeout=SECONDS)
  assert process.returncode == 0, rest
  step = int(re.search(r"stopped by SIGTERM after step (\d+), which is saved", rest)[1])
  with Checkpoints(tmp_path, read_only=True) as held:
    assert held.steps() == [step] and step < STEPS
  train.run(config(), str(tmp_path))
  assert_final(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_sigterm_in_an_evaluation_saves_at_once_and_the_scores_are_made_up_for(
  undisturbed, tmp_path, monkeypatch, capsys
):
  asked = []

  def measured(self, weights, panels):
    with contextlib.closing(original(self, weights, panels)) as inner:
      for i, row in enumerate(inner):
        asked.append(i)
        if i == 1:
          os.kill(os.getpid(), signal.SIGTERM)
        yield row

  original = evaluate._Batches.__call__
  with monkeypatch.context() as patch:
    patch.setattr(evaluate._Batches, "__call__", measured)
    assert train.run(config(keep=10), str(tmp_path)) == {}
    assert asked == [0, 1]  # of three
    assert "stopped by SIGTERM after step 3, which is saved" in capsys.readouterr().out
    with Checkpoints(tmp_path, best_metric="eval/rooms/rmse", read_only=True) as held:
      assert (held.latest_step(), held.scores(3)) == (3, {})
    train.run(config(keep=10), str(tmp_path))  # stopped again, in the evaluation that is made up for
    assert "stopped by SIGTERM at step 3" in capsys.readouterr().out
  (tmp_path / "checkpoints" / "3" / "metrics.orbax-checkpoint-tmp").mkdir()  # as after a kill in add_scores
  scores = train.run(config(keep=10), str(tmp_path))
  assert "step 3 was saved without scores" in capsys.readouterr().out
  assert scores == undisturbed[1]
  assert_final(tmp_path, undisturbed[0])
  with Checkpoints(tmp_path, best_metric="eval/rooms/rmse", read_only=True) as held:
    assert held.scores(3).keys() == held.scores(STEPS).keys() == scores.keys()
    assert held.best_step() in (3, STEPS)
  assert train.run(config(keep=10), str(tmp_path)) == {}  # nothing is left to do


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small disk is mounted, which root may")
def test_on_a_full_disk_the_older_checkpoint_survives_and_a_larger_disk_continues(undisturbed, tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, text=True)
  if mounted.returncode:
    pytest.skip(f"mount is not permitted: {mounted.stderr}")
  try:
    process = begin(disk / "run", keep=10)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, output
    line = output.splitlines()[-1]
    found = re.fullmatch(
      r"error: the checkpoint of step (\d) could not be written to .*/checkpoints: No space left on device; step (\d) "
      r"is still available\. Free up to \d+ MiB of disk space, and run the same command again: "
      r"it continues from step \2\.",
      line,
    )
    assert found, output
    assert "Traceback" not in output and not unfinished(disk / "run")
    with Checkpoints(disk / "run", read_only=True) as held:
      assert held.latest_step() == int(found[2]) == int(found[1]) - 1
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    train.run(config(keep=10), str(disk / "run"))
    assert_final(disk / "run", undisturbed[0])
  finally:
    subprocess.run(["umount", "-l", disk], check=True)
