"""Training: one pure step, and the loop around it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vpd_jax import assemble, evaluate, optim, sharding, start, writers
from vpd_jax import params as params_lib
from vpd_jax.assemble import Product
from vpd_jax.checkpoint import Checkpoints, StopRequest
from vpd_jax.data import pipeline
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


def run(config: ConfigDict, workdir: str, *, accept_changes: bool = False) -> dict[str, float]:
  """--mode=train: assemble, resume or start, loop. Rerun with the same workdir, it continues.

  Returns:
    The last scores.

  Raises:
    ValueError: in one line, for anything that cannot be assembled, found or resumed.
    FloatingPointError: the loss is not finite; names the step.
  """
  config = assemble.complete(config)
  product = assemble.assemble(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  pipeline.check_batch_size(config.data.batch_size, mesh.size, "devices")
  dataset = assemble.dataset(config, product)
  evaluator = evaluate.Evaluator(config, product, dataset, mesh)
  first = jax.process_index() == 0
  metric, mode = start.best_metric(config, product), product.task.best[1]
  checkpoints = Checkpoints(workdir, keep=config.keep, keep_best=config.keep_best, best_metric=metric, best_mode=mode)
  with checkpoints, writers.create(workdir, just_logging=not first) as writer, StopRequest() as stop:
    state, lines = start.resume_or_start(config, product, mesh, checkpoints, accept_changes=accept_changes)
    begin = int(state.step)
    _describe(config, product, mesh, writer, workdir, lines, begin)
    if begin >= config.num_steps:
      log(f"nothing to do: step {begin} of {config.num_steps} is reached")
      return {}
    batches = pipeline.prefetch(
      pipeline.train_batches(
        dataset,
        batch_size=config.data.batch_size,
        seed=config.seed,
        start_step=begin,
        workers=config.data.workers,
        keys=product.keys,
        prepare=product.method.prepare,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      ),
      sharding.batch_sharding(mesh),
    )
    try:
      return _loop(config, product, mesh, state, batches, evaluator, checkpoints, writer, stop, workdir)
    finally:
      batches.close()


def _loop(config, product, mesh, state, batches, evaluator, checkpoints, writer, stop, workdir) -> dict[str, float]:
  """Steps, and what is due after them: log, evaluate, save, stop."""
  begin, end = int(state.step), config.num_steps
  batch = next(batches)
  compiled = compile_step(config, product, mesh, batch)
  flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
  log(f"compiled; {flops / 1e9:.1f} GFLOP and {_memory(compiled)} per device and step")
  progress = writers.Progress(end, config.data.batch_size, start=begin, devices=mesh.size)
  scores, pending = {}, []
  for step in range(begin + 1, end + 1):
    _profile(config, step - begin, workdir)
    state, logs = compiled(state, batch)
    pending.append((step, logs["train/loss"]))
    last = step == end or stop.requested
    if last or step % config.log_every == 0:
      check_finite(pending)
      pending = []
      logs = jax.device_get(logs)
      line, speed = progress.report(step, float(logs["train/loss"]))
      speed["perf/tflops_per_sec_per_chip"] = flops / 1e9 / max(speed.get("perf/step_ms", math.inf), 1e-9)
      writer.write_scalars(step, logs | speed | {"perf/input_wait_ms": batches.mean_wait_ms()})
      log(line)
    due = {name: step % config[f"{name}_every"] == 0 for name in ("eval", "save")}
    with progress.pause():
      fresh = {}
      if (due["eval"] or step == end) and not stop.requested:
        result = evaluator.run((state.ema or state.params, state.frozen, state.stats))
        scores = fresh = result.scores
        writer.write_scalars(step, scores | {f"eval/trivial/{n}": x for n, x in evaluator.baselines().items()})
        writer.write_images(step, {f"panels/{config.data.name}": result.panels})
        log(evaluator.report(scores))
      if due["eval"] or due["save"] or last:
        check_finite(pending)
        pending = []
        checkpoints.save(step, state, start.to_json(config), fresh, force=last)
    if last:
      break
    batch = next(batches)
  if stop.requested and step < end:
    log(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from there")
  return scores


def compile_step(config: ConfigDict, product: Product, mesh: jax.sharding.Mesh, batch: Batch) -> jax.stages.Compiled:
  """The jitted step for this state and batch, compiled once; the state it is given is donated."""
  where = start.state_shardings(config, product, mesh)
  optim_options = config.optim
  step = make_step(
    product,
    loss_group=optim_options.loss_group,
    accumulation=optim_options.accumulation,
    ema_decay=optim_options.ema_decay,
  )
  spread = sharding.batch_sharding(mesh)
  jitted = jax.jit(
    step, donate_argnums=0, in_shardings=(where, spread), out_shardings=(where, sharding.replicated(mesh))
  )
  abstract = sharding.abstract(start.state_shapes(config, product), where)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), batch)
  return jitted.lower(abstract, shapes).compile()


def check_finite(pending: list[tuple[int, Array]]) -> None:
  """Raises FloatingPointError naming the first step whose loss is not finite."""
  for step, loss in pending:
    if not np.isfinite(jax.device_get(loss)):
      raise FloatingPointError(
        f"the loss of step {step} is {float(loss)}; nothing after the last checkpoint was saved. "
        "Lower config.optim.lr, set config.optim.clip_norm, or look at the data of that step."
      )


def log(line: str) -> None:
  """One line for the reader at the terminal, from the first process only."""
  if jax.process_index() == 0:
    print(line, flush=True)


def _describe(config, product, mesh, writer, workdir, lines: list[str], begin: int) -> None:
  """What a run says of itself at the start: devices, weights, groups, parameters, config."""
  devices = jax.devices()
  local = config.data.batch_size // mesh.size
  log(
    f"jax {jax.__version__}, {len(devices)} {devices[0].device_kind} devices, mesh {dict(mesh.shape)}, "
    f"batch {config.data.batch_size} = {mesh.size} x {local}, workdir {workdir}"
  )
  log("\n".join(lines))
  groups = writers.table(
    [("group", "lr x", "decay x", "arrays", "numbers", "first"), *optim.table(product.groups, product.parts.shapes)]
  )
  log(groups)
  if jax.process_index() == 0 and begin == 0:
    overview = writers.parameter_overview(product.parts.shapes)
    writer.write_hparams(config.to_dict())
    texts = {"config": start.to_json(config), "groups": groups, "parameters": overview}
    writer.write_texts(0, {name: f"```\n{text}\n```" for name, text in texts.items()})
    (epath.Path(workdir) / "config.json").write_text(start.to_json(config) + "\n")
    (epath.Path(workdir) / "parameters.txt").write_text(overview + "\n")


def _memory(compiled: jax.stages.Compiled) -> str:
  """XLA's own account of the step."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return "unknown memory"
  total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
  return (
    f"{(total - analysis.alias_size_in_bytes) / 2**30:.2f} GiB ({analysis.temp_size_in_bytes / 2**30:.2f} temporary)"
  )


def _profile(config: ConfigDict, done: int, workdir: str) -> None:
  """Starts a trace of `config.profile` steps at the tenth step of this process, and stops it."""
  if config.profile and done == 10:
    jax.profiler.start_trace(workdir)
  if config.profile and done == 10 + config.profile:
    jax.profiler.stop_trace()
    log(f"a trace of {config.profile} steps is in {workdir}/plugins/profile")
