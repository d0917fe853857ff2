"""Training: one pure step, and the loop around it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpd_jax import optim
from vpd_jax import params as params_lib
from vpd_jax.assemble import Product
from vpd_jax.types import Array, Batch, Branch, Loss, Named, Outputs, Task, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def group_losses(task: Task, outputs: Outputs, batch: Batch, branches: tuple[Branch, ...], group: int) -> Loss:
  """Sums of loss, weight and logs over groups of consecutive images and over branches.

  Args:
    task: has the loss of one group.
    outputs: [len(branches) * B, ...] each, branch by branch.
    batch: [B, ...] each.
    branches: with their weights.
    group: images per group, 0 for all B.

  Returns:
    Loss(sum of weight * value, sum of weight, sums of weight * log): divided by the weight they are the means over the
    groups that have something to learn from. Sums, so that parts of an accumulated batch add up exactly.
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
  return Loss(total, count, logs)


def make_gradients(product: Product, *, loss_group: int, accumulation: int) -> Callable[..., Any]:
  """(params, frozen, stats, batch) -> (gradients, loss, logs, new stats).

  With `accumulation` the batch is cut into that many consecutive parts, each of whole groups; sums of loss, weight and
  gradients add up over them, and the statistics of all parts start from the same ones, so that the result is that of
  the whole batch.
  """
  parts, task = product.parts, product.task
  branches = product.method.branches(True)

  def loss_fn(params: Named, frozen: Named, stats: Named, batch: Batch):
    model = parts.merge(params, frozen, stats)
    loss = group_losses(task, model(batch, training=True), batch, branches, loss_group)
    return loss.value, (loss, params_lib.stats(model))

  def gradients(params: Named, frozen: Named, stats: Named, batch: Batch):
    return jax.grad(loss_fn, has_aux=True)(params, frozen, stats, batch)

  def accumulated(params: Named, frozen: Named, stats: Named, batch: Batch):
    cut = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)  # [A, B / A, ...]
    one = lambda part: gradients(params, frozen, stats, part)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], cut))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)
    grads, (loss, stats) = jax.lax.scan(add, zero, cut)[0]
    return grads, (loss, {name: x / accumulation for name, x in stats.items()})

  def run(params: Named, frozen: Named, stats: Named, batch: Batch):
    grads, (loss, stats) = (accumulated if accumulation > 1 else gradients)(params, frozen, stats, batch)
    share = 1 / jnp.maximum(loss.weight, 1)
    grads = {name: g * share.astype(g.dtype) for name, g in grads.items()}
    return grads, loss.value * share, {name: x * share for name, x in loss.logs.items()}, stats

  return run


def make_update(product: Product, *, ema_decay: float = 0.0) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """(state, gradients, loss, logs, new stats) -> (next state, logs): the optimizer's half of a step."""
  labels = {product.groups.label[name]: multiplier for name, multiplier in sorted(product.groups.lr.items())}

  def update(state: TrainState, grads: Named, loss: Array, logs: dict[str, Array], stats: Named):
    updates, opt_state = product.optimizer.update(grads, state.opt_state, state.params)
    params = {name: p + updates[name].astype(p.dtype) for name, p in state.params.items()}
    rate = product.rate(state.step)
    logs = {f"train/{name}": x for name, x in logs.items()} | {"train/loss": loss, "norm/gradients": _norm(grads)}
    logs |= {f"lr/{label}": rate * multiplier for label, multiplier in labels.items()}
    ema = None if state.ema is None else optim.ema(state.ema, params, ema_decay)
    return TrainState(state.step + 1, params, state.frozen, stats, opt_state, ema), logs

  return update


def make_step(product: Product, *, loss_group: int, accumulation: int = 1, ema_decay: float = 0.0) -> Step:
  """The training step: pure, from state and batch to state and logs, to be jitted once with the state donated."""
  gradients = make_gradients(product, loss_group=loss_group, accumulation=accumulation)
  update = make_update(product, ema_decay=ema_decay)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    return update(state, *gradients(state.params, state.frozen, state.stats, batch))

  return train_step


def _norm(grads: Named) -> Array:
  return jnp.sqrt(sum(jnp.square(g).sum() for g in grads.values()))
