"""Config, weights and inputs of the authors' tiny EcoDepth networks."""

import jax.numpy as jnp
import numpy as np

from tests.helpers import fill, oracle, tiny
from vpd_jax import experiment
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released

MAX_DEPTH = {"nyu": 10.0, "kitti": 80.0}
SIZE = {"nyu": (120, 192), "kitti": (88, 160)}


def config(data="nyu", **changes):
  """configs/nyu_depth.py:eco_depth,tiny, or that of KITTI, as the oracle ran it; see tiny.depth_config."""
  return tiny.depth_config(f"configs/{data}_depth.py:eco_depth,tiny", **changes)


def weights(made, dtype=np.float32):
  """The authors' rebuilt weights under our names, for a config."""
  named, _ = rules.convert(oracle.weights("eco_depth"), released.eco_depth_depth(), experiment.model_shapes(made))
  return {name: np.asarray(x, dtype) for name, x in named.items()}


def picture(shape, seed=0, name="input/image"):
  """uint8 [B, H, W, 3] of the oracle's recipe: coarse squares and fine grain."""
  count, height, width = shape
  squares = fill.integers(f"{name}_coarse", (count, 3, -(-height // 16), -(-width // 16)), 193, seed)
  coarse = squares.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width]
  fine = fill.integers(f"{name}_fine", (count, 3, height, width), 64, seed)
  return (coarse + fine).astype(np.uint8).transpose(0, 2, 3, 1)


def batch_of(data="nyu", dtype=jnp.float32):
  """The two pictures, as ToTensor gives them, and their depth."""
  shape = (2, *SIZE[data])
  depth = fill.uniform("input/depth", shape, 0, 0.001, MAX_DEPTH[data])
  depth *= fill.uniform("input/depth_valid", shape, 0) > 0.2
  image = picture(shape).astype(np.float32) / np.float32(255)
  return {"image": jnp.asarray(image, dtype), "depth": jnp.asarray(depth, dtype)}
