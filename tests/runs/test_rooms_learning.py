"""MetaPrompts and both branches of IEDP learn from the embedded rooms, with the smallest network; a minute or two each.

python -m pytest -m slow -s tests/runs/test_rooms_learning.py
"""

import json

import numpy as np
import pytest

from tests.helpers import tiny
from vpd_jax.config import loader
from vpd_jax.training import train

pytestmark = pytest.mark.slow

STEPS = 200


def losses(method, folder, **changes):
  """{name: value of every step} of a run of the smallest network; each branch has a name of its own."""
  config = tiny.shrunk(loader.load(f"configs/rooms.py:depth,{method},tiny")).unlock()
  config.update(num_steps=STEPS, eval_every=STEPS, save_every=STEPS, log_every=1)
  config.data.train_count = 4096
  config.eval.baselines = 0
  config.update_from_flattened_dict(changes)
  train.run(config.lock(), str(folder))
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  names = {name for line in lines for name in line if name.endswith("silog") and name.startswith("train/")}
  return {name: np.array([line[name] for line in lines if name in line]) for name in sorted(names)}


def fall(values):
  """(mean of the first twenty steps, mean of the last forty)."""
  assert len(values) == STEPS
  return values[:20].mean(), values[-40:].mean()


@pytest.mark.parametrize(
  "method, branches, changes",
  [
    ("vpd", ("",), {}),
    ("meta_prompts", ("",), {"method.resize_scale": 0}),  # 64 x 64 as it is
    ("iedp", ("implicit/", "explicit/"), {}),
  ],
)
def test_every_branch_learns(method, branches, changes, tmp_path):
  found = losses(method, tmp_path, **changes)
  assert set(found) == {f"train/{branch}silog" for branch in branches}
  falls = {name: fall(values) for name, values in found.items()}
  print("\n" + "; ".join(f"{method} {name}: {first:.4f} to {last:.4f}" for name, (first, last) in falls.items()))
  assert all(last < 0.9 * first for first, last in falls.values()), falls
