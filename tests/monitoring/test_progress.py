"""Phases of a command: silent in a library, a line each in a command, and what long ones have reached."""

import io
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers.paths import ROOT
from vpd_jax.monitoring import progress


@pytest.fixture
def shown():
  progress.show()
  yield
  progress.hide()


def run(name="compile", seconds=0.0, **options):
  with progress.phase(name, **options) as phase:
    for _ in range(phase.total):
      phase.advance()
    time.sleep(seconds)


def test_a_library_prints_nothing_unasked(capsys):
  run()
  progress.say("a line")
  assert capsys.readouterr() == ("", "")


def test_a_phase_is_one_line_with_its_seconds(shown, capsys):
  run()
  run("evaluate", total=3, unit="records")
  printed = capsys.readouterr()
  assert re.fullmatch(r"compile: [\d.]+ s\nevaluate: 3 records in [\d.]+ s\n", printed.out) and not printed.err


def test_a_phase_that_fails_has_no_line_and_leaves_no_thread(shown, capsys):
  with pytest.raises(ValueError), progress.phase("compile"):
    raise ValueError
  assert capsys.readouterr() == ("", "")
  assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def wait(reached):
  """Returns as soon as a thread has done something; a busy machine may take seconds."""
  end = time.monotonic() + 20
  while not reached() and time.monotonic() < end:
    time.sleep(0.01)


def test_a_long_phase_says_in_between_what_it_has_reached(shown, capsys, monkeypatch):
  said = []
  monkeypatch.setattr(progress, "INTERVAL", 0.02)
  monkeypatch.setattr(progress, "write", said.append)
  with progress.phase("compile"):
    wait(lambda: said)
  assert re.fullmatch(r"compile: \d+s", said[0]) and re.fullmatch(r"compile: [\d.]+ s", said[-1])


def test_a_phase_whose_log_goes_on_says_nothing_in_between(shown, capsys, monkeypatch):
  monkeypatch.setattr(progress, "INTERVAL", 0.02)
  monkeypatch.setattr(progress, "_written", [time.monotonic() + 1000])
  with progress.phase("train"):
    time.sleep(0.2)
  assert len(capsys.readouterr().out.splitlines()) == 1


def test_on_a_terminal_a_line_is_redrawn_and_the_last_one_stays(shown, capsys, monkeypatch):
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", screen)
  monkeypatch.setattr(progress, "_REDRAW", 0.02)
  with progress.phase("compile", total=2, unit="names") as phase:
    phase.advance(2)
    wait(lambda: "names" in screen.getvalue())
  assert "\rcompile: 2 of 2 names, " in screen.getvalue() and "\n" not in screen.getvalue().strip()
  assert re.fullmatch(r"compile: 2 names in [\d.]+ s\n", capsys.readouterr().out)


def test_the_time_left_does_not_count_the_first_part_which_compiles():
  now = [0.0]
  phase = progress.Phase("evaluate", 100, "records", clock=lambda: now[0])
  assert phase.under_way() == "evaluate: 0 of 100 records, 0s"
  now[0] = 60
  phase.advance(10)
  assert phase.remaining is None and phase.under_way() == "evaluate: 10 of 100 records, 1m00s"
  now[0] = 62
  phase.advance(10)
  assert phase.under_way() == "evaluate: 20 of 100 records, 1m02s, ETA 16s"
  assert phase.finished() == "evaluate: 20 records in 62.0 s, the first 10 in 60.0 s"


def test_what_is_reached_may_be_asked_for():
  phase = progress.Phase("train", 40, "steps", reached=lambda: 7, clock=lambda: 0.0)
  assert phase.under_way() == "train: 7 of 40 steps, 0s" and phase.finished() == "train: 7 steps in 0.0 s"


@pytest.mark.parametrize(
  "seconds, text",
  [(-1, "0s"), (59.4, "59s"), (59.6, "1m00s"), (462, "7m42s"), (11259, "3h07m"), (183600, "2d03h")],
)
def test_durations_are_short(seconds, text):
  assert progress.duration(seconds) == text


# What a command prints before it has imported jax, or anything else that takes seconds.
FIRST_LINE = """
import sys
class Refused:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("jax", "flax", "orbax", "transformers", "tensorflow", "tensorflow_datasets"):
      print("no", name, flush=True)
      raise SystemExit(3)
sys.meta_path.insert(0, Refused())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMANDS = {
  "vpd_jax/main.py": ["--config=configs/rooms.py:depth,tiny", "--workdir=x"],
  "scripts/prepare_data.py": ["rooms", "--check_only"],
  "scripts/embed_class_names.py": ["--weights=a", "--names=b,c", "--output=d.npz"],
  "scripts/convert_checkpoint.py": ["--config=configs/rooms.py", "--source=a", "--output=b"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_waits_for_no_heavy_import(command, tmp_path):
  words = [sys.executable, "-c", FIRST_LINE, str(ROOT / command), *COMMANDS[command]]
  done = subprocess.run(
    words, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=os.environ | {"PYTHONPATH": str(ROOT)}
  )
  lines = done.stdout.splitlines()
  assert done.returncode == 3 and len(lines) == 2 and lines[1].startswith("no "), done.stdout + done.stderr
  assert COMMANDS[command][0].removeprefix("--config=configs/") in lines[0]
