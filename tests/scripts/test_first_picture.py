"""benchmarks/first_picture.py: its table, and that PyTorch sees the same views of a picture."""

import numpy as np
import pytest

from tests.helpers.loaded_scripts import load
from vpd_jax.inference import images as images_lib
from vpd_jax.inference import tta


def test_the_table_holds_medians_and_the_ratio_to_pytorch():
  script = load("benchmarks/first_picture.py")
  costs = {
    "torch": [script.Cost(200, 100, 9), script.Cost(220, 120, 9), script.Cost(900, 300, 9)],
    "ours, cold": [script.Cost(110, 60, 5.126)],
  }
  lines = script.table(costs, 20).splitlines()
  assert lines[2] == "| torch | 220 | 120 | 9.00 | 1.00 | 10.00 |"
  assert lines[3] == "| ours, cold | 110 | 60 | 5.13 | 0.50 | 20.00 |"
  assert {line.count("|") for line in lines} == {7}
  assert script.table({"ours, cold": costs["ours, cold"]}, 1).splitlines()[2] == "| ours, cold | 110 | 60 | 5.13 | - |"


@pytest.mark.reference
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (60, 80), (40, 150), (50, 50), (20, 31)])
def test_the_views_of_pytorch_are_ours(size):
  views = load("benchmarks/torch_depth.py").views
  image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  resized, corners = views(image, 48)
  ours = images_lib.resize_shorter_side(image, 48)
  assert corners == tta.offsets(ours.shape[:2], 2, coverage="full")
  np.testing.assert_array_equal(resized, ours)
