"""A small run on the embedded rooms, and what its checkpoints hold."""

import jax
import numpy as np

from tests.helpers import tiny
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.checkpoints.checkpointer import Checkpoints
from vpd_jax.config import loader


def rooms(**changes):
  config = tiny.shrunk(loader.load("configs/rooms.py:depth,tiny")).unlock()
  config.update(num_steps=4, log_every=1, eval_every=4, save_every=2, keep=5)
  config.optim.schedule.num_steps = 400  # the same rates, however far a run goes
  config.update_from_flattened_dict(changes)
  return config.lock()


def arrays(workdir, step):
  """Every array of a checkpoint by its path in the state."""
  config = rooms()
  exp = experiment.assemble(config)
  mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  shapes, where = initialize.state_shapes(config, exp), initialize.state_shardings(config, exp, mesh)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return {
      jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(checkpoints.restore(step, abstract))
    }
