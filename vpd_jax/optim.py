"""Learning-rate schedules, and an optax chain with learning-rate and weight-decay multipliers per parameter."""

import functools
import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpd_jax import moments as moments_lib
from vpd_jax.errors import UserError, check_choice
from vpd_jax.models import parameters as params_lib
from vpd_jax.types import Array, Fields, PyTree

Schedule = Callable[[Any], Array]


def triangular_poly(*, lr: float, min_lr: float, half: int, power: float = 0.9) -> Schedule:
  """Rises from `min_lr` to `lr` and falls again, both as a power of the steps done.

  With p = step / half, step counted from 1: (lr - min_lr) p^power + min_lr while p < 1, then
  max(min_lr, lr - (lr - min_lr) (p - 1)^power).

  Args:
    lr, min_lr: largest and smallest rate.
    half: steps to the top; in the release iterations per epoch times (epochs // 2).
    power: of both flanks.

  Source: VPD depth/train.py train().
  """

  def rate(count: Array) -> Array:
    p = (jnp.asarray(count, jnp.promote_types(jnp.result_type(float), jnp.float32)) + 1) / half
    rise = (lr - min_lr) * jnp.minimum(p, 1) ** power + min_lr
    fall = jnp.maximum(min_lr, lr - (lr - min_lr) * jnp.maximum(p - 1, 0) ** power)
    return jnp.where(p < 1, rise, fall)

  return rate


