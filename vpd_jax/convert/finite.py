"""Detection of NaN and infinity in weights and in training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import NotFiniteError, UserError, first_items
from vpd_jax.types import Options

REMEDY = "fetch or convert them again, or take a checkpoint from before the training went wrong"


def count_non_finite(named: Options) -> dict[str, int]:
  """Counts the values that are NaN or infinite, by name, for the arrays that have any.

  Args:
    named: arrays on the host, or on devices, where each process checks its own shards.
  """
  counts = {name: sum(map(_count, _parts(x))) for name, x in named.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
  return {name: count for name, count in counts.items() if count}


def summary(counts: Mapping[str, int]) -> str:
  """ "3 arrays hold NaN or infinity: a (5 numbers), b (1 numbers), ..": the first ten and the number of arrays."""
  listed = first_items([f"{name} ({count} numbers)" for name, count in counts.items()])
  return f"{len(counts)} arrays hold NaN or infinity: {listed}"


def check(named: Options, origin: str) -> None:
  """Rejects weights that contain NaN or infinity.

  Raises:
    ValueError: names the arrays and the origin.
  """
  if counts := count_non_finite(named):
    raise UserError(f"{origin}: {summary(counts)}; {REMEDY}.")


def check_finite(
  pending: Sequence[tuple[int, Any, Any]], state: object = None, batch_of: Callable[[int], Any] | None = None
) -> list:
  """Returns an empty list if all steps are finite.

  Args:
    pending: (step, loss, gradient norm) of the steps that have not been checked.
    state: the state after them; its frozen arrays are those of the steps.
    batch_of: loads the batch of a step again, as arrays by name.

  Raises:
    FloatingPointError: names the first step whose loss or gradient is not finite, and whether its data or the frozen
      weights are the cause; the initial weights of a run are finite, see initialize.py.
  """
  for step, loss, norm in jax.device_get(pending):
    if not np.isfinite(loss + norm):
      text = f"the loss of step {step} is {loss}, the norm of its gradients {norm}; nothing after the last checkpoint "
      raise NotFiniteError(f"{text}was saved. {_cause(step, state, batch_of)}")
  return []


def _cause(step: int, state: Any, batch_of: Callable[[int], Any] | None) -> str:
  """The probable cause of a step that is not finite, and a remedy."""
  if counts := count_non_finite(state.frozen if state else {}):
    return f"The weights are to blame: {summary(counts)}; {REMEDY}."
  remedy = "Lower config.optim.lr or set config.optim.clip_norm"
  try:
    counts = count_non_finite(batch_of(step)) if batch_of else None
  except Exception:  # loading the batch again may fail, which is not the original error
    counts = None
  if counts is None:
    return f"{remedy}, or look at the data of that step."
  if counts:
    return f"The data are to blame: in the batch of that step {summary(counts)}; correct or leave out those records."
  scope = "" if jax.process_count() == 1 else ", of this process,"
  return f"Its data{scope} and the weights at the start of the run hold finite numbers only. {remedy}."


def _parts(x: object) -> list[object]:
  """The shards of an array that this process checks, so that every value is counted once."""
  return [part.data for part in x.addressable_shards if part.replica_id == 0] if isinstance(x, jax.Array) else [x]


def _count(x: object) -> int:
  x = np.asarray(x)
  return x.size - int(np.count_nonzero(np.isfinite(x)))
