"""The config whose step is planned and timed."""

from tests.helpers import tiny
from vpd_jax.config import loader


def config_of(**changes):
  config = tiny.shrunk(loader.load("configs/rooms.py:depth,tiny")).unlock()
  config.update_from_flattened_dict({"backbone.attention": "xla", **changes})
  return config.lock()
