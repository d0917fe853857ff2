"""The tables of docs/tpu.md are those of benchmarks/tpu_plans.json."""

import importlib

import pytest

from vpd_jax.config import loader

GIB = 2**30


@pytest.fixture(scope="module")
def tpu_plans():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(loader.PROJECT / "benchmarks")
    return importlib.import_module("tpu_plans")


def report(step="train", **changes):
  made = {
    **{"step": step, "devices": 8, "mesh": {"data": 1, "fsdp": 8}, "batch": 24, "accumulation": 1, "remat": False},
    **{"state": {"params": GIB, "opt_state": 2 * GIB}, "peak": 5 * GIB, "limit": 16 * GIB, "fits": True},
    **{"flops": 2.5e12, "collectives": {"all-gather": (3, 2e9), "all-reduce": (1, 5e8)}, "optimal_seconds": 0.25},
    **{"compile_seconds": 100.2, "compiler": "libtpu 0.0.42.1"},
  }
  return made | changes


def test_the_page_holds_what_was_compiled(tpu_plans):
  store = tpu_plans.results_store
  for path, made in ((tpu_plans.PAGE, tpu_plans.tables), (tpu_plans.SMALL_PAGE, tpu_plans.small_table)):
    page = path.read_text()
    assert store.insert(page, tpu_plans.SCRIPT, made(store.load(tpu_plans.RESULTS))) == page


def test_each_compilation_is_a_line(tpu_plans):
  too_large = report(peak=20 * GIB, fits=False, remat="full", accumulation=3)
  del too_large["flops"], too_large["collectives"], too_large["optimal_seconds"]
  lines = tpu_plans.tables({"vpd/v5e:2x4": [too_large, report("eval", batch=8), {"unfinished_minutes": 60}]}).split(
    "\n"
  )
  assert lines[2] == (
    "| VPD depth NYU, train, 24 | v5e:2x4 | 1 x 8, remat, accumulation 3 | 3.00 GiB | 20.00 of 16.00 GiB, "
    "**does not fit** |  |  |  | 100 s, 0.0.42.1 |"
  )
  assert lines[3] == (
    "| VPD depth NYU, eval, 8 | v5e:2x4 | 1 x 8 | 3.00 GiB | 5.00 of 16.00 GiB, fits | 2.50 TFLOP | "
    "2.50 GB: all-gather 2.00, all-reduce 0.50 | 250 ms | 100 s, 0.0.42.1 |"
  )
  assert "not finished after 60 minutes" in lines[4]
  assert "not yet run" in lines[5]


def test_what_fits_one_chip_is_compared_with_before(tpu_plans):
  name = next(cell.name for cell in tpu_plans.SMALL if cell.config == "vpd")
  peaks = [report(peak=int(tpu_plans.BEFORE * GIB / 4)), report("eval", peak=17 * GIB, fits=False)]
  lines = tpu_plans.small_table({name: peaks}).split("\n")
  assert "| 6.63 GiB, fits | 0.25 | 17.00 GiB, **does not fit** | 100 and 100 s |" in "".join(lines)
  assert sum("not yet compiled" in line for line in lines) == len(tpu_plans.SMALL) - 1


def test_operations_are_compared_with_those_of_one_chip(tpu_plans):
  results = {"vpd/v6e:1x1": [report(devices=1, flops=2e12, collectives={})]}
  results["vpd/v6e:2x4/2 copies"] = [report(flops=2.02e12)]
  lines = tpu_plans.tables(results).split("\n")[-4:]
  assert "| 2.000 TFLOP | 100.0 % | none |" in lines[0]
  assert "| 2.020 TFLOP | 101.0 % | 2.50 GB" in lines[1]
  assert "not yet run" in lines[2]


def test_every_cell_is_a_config_that_loads(tpu_plans):
  for cell in tpu_plans.CELLS.values():
    assert loader.load(tpu_plans.CONFIGS[cell.config][1]).data.batch_size in (8, 24), cell
