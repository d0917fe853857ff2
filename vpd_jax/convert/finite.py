"""Numbers that are not finite: found by the name of their array, refused where they come in."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import NotFiniteError, UserError
from vpd_jax.types import Options

REMEDY = "fetch or convert them again, or take a checkpoint from before the training went wrong"


def missing(named: Options) -> dict[str, int]:
  """How many numbers are NaN or infinite, by name, of the arrays that hold such.

  Args:
    named: arrays of the host, or of devices: there each process looks at what it holds.
  """
  found = {name: sum(map(_count, _parts(x))) for name, x in named.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
  return {name: count for name, count in found.items() if count}


def in_words(found: Mapping[str, int]) -> str:
  """ "3 arrays hold NaN or infinity: a (5 numbers), b (1 numbers), ..": the first ten and the count."""
  more = f", and {len(found) - 10} more" if len(found) > 10 else ""
  listed = ", ".join(f"{name} ({count} numbers)" for name, count in list(found.items())[:10])
  return f"{len(found)} arrays hold NaN or infinity: {listed}{more}"


def check(named: Options, origin: str) -> None:
  """Refuses weights that hold NaN or infinity.

  Raises:
    ValueError: names the arrays, and the origin.
  """
  if found := missing(named):
    raise UserError(f"{origin}: {in_words(found)}; {REMEDY}.")


def check_finite(
  pending: list[tuple[int, Any, Any]], state: object = None, batch_of: Callable[[int], Any] | None = None
) -> list:
  """An empty list where all steps are finite.

  Args:
    pending: (step, loss, norm of the gradients) of steps that were not looked at yet.
    state: after them, whose frozen arrays are those of the steps.
    batch_of: gives the batch of a step once more, arrays by name.

  Raises:
    FloatingPointError: names the first step whose loss or gradient is not finite, and whether its data or the frozen
      weights are to blame; what begins in a run is finite, see initialize.py.
  """
  for step, loss, norm in jax.device_get(pending):
    if not np.isfinite(loss + norm):
      text = f"the loss of step {step} is {loss}, the norm of its gradients {norm}; nothing after the last checkpoint "
      raise NotFiniteError(f"{text}was saved. {_cause(step, state, batch_of)}")
  return []


def _cause(step: int, state: Any, batch_of: Callable[[int], Any] | None) -> str:
  """What made a step not finite, as far as can be told, and what to do."""
  if found := missing(state.frozen if state else {}):
    return f"The weights are to blame: {in_words(found)}; {REMEDY}."
  remedy = "Lower config.optim.lr or set config.optim.clip_norm"
  try:
    found = missing(batch_of(step)) if batch_of else None
  except Exception:  # reading again can fail in any way, and is not what went wrong
    found = None
  if found is None:
    return f"{remedy}, or look at the data of that step."
  if found:
    return f"The data are to blame: in the batch of that step {in_words(found)}; correct or leave out those records."
  here = "" if jax.process_count() == 1 else ", of this process,"
  return f"Its data{here} and the weights at the start of the run hold finite numbers only. {remedy}."


def _parts(x: object) -> list[object]:
  """What of an array is to be looked at in this process, every number once."""
  return [part.data for part in x.addressable_shards if part.replica_id == 0] if isinstance(x, jax.Array) else [x]


def _count(x: object) -> int:
  x = np.asarray(x)
  return x.size - int(np.count_nonzero(np.isfinite(x)))
