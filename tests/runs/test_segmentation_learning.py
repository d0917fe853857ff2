"""All three methods learn to label the embedded rooms, with the smallest network; minutes each.

XLA_FLAGS=--xla_backend_optimization_level=3 python -m pytest -m slow -s tests/runs/test_segmentation_learning.py
"""

import json
import time

import pytest

from tests.helpers import tiny
from vpd_jax.config import loader
from vpd_jax.training import train

pytestmark = pytest.mark.slow

STEPS = 1000


@pytest.mark.parametrize("method", ["vpd", "meta_prompts", "iedp"])
def test_unseen_rooms_are_labeled_better_than_by_color_and_position(method, tmp_path):
  begin, config = time.monotonic(), loader.load(f"configs/rooms.py:segmentation,{method},tiny")
  config = tiny.shrunk(config).unlock()
  config.head.width = 32  # of 8 channels no 19 classes can be told
  config.neck.update({"width": 32} if "width" in config.neck else {})
  config.data.update(size=(64, 96), crop=(64, 64), train_count=4096, eval_count=64, batch_size=8)
  config.update(num_steps=STEPS, eval_every=STEPS, save_every=STEPS, log_every=STEPS // 20)
  config.optim.lr, config.eval.batch_size, config.eval.baselines = 1.5e-3, 8, 256
  config.eval.test_time = ("slide:64:32",)
  scores = train.run(config.lock(), str(tmp_path))
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  trivial = {name: value for line in lines for name, value in line.items() if name.startswith("eval/trivial/")}
  found = scores["eval/rooms/mIoU"]
  print(f"\n{method}: {(time.monotonic() - begin) / 60:.1f} minutes, mIoU {found:.4f}, {trivial}")
  assert set(trivial) == {f"eval/trivial/{name}" for name in ("most_frequent", "position_mode", "linear_rgb_position")}
  assert found > 1.5 * max(trivial.values())
