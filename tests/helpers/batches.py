"""Made-up batches."""

import jax.numpy as jnp
import numpy as np


def batch_for(exp, config):
  """A made-up batch of the shapes the config asks for."""
  size, (height, width) = config.data.batch_size, config.data.crop
  rng = np.random.default_rng(0)
  known = {
    "image": rng.integers(0, 256, (size, height, width, 3), np.uint8),
    "depth": rng.uniform(0.5, 9, (size, height, width)).astype(np.float32),
    "class_id": rng.integers(0, 27, size, np.int32),
    "label": rng.integers(0, 3, (size, height, width), np.uint8),
    "mask": rng.integers(0, 2, (size, height, width), np.uint8),
    "keypoints": np.concatenate([rng.uniform(0, 60, (size, 17, 2)), np.ones((size, 17, 1))], -1).astype(np.float32),
    "center": rng.uniform(10, 90, (size, 2)).astype(np.float32),
    "extent": rng.uniform(20, 90, (size, 2)).astype(np.float32),
    "box_score": np.ones(size, np.float32),
    "image_index": np.arange(size, dtype=np.int32),
    "tokens": rng.integers(0, 100, (size, config.backbone.text.positions), np.int32),
  }
  return {name: jnp.asarray(known[name]) for name in exp.keys}
