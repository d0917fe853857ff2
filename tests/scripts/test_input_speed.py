"""benchmarks/input_speed.py: every data set is made up, read from files and from shards, and timed."""

import importlib

import pytest

from vpd_jax.config import loader


@pytest.fixture(scope="module")
def input_speed():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(loader.PROJECT / "benchmarks")
    return importlib.import_module("input_speed")


NAMES = [
  pytest.param(name, marks=[pytest.mark.slow] * (name in ("kitti", "ade20k", "cityscapes")))
  for name in ("nyu", "kitti", "ade20k", "cityscapes", "refcoco", "coco_pose")
]


@pytest.mark.parametrize("name", NAMES)
def test_synthetic_data_is_read_from_files_and_from_shards(input_speed, tmp_path, name):
  config, places = input_speed.synthetic(name, tmp_path, 4)
  for _ in range(2):  # the second time nothing is written
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert input_speed.synthetic(name, tmp_path, 4)[1] == places
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
  rows = input_speed.measure(config, places, count=4, workers=[], batches=1, rounds=1)
  crop = "{} x {}".format(*config.data.crop)
  assert [row[:3] for row in rows] == [[name, crop, "files"], [name, crop, "ArrayRecord"]]
  assert all(float(rate) > 0 for row in rows for rate in row[3:])


def test_every_published_data_set_has_a_row(input_speed):
  assert input_speed.CONFIGS.keys() == input_speed.synthetic_data.WRITERS.keys()
