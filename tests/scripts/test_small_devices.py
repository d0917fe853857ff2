"""The table of docs/small_devices.md is that of benchmarks/small_devices.json."""

import importlib

import pytest

from vpd_jax.config import loader


@pytest.fixture(scope="module")
def small_devices():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(loader.PROJECT / "benchmarks")
    return importlib.import_module("small_devices")


def test_the_page_holds_what_was_measured(small_devices):
  page, store = small_devices.PAGE.read_text(), small_devices.results_store
  made = small_devices.table(store.load(small_devices.RESULTS))
  assert store.insert(page, small_devices.SCRIPT, made) == page


def test_each_setting_is_a_line_of_its_seeds(small_devices):
  lines = small_devices.table({"first run": 0.9, "first run/LoRA of rank 4/0": 0.5, "first run/LoRA of rank 4/1": 0.6})
  assert "| first run | LoRA of rank 4 | 0.550 | 0.500 | 0.600 | 2 |" in lines
  assert lines.count("not yet run") == 5 and "(seed 100) has the same length and reaches 0.900 m." in lines
