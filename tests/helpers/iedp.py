"""IEDP with the smallest network, and a batch for it."""

import functools

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tests.helpers import fill, tiny
from vpd_jax import experiment
from vpd_jax.config import loader, presets

WIDTH, TOKENS, BATCH, LAMBDA = 16, 12, 2, 0.5


def iedp_config(**changes):
  """The smallest network on the rooms; both branches have 12 tokens; statistics and loss per branch."""
  config = loader.load("configs/rooms.py:depth,tiny").copy_and_resolve_references().unlock()
  for section, content in presets.iedp_depth(tiny=True, head_init="fan_in").items():
    if section in ("backbone", "init"):
      config[section].update(content)
    else:
      config[section] = ConfigDict(content)
  config = tiny.shrunk(config).unlock()
  config.backbone.text.update(vocab_size=64, width=WIDTH, layers=2, heads=2, mlp_width=32, positions=TOKENS)
  config.backbone.image.update(width=24, layers=2, heads=2, mlp_width=48, image_size=28, projection=8)
  config.method.update(num_queries=TOKENS, num_heads=2, ffn_ratio=2, lambda_exp=LAMBDA)
  config.data.batch_size = config.optim.norm_group = config.optim.loss_group = BATCH
  config.update_from_flattened_dict(changes)
  return config.lock()


@functools.cache
def network():
  """The training experiment, and made-up values of all its arrays."""
  exp = experiment.assemble(iedp_config())
  return exp, tiny.filled(exp.spec.shapes)


@functools.cache
def batch():
  """Two images with depth, and the sentences of the classes 3 and 6."""
  exp, _ = network()
  made = {
    "image": fill.integers("image", (BATCH, 64, 64, 3), 256, 0).astype(np.uint8),
    "depth": fill.uniform("depth", (BATCH, 64, 64), 0, 0.5, 9).astype(np.float32),
    "tokens": np.stack([exp.method.prepare({"class_id": np.int32(i)})["tokens"] for i in (3, 6)]),
  }
  return {name: jnp.asarray(value) for name, value in made.items()}
