"""All three methods learn where the joints of the rooms' figures are, with the smallest network; minutes each.

XLA_FLAGS=--xla_backend_optimization_level=3 python -m pytest -m slow -s tests/runs/test_pose_learning.py
"""

import json

import pytest

from tests.helpers import tiny
from vpd_jax.config import loader
from vpd_jax.training import train

pytestmark = pytest.mark.slow

STEPS = 400


@pytest.mark.parametrize("method", ["vpd", "meta_prompts", "iedp"])
def test_unseen_figures_are_found_better_than_without_looking(method, tmp_path):
  config = loader.load(f"configs/rooms.py:pose,{method},tiny")
  data = config.data.copy_and_resolve_references()
  config = tiny.shrunk(config).unlock()
  config.data = data  # the crop of a person is no square
  if "width" in config.head:
    config.head.width = 32  # of 8 no 17 heatmaps can be made
  config.update(num_steps=STEPS, eval_every=STEPS, save_every=STEPS, log_every=STEPS // 10)
  config.eval.batch_size = 16
  scores = train.run(config.lock(), str(tmp_path))
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  trivial = {name: value for line in lines for name, value in line.items() if name.startswith("eval/trivial/")}
  losses = [line["train/loss"] for line in lines if "train/loss" in line]
  found = scores["eval/room_figures/AP"]
  print(f"\n{method}: loss {losses[0]:.4f} to {losses[-1]:.4f}, AP {found:.4f}, {trivial}")
  assert set(trivial) == {"eval/trivial/mean_pose", "eval/trivial/linear_crop"}
  assert scores["eval/room_figures/people"] == 64
  assert found > 0.02 and found > 5 * max(trivial.values())
