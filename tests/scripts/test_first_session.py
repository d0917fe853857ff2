"""docs/first_session.md: its program runs, on the smallest networks, and its commands as they stand."""

import re
import runpy

import cv2
import numpy as np
import pytest

from tests.helpers import loaded_scripts, tiny
from tests.helpers.paths import ROOT
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader

script = loaded_scripts.load("scripts/first_session.py")
PHASE = re.compile(r"[\w ]+: .*\d ?s")  # a line of progress: fewer appear on a faster machine
NUMBER = re.compile(r"\d[\d.,]*(m\d+s|s\b)?")


def write_run(folder, config):
  """A workdir as training leaves it, of made-up weights."""
  exp = experiment.assemble(config)
  state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  with initialize.checkpoints(config, exp, str(folder)) as held:
    held.save(1, state, initialize.to_json(config), force=True)
  (folder / "config.json").write_text(initialize.to_json(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("session")
  for task in ("depth", "referring", "pose"):
    write_run(folder / "runs" / f"rooms-{task}-tiny", tiny.shrunk(loader.load(f"configs/rooms.py:{task},tiny")))
  (folder / "photos").mkdir()
  cv2.imwrite(str(folder / "photos" / "room_00_office.png"), np.full((64, 80, 3), 99, np.uint8))
  return folder


def test_ten_lines_of_python_lead_to_depth_mask_and_key_points(folder, monkeypatch, capsys):
  text = script.program(script.PAGE.read_text())
  code = [line for line in text.splitlines() if line.strip()]
  assert len(code) <= 10 and "import vpd_jax" in code
  (folder / "session.py").write_text(text)
  monkeypatch.chdir(folder)
  runpy.run_path("session.py")
  assert capsys.readouterr().out.startswith("<vpd_jax.Predictor: method 'vpd', task 'depth'")
  saved = {name: np.load(f"{name}.npy") for name in ("depth", "mask", "keypoints")}
  assert {name: (array.dtype.name, array.shape) for name, array in saved.items()} == {
    "depth": ("float32", (64, 80)),
    "mask": ("bool", (64, 80)),
    "keypoints": ("float32", (1, 17, 3)),
  }


def test_the_page_is_the_output_of_its_commands(tmp_path):
  page = 'a\n```console\n$ echo "new"\nold\n$ ls\n```\n```python\nx = 1\n```\n'
  assert script.again(page, tmp_path) == page.replace("old", "new").replace("ls\n", "ls\nsession.py\n")


def without_numbers(page):
  """The lines of the sessions on a page, except progress; numbers and spaces vary from run to run."""
  lines = [line for kind, text in script.BLOCK.findall(page) if kind == "console" for line in text.splitlines()]
  return [" ".join(NUMBER.sub("N", line).split()) for line in lines if not PHASE.fullmatch(line)]


@pytest.mark.slow
def test_every_command_prints_what_the_page_says(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  page = script.PAGE.read_text()
  assert without_numbers(script.again(page, tmp_path)) == without_numbers(page)


def test_the_readme_leads_to_the_page():
  assert "(docs/first_session.md)" in (ROOT / "README.md").read_text()