def cosine(*, lr: float, min_lr: float, num_steps: int, warmup: int) -> Schedule:
  """Linear warm-up from 0 over `warmup` steps, at most half of all, then half a cosine from `lr` to `min_lr`."""
  rate = optax.warmup_cosine_decay_schedule(0.0, lr, min(warmup, num_steps // 2), num_steps, min_lr)
  return cast(Schedule, rate)


def poly(*, lr: float, num_steps: int, power: float = 1.0, warmup: int = 0, warmup_ratio: float = 1e-6) -> Schedule:
  """Falls from `lr` to 0 as (1 - step / num_steps)^power, step counted from 0.

  Over the first `warmup` steps the rate is multiplied by 1 - (1 - step / warmup) (1 - warmup_ratio).

  Source: mmcv 1.7 runner/hooks/lr_updater.py PolyLrUpdaterHook (segmentation, warmup "linear"); VPD refer/train.py
  (power 0.9, no warm-up).
  """

  def rate(count: Array) -> Array:
    step = jnp.asarray(count, jnp.promote_types(jnp.result_type(float), jnp.float32))
    decayed = lr * jnp.maximum(1 - step / num_steps, 0) ** power
    remaining = jnp.maximum(1 - step / warmup, 0) if warmup else 0
    return decayed * (1 - remaining * (1 - warmup_ratio))

  return rate


def step(
  *, lr: float, drops: tuple[int, ...], factor: float = 0.1, warmup: int = 0, warmup_ratio: float = 1e-3
) -> Schedule:
  """`lr`, multiplied by `factor` from each step of `drops` on, step counted from 0.

  Over the first `warmup` steps the rate is multiplied by 1 - (1 - step / warmup) (1 - warmup_ratio).

  Source: mmcv 1.7 runner/hooks/lr_updater.py StepLrUpdaterHook, warmup "linear".
  """

  def rate(count: Array) -> Array:
    step = jnp.asarray(count, jnp.promote_types(jnp.result_type(float), jnp.float32))
    decayed = cast(Array, lr * factor ** sum((step >= drop).astype(step.dtype) for drop in drops))
    remaining = jnp.maximum(1 - step / warmup, 0) if warmup else 0
    return decayed * (1 - remaining * (1 - warmup_ratio))

  return rate


SCHEDULES = {"triangular_poly": triangular_poly, "cosine": cosine, "poly": poly, "step": step}


def schedule(name: str, **options: Any) -> Schedule:
  """The schedule of `optim.schedule`, from optimizer step (counted from 0) to rate.

  Raises:
    ValueError: unknown name.
  """
  check_choice("optim.schedule.name", name, sorted(SCHEDULES))
  return SCHEDULES[name](**options)


def check_length(run_steps: int, name: str, **options: Any) -> None:
  """Raises ValueError if a schedule ends before the run: the remaining steps would train at the lowest rate.

  Args:
    run_steps: config.num_steps.
    name, **options: as for `schedule`. triangular_poly ends at 2 * half, but a run may be an eighth longer, like the
      last of 25 epochs of the release. step has no end.
  """
  if name == "triangular_poly":
    end, longest, remedy = 2 * options["half"], 9 * options["half"] // 4, f"half={math.ceil(run_steps / 2)}"
  elif name in ("cosine", "poly"):
    end = longest = options["num_steps"]
    remedy = "num_steps=0, which is as long as the run"
  else:
    return
  if longest < run_steps:
    raise UserError(
      f"config.optim.schedule of name {name!r} ends at step {end}, the run at config.num_steps={run_steps}: the steps "
      f"between would learn at its lowest rate; set config.optim.schedule.{remedy}."
    )


class Groups(NamedTuple):
  """Parameter groups: the multipliers of every trainable array.

  Attributes:
    lr: learning-rate multiplier by name; frozen arrays are absent.
    decay: weight-decay multiplier by name, for the same names.
    label: the group's name for logs and tables, from the matched pattern.
    frozen: names of the frozen arrays.
  """

  lr: dict[str, float]
  decay: dict[str, float]
  label: dict[str, str]
  frozen: frozenset[str]


def _labels(patterns: Iterable[str]) -> list[str]:
  """A unique label for each pattern: "/unet/" becomes "unet", a later "unet" becomes "unet_2"."""
  labels: list[str] = []
  for pattern in patterns:
    base = re.sub(r"\W+", "_", pattern).strip("_") or "rest"
    choices = itertools.chain((base,), (f"{base}_{i}" for i in itertools.count(2)))
    labels.append(next(choice for choice in choices if choice not in labels))
  return labels


def groups(names: Iterable[str], lr_groups: tuple, decay_groups: tuple, *, allow_unused: bool = False) -> Groups:
  """Resolves `optim.lr_groups` (None freezes) and `optim.decay_groups` for the given parameter names.

  Raises:
    ValueError: as `parameters.match_rules`.
  """
  names = sorted(names)
  resolve = functools.partial(params_lib.match_rules, allow_unused=allow_unused)
  lr = resolve(names, lr_groups, field="config.optim.lr_groups")
  patterns = [pattern for pattern, _ in lr_groups]
  label = resolve(names, list(zip(patterns, _labels(patterns), strict=True)), field="config.optim.lr_groups")
  trained = [n for n in names if lr[n] is not None]
  decay = resolve(trained, decay_groups, field="config.optim.decay_groups")
  return Groups({n: lr[n] for n in trained}, decay, {n: label[n] for n in trained}, frozenset(names) - set(trained))


def with_lora(groups: Groups, frozen: str, kernels: dict[str, str], lr: float) -> Groups:
  """The groups with kernels replaced by their LoRA factors.

  Args:
    groups: of the model without LoRA.
    frozen: prefix of the names of the arrays that are no longer trained.
    kernels: kernel by name of the factor; factors use the weight decay of their kernel.
    lr: learning-rate multiplier of the factors.
  """
  others = {n: x for n, x in groups.lr.items() if not n.startswith(frozen)}
  return Groups(
    others | dict.fromkeys(kernels, lr),
    {n: groups.decay[n] for n in others} | {n: groups.decay[kernel] for n, kernel in kernels.items()},
    {n: groups.label[n] for n in others} | dict.fromkeys(kernels, "lora"),
    groups.frozen | (groups.lr.keys() - others.keys()),
  )


def optimizer(
  rate: Schedule,
  groups: Groups,
  *,
  decay: float,
  b1: float,
  b2: float,
  epsilon: float,
  clip_norm: float,
  moments: str = "float32",
  seed: int = 0,
) -> optax.GradientTransformation:
  """AdamW as one chain over a flat dict of arrays.

  clip -> Adam -> add decay * decay[name] * p -> multiply by lr[name] -> multiply by -rate(step).

  The state is that of the equivalent optax chain, with moments stored according to `moments`. The update computes the
  same formulas, but is traced only once for all arrays of one shape and group: with hundreds of arrays, tracing optax
  takes as long as tracing the network.

  Args:
    rate: from step to learning rate.
    groups: multipliers by name.
    decay: decoupled weight decay, multiplied by the group's rate as in torch.optim.AdamW.
    b1, b2, epsilon: of Adam.
    clip_norm: maximum global norm of the gradients; 0 disables clipping. No release clips.
    moments: storage format of the two moments between steps, see moments.py; an update uses their values before
      rounding.
    seed: of random rounding, which depends only on the seed, the step and the array's name.

  Raises:
    ValueError: unknown `moments`.
  """
  check_choice("config.optim.moments", moments, moments_lib.FORMATS)
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  chain = optax.chain(
    clip,
    optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon),
    optax.identity(),
    optax.identity(),
    optax.scale_by_schedule(lambda count: -rate(count)),
  )

  def init(params: PyTree) -> PyTree:
    clip_state, adam, *rest = cast(tuple, chain.init(params))
    zeros = lambda second: {n: moments_lib.zeros(p, moments, second=second) for n, p in params.items()}
    return (clip_state, optax.ScaleByAdamState(adam.count, zeros(False), zeros(True)), *rest)

  @functools.partial(jax.jit, static_argnames=("lr", "decay"))
  def update_one(g, mu, nu, p, scales, step_bits, array_bits, *, lr: float, decay: float):
    stored, noise = (mu, nu), (None, None)
    if step_bits is not None:
      noise = moments_lib.noise(step_bits, array_bits, g.shape)
    mu, nu = (moments_lib.dequantize(x, g.dtype) for x in stored)
    mu, nu = (1 - b1) * g + b1 * mu, (1 - b2) * jnp.square(g) + b2 * nu
    mu_scale, nu_scale, step_size = (scale.astype(g.dtype) for scale in scales)
    u = (mu / mu_scale) / (jnp.sqrt(nu / nu_scale) + epsilon)
    u = u + decay * p if decay else u
    mu, nu = (moments_lib.quantize(x, stored[i], second=i == 1, noise=noise[i]) for i, x in enumerate((mu, nu)))
    return (u if lr == 1 else u * lr) * step_size, mu, nu

  def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
    clip_state, adam, *empty, schedule = state
    clipped, clip_state = clip.update(updates, clip_state, params)
    count = optax.safe_increment(adam.count)
    scales = (1 - b1**count, 1 - b2**count, -rate(schedule.count))
    random = moments != "float32"
    step_bits = jax.random.bits(jax.random.fold_in(jax.random.key(seed), count), (2,), jnp.uint32) if random else None
    name_bits = lambda name: (
      np.array([zlib.crc32(x.encode()) for x in (name, f"{name}/")], np.uint32) if random else None
    )
    options = lambda name: {"lr": float(groups.lr[name]), "decay": decay * groups.decay[name]}
    results = {
      n: update_one(g, adam.mu[n], adam.nu[n], params[n], scales, step_bits, name_bits(n), **options(n))
      for n, g in cast(dict[str, Array], clipped).items()
    }
    updates, mu, nu = ({n: result[i] for n, result in results.items()} for i in range(3))
    adam = optax.ScaleByAdamState(count, mu, nu)
    schedule_state = optax.ScaleByScheduleState(optax.safe_increment(schedule.count))
    return updates, (clip_state, adam, *empty, schedule_state)

  return optax.GradientTransformation(init, update)


def with_moments(state: PyTree, kind: str, params: PyTree) -> PyTree:
  """Converts the moments of an `optimizer` state to another storage format, rounded to the nearest; traceable.

  Args:
    state: of an optimizer with any `moments`.
    kind: one of moments.FORMATS.
    params: arrays, or their shapes, by name.
  """
  clip, adam, *rest = state
  mu, nu = (
    {n: moments_lib.convert(x, kind, params[n].dtype, second=second) for n, x in moment.items()}
    for moment, second in ((adam.mu, False), (adam.nu, True))
  )
  return (clip, optax.ScaleByAdamState(adam.count, mu, nu), *rest)


def ema(old: dict[str, Array], new: dict[str, Array], decay: float) -> dict[str, Array]:
  """decay * old + (1 - decay) * new, array by array."""
  return jax.tree.map(lambda o, n: o + (1 - decay) * (n - o), old, new)


def table(groups: Groups, shapes: Fields) -> list[tuple]:
  """Rows of the start-up table: group, lr multiplier, decay multiplier, number of arrays, elements, first name."""
  names_by_group: dict[tuple, list[str]] = {}
  for name, multiplier in groups.lr.items():
    names_by_group.setdefault((groups.label[name], multiplier, groups.decay[name]), []).append(name)
  size = lambda names: sum(shapes[n].size for n in names)
  table_rows = [(*key, len(names), size(names), names[0]) for key, names in names_by_group.items()]
  if groups.frozen:
    frozen = sorted(groups.frozen)
    table_rows.append(("frozen", None, None, len(frozen), size(frozen), frozen[0]))
  return table_rows
