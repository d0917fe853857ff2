"""Training: one pure step, and the loop around it."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vpd_jax import experiment, optim
from vpd_jax.checkpoints import initialize, workdir_lock
from vpd_jax.config import loader
from vpd_jax.convert.finite import check_finite
from vpd_jax.data import pipeline
from vpd_jax.distributed import sharding
from vpd_jax.distributed.preemption import PreemptionGuard
from vpd_jax.evaluation import evaluate
from vpd_jax.experiment import Product
from vpd_jax.models import parameters as params_lib
from vpd_jax.monitoring import chips, writers, xla_cost
from vpd_jax.monitoring.profiler import Profiler
from vpd_jax.training import startup_report
from vpd_jax.types import Array, Batch, Branch, Loss, Outputs, ParamDict, Task, TrainState

SMALL = 2**16  # numbers

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
  return Loss(cast(Array, total), cast(Array, count), logs)


def make_gradients(
  product: Product,
  *,
  loss_group: int,
  accumulation: int,
  mesh: Mesh | None = None,
  gather: initialize.Gather = lambda named: named,
) -> Callable[..., Any]:
  """(params, frozen, stats, batch, key) -> (gradients, loss, logs, new stats); the key is for dropout.

  With `accumulation` the batch is cut into that many consecutive parts, each of whole groups; sums of loss, weight and
  gradients add up over them, and the statistics of all parts start from the same ones, so that the result is that of
  the whole batch. On a `mesh` every part is spread over all devices; left alone, the parts themselves would be.
  """
  parts, task = product.parts, product.task
  branches = product.method.branches(True)

  def loss_fn(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None):
    model = parts.merge(gather(params), gather(frozen), stats)
    loss = group_losses(task, model(batch, training=True, key=key), batch, branches, loss_group)
    return loss.value, (loss, params_lib.stats(model))

  def gradients(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None):
    return jax.grad(loss_fn, has_aux=True)(params, frozen, stats, batch, key)

  def accumulated(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None):
    cut = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)  # [A, B / A, ...]
    if mesh is not None:
      cut = jax.lax.with_sharding_constraint(cut, NamedSharding(mesh, P(None, sharding.AXES)))
    one = lambda part: gradients(params, frozen, stats, *part)
    cut = cut, None if key is None else jax.random.split(key, accumulation)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], cut))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)
    grads, (loss, stats) = jax.lax.scan(add, zero, cut)[0]
    return grads, (loss, {name: x / accumulation for name, x in stats.items()})

  def run(params: ParamDict, frozen: ParamDict, stats: ParamDict, batch: Batch, key: Array | None = None):
    grads, (loss, stats) = (accumulated if accumulation > 1 else gradients)(params, frozen, stats, batch, key)
    share = 1 / jnp.maximum(loss.weight, 1)
    grads = {name: g * share.astype(g.dtype) for name, g in grads.items()}
    return grads, loss.value * share, {name: x * share for name, x in loss.logs.items()}, stats

  return run


def make_update(
  product: Product, *, ema_decay: float = 0.0, devices: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
  """(state, gradients, loss, logs, new stats) -> (next state, logs): the optimizer's half of a step."""
  labels = {product.groups.label[name]: multiplier for name, multiplier in sorted(product.groups.lr.items())}

  def update(state: TrainState, grads: ParamDict, loss: Array, logs: dict[str, Array], stats: ParamDict):
    updates, opt_state = product.optimizer.update(grads, state.opt_state, state.params)
    params = {name: p + updates[name].astype(p.dtype) for name, p in state.params.items()}
    rate = product.rate(state.step)
    logs = {f"train/{name}": x for name, x in logs.items()} | {
      "train/loss": loss,
      "norm/gradients": _norm(grads, devices),
    }
    logs |= {f"lr/{label}": rate * multiplier for label, multiplier in labels.items()}
    ema = None if state.ema is None else optim.ema(state.ema, params, ema_decay)
    return TrainState(state.step + 1, params, state.frozen, stats, opt_state, ema), logs

  return update


def make_step(
  product: Product,
  *,
  loss_group: int,
  accumulation: int = 1,
  ema_decay: float = 0.0,
  seed: int = 0,
  mesh: Mesh | None = None,
  gather: initialize.Gather = lambda named: named,
) -> Step:
  """The training step: pure, from state and batch to state and logs, to be jitted once with the state donated.

  Dropout's random numbers come from `seed` and the number of the step, so that a run that goes on draws the same ones.
  """
  gradients = make_gradients(product, loss_group=loss_group, accumulation=accumulation, mesh=mesh, gather=gather)
  update = make_update(product, ema_decay=ema_decay, devices=1 if mesh is None else mesh.size)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    return update(state, *gradients(state.params, state.frozen, state.stats, batch, key))

  return train_step


