"""notebooks/first_hour.ipynb: its cells run from top to bottom, with few steps of the tiny network."""

import contextlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile
import types

import matplotlib
import pytest

from tests.helpers.paths import ROOT
from vpd_jax.monitoring import accelerators

NOTEBOOK = ROOT / "notebooks" / "first_hour.ipynb"
STEPS = "STEPS, LORA_STEPS = 300, 100"


def code():
  cells = json.loads(NOTEBOOK.read_text())["cells"]
  return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_cells_are_python_without_results():
  cells = json.loads(NOTEBOOK.read_text())["cells"]
  assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
  for number, text in enumerate(code()):
    compile(text, f"cell {number}", "exec")
  assert sum(STEPS in text for text in code()) == 1


@pytest.fixture
def install(tmp_path, monkeypatch):
  """Runs the first cell in a folder that holds the project; returns the commands that it would start."""
  (tmp_path / "vpd_jax").symlink_to(ROOT)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", ["", *sys.path])
  commands = []

  def start(command, **options):
    assert options["cwd"] == tmp_path / "vpd_jax"
    commands.append(command[1:])
    return contextlib.nullcontext(types.SimpleNamespace(stdout=["installing\n"], returncode=0))

  def run():
    with monkeypatch.context() as patch:
      patch.setattr(subprocess, "Popen", start)
      exec(compile(code()[0], "the first cell", "exec"), {"__name__": "__main__"})
    return commands

  return run


def test_where_the_package_is_installed_nothing_is_installed(install):
  assert install() == []


@pytest.mark.parametrize("extra, ending", [("", ""), ("cuda12", "[cuda12]"), ("tpu", "[tpu]")])
def test_a_checkout_beside_the_notebook_is_installed_with_the_extra_of_the_device(
  install, tmp_path, monkeypatch, extra, ending
):
  monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: iter(()))
  monkeypatch.setattr(accelerators, "extra", lambda: extra)
  ((*words, place),) = install()
  assert words == ["-m", "pip", "install", "--quiet", "--editable"] and place == f"{tmp_path}/vpd_jax{ending}"


def test_an_older_numpy_that_is_loaded_is_told(install, monkeypatch):
  monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: iter(()))
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
  with pytest.raises(RuntimeError, match="restart the session"):
    install()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  monkeypatch.chdir(NOTEBOOK.parent)
  matplotlib.use("Agg")
  names = {"__name__": "__main__"}
  for number, text in enumerate(code()):
    exec(compile(text.replace(STEPS, "STEPS, LORA_STEPS = 3, 2"), f"cell {number}", "exec"), names)
  assert names["depth"].shape == (96, 128)
  (folder,) = pathlib.Path(tmp_path).glob("first_hour_*")
  ends = (".npy", ".json", ".ply", ".color.png", ".depth.png")
  assert {path.name for path in (folder / "depth").iterdir()} == {f"room{end}" for end in ends}
  assert "lora" in capsys.readouterr().out.lower()
