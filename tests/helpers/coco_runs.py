"""The config of a small run on files of COCO."""

from tests.helpers import tiny
from vpd_jax.config import loader


def coco(root, **changes):
  """configs/coco_pose.py:vpd with the smallest network, on a few pictures."""
  config = tiny.shrunk(loader.load("configs/coco_pose.py:vpd,tiny")).unlock()
  config.update(num_steps=2, log_every=1, eval_every=2, save_every=2)
  config.data.update(root=str(root), complete=False, batch_size=4)
  config.eval.panels = 2
  config.update_from_flattened_dict(changes)
  return config.lock()
