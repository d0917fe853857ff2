"""benchmarks/accelerator.py: commands that scripts/benchmark.py takes, and tables that hold what was measured."""

import importlib
import json
import sys

import pytest

from tests.helpers.loaded_scripts import load
from vpd_jax.config import loader


@pytest.fixture(scope="module")
def accelerator():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(loader.PROJECT / "benchmarks")
    return importlib.import_module("accelerator")


def side(step_ms, **changes):
  made = {"device": "NVIDIA H200", "batch": 24, "step_ms": step_ms, "forward_ms": step_ms / 4, "share_of_peak": 0.5}
  made |= {"images_per_sec_per_chip": 24e3 / step_ms, "peak_bytes": 30 * 2**30}
  return made | changes


OPERATION = {"name": "fusion.1", "milliseconds": 12.5, "share": 0.06, "result": "bf16[24]", "origin": "dot_general"}


def test_the_page_holds_what_was_measured(accelerator):
  page, store = accelerator.PAGE.read_text(), accelerator.results_store
  assert store.insert(page, accelerator.SCRIPT, accelerator.tables(store.load(accelerator.RESULTS))) == page


def test_a_page_without_its_marks_is_refused(accelerator):
  with pytest.raises(ValueError, match=r"must contain .<!-- accelerator.py: begin -->. and, after it"):
    accelerator.results_store.insert("text", accelerator.SCRIPT, "table")


def test_what_was_not_measured_is_said_so(accelerator):
  text = accelerator.tables({})
  assert text.count("not yet run") == 3 + len(accelerator.TASKS) + 1 + len(accelerator.SAVINGS) + 1


def test_numbers_come_into_all_tables(accelerator):
  first, saving = next(iter(accelerator.AGAINST)), next(iter(accelerator.SAVINGS))
  results = {
    first: {
      "ours": side(200.0, longest=[OPERATION]),
      "torch": side(300.0),
      "ratio": {"step_ms": 1.5, "forward_ms": 1.5},
    },
    saving: {"ours": side(400.0)},
    "IEDP depth NYU": {"failed": "RESOURCE_EXHAUSTED"},
  }
  lines = accelerator.tables(results).splitlines()
  assert f"| NVIDIA H200 | {first}, batch 24: training step | 200.0 ms, 30.0 GiB | 300.0 ms, 30.0 GiB | 1.50 |" in lines
  assert f"| {first} | 24 | 110 | 120 | 50.0 % | 30.0 GiB |" in lines
  assert "| IEDP depth NYU | 24 | - | RESOURCE_EXHAUSTED |  |  |" in lines
  assert "| as above | 120 | 1.00 | 30.0 GiB |" in lines and f"| {saving} | 60 | 0.50 | 30.0 GiB |" in lines
  assert "| `fusion.1 bf16[24] dot_general` | 12.50 | 6.0 % |" in lines


def test_every_command_is_one_that_the_benchmark_takes(accelerator, monkeypatch, tmp_path):
  for name, cell in accelerator.CELLS.items():
    for tiny in (False, True):
      script = load("scripts/benchmark.py")
      monkeypatch.setattr(sys, "argv", cell.command(tiny, tmp_path / "result.json"))
      script.parse(sys.argv)
      config = script.CONFIG.value
      batch = script.BATCH.value or config.data.batch_size
      parts = config.optim.accumulation
      assert all(batch // parts % max(config.optim[group], 1) == 0 for group in ("loss_group", "norm_group")), name
      assert batch % parts == 0, name


def test_results_of_tiny_networks_are_kept_apart(accelerator, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["accelerator.py", "--tiny"])
  with pytest.raises(SystemExit):
    accelerator.main()
  assert "give another --results=FILE" in capsys.readouterr().err


def test_a_command_that_fails_is_kept_with_its_last_line(accelerator, monkeypatch, tmp_path):
  broken = {"broken": accelerator.Cell("nothing.py", 1)}
  monkeypatch.setattr(accelerator, "CELLS", broken)
  accelerator.measure("broken", tmp_path / "results.json", tiny=True, minutes=2)
  held = json.loads((tmp_path / "results.json").read_text())
  assert held["broken"]["failed"].startswith("error: ") and "nothing.py" in held["broken"]["failed"]


@pytest.mark.slow
@pytest.mark.reference
def test_the_whole_command_runs_with_tiny_networks(accelerator, monkeypatch, tmp_path, capsys):
  """Two of its cells, the one with PyTorch among them."""
  results = tmp_path / "results.json"
  names = ["VPD depth NYU", "recomputation (`backbone.remat=True`)"]
  monkeypatch.setattr(sys, "argv", ["accelerator.py", "--tiny", f"--results={results}", "--only", *names])
  accelerator.main()
  held = json.loads(results.read_text())
  assert held.keys() == {*names} and held[names[0]]["ratio"]["step_ms"] > 0
  assert len(held[names[0]]["ours"]["longest"]) == 10
  assert "training step" in capsys.readouterr().out
