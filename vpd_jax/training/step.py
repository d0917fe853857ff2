"""The training step, a pure function: losses of groups of images, gradients, update."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vpd_jax import optim
from vpd_jax.checkpoints import initialize
from vpd_jax.distributed import sharding
from vpd_jax.experiment import Experiment
from vpd_jax.models import parameters as params_lib
from vpd_jax.types import Array, Batch, Branch, Loss, Outputs, ParamDict, Task, TrainState

SMALL = 2**16  # elements

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def group_losses(task: Task, outputs: Outputs, batch: Batch, branches: tuple[Branch, ...], group: int) -> Loss:
  """Sums loss, weight and logs over groups of consecutive images and over branches.

  Args:
    task: defines the loss of one group.
    outputs: [len(branches) * B, ...] each, ordered by branch.
    batch: [B, ...] each.
    branches: of the method, with their weights.
    group: images per group; 0 is one group of all B.

  Returns:
    Loss(sum of weight * value, sum of weight, sums of weight * log). Divided by the weight they are means over the
    groups with valid ground truth; sums add up exactly over the parts of an accumulated batch.
  """
  size = batch["image"].shape[0]
  group = group or size
  split = lambda tree: jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), tree)  # [G, group, ...]
  parts = split(batch)
  total, count, logs = 0.0, 0.0, {}
  for i, branch in enumerate(branches):
    rows = {name: x[i * size : (i + 1) * size] for name, x in outputs.items()}
    loss = jax.vmap(task.loss)(split(rows), parts)  # [G] each
    total += branch.weight * (loss.weight * loss.value).sum()
    count = loss.weight.sum()
    prefix = f"{branch.name}/" if len(branches) > 1 else ""
    logs |= {prefix + name: (loss.weight * x).sum() for name, x in loss.logs.items()}
  return Loss(cast(Array, total), cast(Array, count), logs)


def make_gradients(
  exp: Experiment,
  *,
  loss_group: int,
  accumulation: int,
  mesh: Mesh | None = None,
  gather: initialize.Gather = lambda named: named,
) -> Callable[..., Any]:
  """Makes (params, frozen, stats, batch, key) -> (gradients, loss, logs, new stats); the key is for dropout.

  Args:
    exp: of the config.
    loss_group: images per group of the loss, see `group_losses`.
    accumulation: number of consecutive parts of the batch, each of whole groups, over which loss, weight and gradients
      are summed. The statistics of all parts start from the same values, so that the result is that of the batch.
    mesh: shards every part over all devices; without it, whole parts would be distributed among the devices.
    gather: all-gathers parameters that are split over devices.
  """
  spec, task = exp.spec, exp.task
  branches = exp.method.branches(True)

  def loss_fn(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None):
    model = spec.merge(gather(params), gather(frozen), stats)
    loss = group_losses(task, model(batch, training=True, key=key), batch, branches, loss_group)
    return loss.value, (loss, params_lib.stats(model))

  def gradients(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None):
    return jax.grad(loss_fn, has_aux=True)(params, frozen, stats, batch, key)

  def accumulated(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None):
    micro_batches = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)  # [A, B / A, ...]
    if mesh is not None:
      micro_batches = jax.lax.with_sharding_constraint(micro_batches, NamedSharding(mesh, P(None, sharding.AXES)))
    part_gradients = lambda part: gradients(params, frozen, stats, *part)
    micro_batches = micro_batches, None if key is None else jax.random.split(key, accumulation)
    shapes = jax.eval_shape(part_gradients, jax.tree.map(lambda x: x[0], micro_batches))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, part_gradients(part)), None)
    grads, (loss, stats) = jax.lax.scan(add, zero, micro_batches)[0]
    return grads, (loss, {name: x / accumulation for name, x in stats.items()})

  def run(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None = None):
    grads, (loss, stats) = (accumulated if accumulation > 1 else gradients)(params, frozen, stats, batch, key)
    share = 1 / jnp.maximum(loss.weight, 1)
    grads = {name: g * share.astype(g.dtype) for name, g in grads.items()}
    return grads, loss.value * share, {name: x * share for name, x in loss.logs.items()}, stats

  return run


def make_update(
  exp: Experiment, *, ema_decay: float = 0.0, devices: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """Makes (state, gradients, loss, logs, new stats) -> (next state, logs), the optimizer's part of a step.

  Args:
    exp: of the config.
    ema_decay: of the running mean of the parameters, where the state has one.
    devices: of the mesh.
  """
  labels = {exp.groups.label[name]: multiplier for name, multiplier in sorted(exp.groups.lr.items())}

  def update(state: TrainState, grads: ParamDict, loss: Array, logs: dict[str, Array], stats: ParamDict):
    updates, opt_state = exp.optimizer.update(grads, state.opt_state, state.params)
    params = {name: p + cast(ParamDict, updates)[name].astype(p.dtype) for name, p in state.params.items()}
    rate = exp.rate(state.step)
    logs = {f"train/{name}": x for name, x in logs.items()} | {
      "train/loss": loss,
      "norm/gradients": _norm(grads, devices),
    }
    logs |= {f"lr/{label}": rate * multiplier for label, multiplier in labels.items()}
    ema = None if state.ema is None else optim.ema(state.ema, params, ema_decay)
    return TrainState(state.step + 1, params, state.frozen, stats, opt_state, ema), logs

  return update


def make_step(
  exp: Experiment,
  *,
  loss_group: int,
  accumulation: int = 1,
  ema_decay: float = 0.0,
  seed: int = 0,
  mesh: Mesh | None = None,
  gather: initialize.Gather = lambda named: named,
) -> Step:
  """Makes the training step, a pure function (state, batch) -> (state, logs); jit it with the state donated.

  The random numbers of dropout depend on `seed` and the step only, so that a resumed run draws the same ones. All
  other arguments are those of `make_gradients` and `make_update`.
  """
  gradients = make_gradients(exp, loss_group=loss_group, accumulation=accumulation, mesh=mesh, gather=gather)
  update = make_update(exp, ema_decay=ema_decay, devices=1 if mesh is None else mesh.size)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    return update(state, *gradients(state.params, state.frozen, state.stats, batch, key))

  return train_step


def _norm(grads: ParamDict, devices: int) -> Array:
  """The global norm of the gradients.

  On one device, small gradients are concatenated, because XLA on CPU compiles several kernels for every sum. On several
  devices the partitioner would all-gather each of them first.
  """
  joined = lambda g: devices == 1 and g.size < SMALL
  small = [g if g.ndim == 1 else g.reshape(-1) for g in grads.values() if joined(g)]
  parts = [g for g in grads.values() if not joined(g)] + ([jnp.concatenate(small)] if small else [])
  # Without the barrier, XLA on CPU stores the squares for this sum and for Adam, at four times the cost.
  return jnp.sqrt(sum(_sum_of_squares(g) for g in jax.lax.optimization_barrier(parts)))


@jax.jit
def _sum_of_squares(x: Array) -> Array:
  """Jitted, so that it is traced once per shape."""
  return jnp.square(x).sum()
