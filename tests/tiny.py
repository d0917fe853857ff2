"""Product and weights of the authors' tiny VPD depth network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests import oracle
from vpd_jax import assemble, config_file
from vpd_jax.convert import released, rules
from vpd_jax.types import TrainState


def depth_config(**changes):
  """configs/nyu_depth.py:tiny as the oracle ran it: batch 2, statistics and loss over both images."""
  config = config_file.load("configs/nyu_depth.py:tiny").unlock()
  config.data.batch_size = 2
  config.optim.norm_group = config.optim.loss_group = 0
  config.optim.schedule.half = 3  # the trace: 2 epochs of 3 iterations
  config.update_from_flattened_dict(changes)
  return config.lock()


def depth_weights(size="tiny", seed=0, dtype=np.float32):
  """The authors' rebuilt weights under our names."""
  shapes = depth_shapes(size)
  named, _ = rules.convert(oracle.weights("vpd_depth", size, seed), released.vpd_depth(), shapes)
  return {name: np.asarray(x, dtype) for name, x in named.items()}


@functools.cache
def depth_shapes(size="tiny"):
  return assemble.model_shapes(config_file.load("configs/nyu_depth.py" + (":tiny" if size == "tiny" else "")))


def train_state(product, named):
  """A TrainState of the given arrays, before the first step."""
  named = {name: jnp.asarray(x) for name, x in named.items()}
  trained = product.groups.lr
  params = {n: x for n, x in named.items() if n in trained}
  stats = {n: x for n, x in named.items() if n in product.parts.stats}
  frozen = {n: x for n, x in named.items() if n not in params and n not in stats}
  return TrainState(jnp.zeros((), jnp.int32), params, frozen, stats, jax.jit(product.optimizer.init)(params))
