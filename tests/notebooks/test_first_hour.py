"""notebooks/first_hour.ipynb: its cells run from top to bottom, with few steps of the tiny network."""

import json
import pathlib
import tempfile

import matplotlib
import pytest

from tests.helpers.paths import ROOT

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
