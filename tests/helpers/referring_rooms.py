"""The config of a small run of referring segmentation on the embedded rooms."""

from tests.helpers import tiny
from vpd_jax.config import loader


def small(**changes):
  config = loader.load("configs/my_refer.py:tiny").unlock()
  config.data = {"name": "rooms", "task": "referring", "size": (64, 96), "crop": (64, 64), "train_count": 12,
                 "eval_count": 3, "batch_size": 4, "workers": 0, "on_bad_record": "stop"}  # fmt: skip
  config.eval.baselines = 4
  config.update_from_flattened_dict(changes)
  config = tiny.shrunk(config).unlock()
  config.data.update(eval_count=2, batch_size=4)
  return config.lock()