def _norm(grads: ParamDict, devices: int) -> Array:
  """The norm of all gradients.

  On one device small ones are joined to one vector, for XLA on CPU makes several programs of every sum; on several the
  partitioner would gather each of them first.
  """
  joined = lambda g: devices == 1 and g.size < SMALL
  small = [g if g.ndim == 1 else g.reshape(-1) for g in grads.values() if joined(g)]
  parts = [g for g in grads.values() if not joined(g)] + ([jnp.concatenate(small)] if small else [])
  # Behind a barrier: else XLA on CPU writes the squares down, once for this and for Adam, at four times the cost.
  return jnp.sqrt(sum(_sum_of_squares(g) for g in jax.lax.optimization_barrier(parts)))


@jax.jit
def _sum_of_squares(x: Array) -> Array:
  """Traced once for all arrays of a shape."""
  return jnp.square(x).sum()


def run(config: ConfigDict, workdir: str, *, accept_changes: bool = False) -> dict[str, float]:
  """--mode=train: assemble, resume or start, loop. Rerun with the same workdir, it continues.

  Args:
    config: of the run.
    workdir: a local folder or a bucket.
    accept_changes: continue although the config differs from the checkpoint's where it matters.

  Returns:
    The last scores; empty where nothing was left to do.

  Raises:
    ValueError: in one line, for anything that cannot be assembled, found or resumed; another run has the workdir.
    FloatingPointError: the loss is not finite; names the step.
  """
  config = initialize.with_backbone_sizes(config, config.init.run or config.init.pretrained)
  product = experiment.assemble(config)
  initialize.check_training(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  pipeline.check_batch_size(config.data.batch_size // config.optim.accumulation, mesh.size, "devices")
  dataset = experiment.dataset(config, product)
  dataset.source("train")  # a file that is missing is told before anything is made
  evaluator = evaluate.Evaluator(config, product, dataset, mesh)
  with contextlib.ExitStack() as stack:
    # Before the checkpoints, which remove what another run may be writing.
    alone = [] if jax.process_index() else stack.enter_context(workdir_lock.claimed(workdir))
    checkpoints = stack.enter_context(initialize.checkpoints(config, product, workdir))
    stop = stack.enter_context(PreemptionGuard())
    state, lines = initialize.resume_or_start(config, product, mesh, checkpoints, accept_changes=accept_changes)
    lines += alone
    lines += dataset.describe()
    lines += [*experiment.sentence_lines(product, dataset), *evaluator.encodings.lines()]
    # Only now: a workdir that is refused stays as it was.
    writer = stack.enter_context(writers.create(workdir, just_logging=jax.process_index() > 0, backend=config.writer))
    begin, end = int(state.step), config.num_steps
    startup_report.describe(config, product, mesh, writer, workdir, lines, begin, log)

    def score(step: int, state: TrainState) -> dict[str, float]:
      """Evaluates, adds the scores to the checkpoint, writes and logs; empty where it was stopped."""
      result = evaluator.run((state.ema or state.params, state.frozen, state.stats), stop.now)
      if result is not None:
        checkpoints.add_scores(step, result.scores)
      if result is not None and jax.process_index() == 0:
        trivial = {f"eval/trivial/{name}": value for name, value in evaluator.baselines().items()}
        writer.write_scalars(step, result.scores | trivial)
        writer.write_images(step, {f"panels/{config.data.name}": result.panels})
        log(evaluator.report(result.scores, result.rows))
      return result.scores if result is not None else {}

    scores = {}
    if 0 < begin <= end and (begin == end or begin % config.eval_every == 0) and not checkpoints.scores(begin):
      log(f"step {begin} was saved without its scores: it is evaluated now")
      scores = score(begin, state)
    if begin >= end or stop.requested:
      log(f"nothing to do: step {begin} of {end} is reached" if begin >= end else f"stopped by SIGTERM at step {begin}")
      return scores
    encode = lambda local: evaluator.encodings(local, state.frozen)
    batches = stack.enter_context(contextlib.closing(_batches(config, product, dataset, mesh, begin, encode)))
    batch = next(batches)
    begun = time.monotonic()
    lowered = lower_step(config, product, mesh, batch)
    traced = time.monotonic()
    compiled = lowered.compile(xla_cost.compiler_options(mesh))
    seconds = f"traced in {traced - begun:.1f} s, compiled in {time.monotonic() - traced:.1f} s"
    # XLA counts the body of a loop once: the parts of an accumulated batch are one.
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0) * config.optim.accumulation
    # Counting takes seconds of tracing, and a share of the peak is known on accelerators only.
    model = model_flops(config, batch) if chips.of(mesh.devices.flat[0].device_kind) else 0.0
    log(f"compiled; {flops / 1e9:.1f} GFLOP and {xla_cost.memory_summary(compiled)} per device and step; {seconds}")
    progress = writers.Progress(end, config.data.batch_size, start=begin, devices=mesh.size)
    trace = stack.enter_context(Profiler(config.profile, workdir, log, lambda: xla_cost.text(compiled)))
    pending, logs = [], {}

    def batch_of(step: int) -> Batch:
      """The batch of a step once more."""
      with contextlib.closing(_batches(config, product, dataset, mesh, step - 1, encode)) as again:
        return next(again)

    for step in range(begin + 1, end + 1):
      trace.before(step - begin, logs)
      state, logs = compiled(state, batch)
      pending.append((step, logs["train/loss"], logs["norm/gradients"]))
      last = stop.now() or step == end
      if last or step % config.log_every == 0:
        pending = check_finite(pending, state, batch_of)
        line, speed = progress.report(step, float(logs["train/loss"]))
        speed |= xla_cost.rates(speed.get("perf/step_ms", math.inf) / 1e3, flops, model / mesh.size)
        speed |= {"perf/input_wait_ms": batches.mean_wait_ms(), "data/skipped_rows": batches.skipped}
        writer.write_scalars(step, jax.device_get(logs) | speed)
        log(line)
      with progress.pause():
        due, new = step % config.eval_every == 0, {}
        if due or last or step % config.save_every == 0:
          pending = check_finite(pending, state, batch_of)
          # Before it is scored: a fault there costs no step.
          checkpoints.save(step, state, initialize.to_json(config), force=last)
        if (due or step == end) and not stop.requested:
          new = score(step, state)
          scores, last = new or scores, last or stop.requested
      if last:
        break
      batch = next(batches)
    if stop.requested and (step < end or not new):
      checkpoints.wait()
      log(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from there")
    return scores


def _batches(
  config: ConfigDict,
  product: Product,
  dataset: Any,
  mesh: Mesh,
  begin: int,
  encode: Callable[[pipeline.Batches], Any] = lambda local: local,
) -> pipeline.Prefetch:
  """The training batches from step `begin` on, on the mesh, after `encode` of this process' rows."""
  local = pipeline.train_batches(
    dataset,
    batch_size=config.data.batch_size,
    seed=config.seed,
    start_step=begin,
    workers=config.data.workers,
    keys=experiment.batch_keys(product, dataset),
    prepare=product.method.prepare,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    on_bad_record=config.data.on_bad_record,
  )
  return pipeline.prefetch(encode(local), sharding.batch_sharding(mesh))


def compile_step(config: ConfigDict, product: Product, mesh: Mesh, batch: Batch) -> jax.stages.Compiled:
  """The jitted step for this state and batch, compiled once; the state it is given is donated."""
  return lower_step(config, product, mesh, batch).compile(xla_cost.compiler_options(mesh))


def lower_step(config: ConfigDict, product: Product, mesh: Mesh, batch: Batch) -> jax.stages.Lowered:
  """The jitted step before it is compiled; `batch` and the devices of `mesh` may be mere descriptions."""
  where = initialize.state_shardings(config, product, mesh)
  options = {field: config.optim[field] for field in ("loss_group", "accumulation", "ema_decay")}
  step = make_step(product, **options, seed=config.seed, mesh=mesh, gather=initialize.gather(config, product, mesh))
  spread = sharding.batch_sharding(mesh)
  jitted = jax.jit(
    step, donate_argnums=0, in_shardings=(where, spread), out_shardings=(where, sharding.replicated(mesh))
  )
  abstract = sharding.abstract(initialize.state_shapes(config, product), where)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), batch)
  with sharding.tracing(mesh):
    return jitted.lower(abstract, shapes)


def model_flops(config: ConfigDict, batch: Batch) -> float:
  """Operations of one training step, all devices together, see xla_cost.model_flops: recomputation is left out, and
  every kernel of attention counts alike.

  Args:
    config: of the run.
    batch: that of a step, arrays or descriptions.
  """
  plain = {"backbone.attention": "xla", "backbone.remat": False, "optim.accumulation": 1}
  config = loader.changed(config, plain)
  product = experiment.assemble(config)
  step = make_step(product, loss_group=config.optim.loss_group)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  return xla_cost.model_flops(step, initialize.state_shapes(config, product), shapes)


def log(line: str) -> None:
  """One line for the reader at the terminal, from the first process only."""
  if jax.process_index() == 0:
    print(line, flush=True)
