"""A step on one device and on eight."""

import functools

import jax
import numpy as np

from tests.helpers import tiny
from tests.helpers.batches import batch_for
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.data import pipeline
from vpd_jax.distributed import sharding
from vpd_jax.training import compilation
from vpd_jax.training import step as training_step


@functools.cache
def depth_of_rooms(group=3):
  """Config, experiment and state; statistics and loss over `group` images, 0 for all of the batch."""
  config = tiny.shrunk(loader.load("configs/rooms.py:depth,tiny")).unlock()
  config.data.batch_size, config.eval.batch_size = 24, 8
  config.optim.norm_group = config.optim.loss_group = group
  exp = experiment.assemble(config.lock())
  return config, exp, tiny.train_state(exp, tiny.filled(exp.spec.shapes))


def make_mesh(name):
  """One device of this process; all devices of all processes; the same with the state over four of them."""
  if name == "one":
    return sharding.make_mesh(1, 1, devices=jax.local_devices()[:1])
  return sharding.make_mesh(*{"data": (8, 1), "fsdp": (2, 4)}[name])


def placed(group, name):
  """(mesh, state, batch) on it, of which each process gives its rows. No two images are alike in depth."""
  config, exp, state = depth_of_rooms(group)
  mesh = make_mesh(name)
  host = jax.device_get(batch_for(exp, config))
  host["depth"] = host["depth"] * np.linspace(0.1, 1, config.data.batch_size, dtype=np.float32)[:, None, None]
  share = config.data.batch_size // jax.process_count()
  rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
  batch = pipeline.to_mesh({key: x[rows] for key, x in host.items()}, sharding.batch_sharding(mesh))
  return mesh, sharding.place(jax.device_get(state), initialize.state_shardings(config, exp, mesh)), batch


def forward(exp, group):
  """(state, batch) -> Loss: a third of a step to compile."""

  def run(state, batch):
    outputs = exp.spec.merge(state.params, state.frozen, state.stats)(batch, training=True)
    return training_step.group_losses(exp.task, outputs, batch, exp.method.branches(True), group)

  return run


@functools.cache
def loss(group, name):
  mesh, state, batch = placed(group, name)
  total = jax.jit(forward(depth_of_rooms(group)[1], group), out_shardings=sharding.replicated(mesh))(state, batch)
  return float(total.value / total.weight)


@functools.cache
def step(name):
  """The logs of a whole step, in groups of three."""
  config, exp, _ = depth_of_rooms(3)
  mesh, state, batch = placed(3, name)
  return jax.device_get(compilation.compile_step(config, exp, mesh, batch)(state, batch)[1])
