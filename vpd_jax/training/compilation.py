"""Compiling the training step for a mesh, and counting its operations."""

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.distributed import sharding
from vpd_jax.experiment import Experiment
from vpd_jax.monitoring import xla_cost
from vpd_jax.training.step import make_step
from vpd_jax.types import Batch


def compile_step(config: ConfigDict, exp: Experiment, mesh: Mesh, batch: Batch) -> jax.stages.Compiled:
  """Compiles the training step for the state of this config and a batch; the state is donated."""
  return lower_step(config, exp, mesh, batch).compile(xla_cost.compiler_options(mesh))


def lower_step(config: ConfigDict, exp: Experiment, mesh: Mesh, batch: Batch) -> jax.stages.Lowered:
  """Traces and lowers the training step; `batch` may be ShapeDtypeStructs, and `mesh` of devices that do not exist."""
  state_shardings = initialize.state_shardings(config, exp, mesh)
  options = {field: config.optim[field] for field in ("loss_group", "accumulation", "ema_decay")}
  step = make_step(exp, **options, seed=config.seed, mesh=mesh, gather=initialize.gather(config, exp, mesh))
  batch_sharding = sharding.batch_sharding(mesh)
  jitted = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(state_shardings, batch_sharding),
    out_shardings=(state_shardings, sharding.replicated(mesh)),
  )
  abstract = sharding.abstract(initialize.state_shapes(config, exp), state_shardings)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding), batch)
  with sharding.tracing(mesh):
    return jitted.lower(abstract, shapes)


def model_flops(config: ConfigDict, batch: Batch) -> float:
  """Floating point operations of one training step on all devices together, see xla_cost.model_flops.

  Does not count recomputation, and does not depend on the attention kernel.

  Args:
    config: of the run.
    batch: of a step, arrays or ShapeDtypeStructs.
  """
  plain = {
    "backbone.attention": "xla",
    "backbone.remat": False,
    "backbone.remat_policy": "full",
    "optim.accumulation": 1,
  }
  config = loader.changed(config, plain)
  exp = experiment.assemble(config)
  step = make_step(exp, loss_group=config.optim.loss_group)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  return xla_cost.model_flops(step, initialize.state_shapes(config, exp), shapes)
