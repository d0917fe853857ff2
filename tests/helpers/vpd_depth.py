"""Inputs and steps of the authors' tiny VPD depth network; the steps serve other networks for depth too."""

import copy

import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.training import step as training_step

# The columns of the authors' metrics.
SCORES = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")


def batch_of(arrays, dtype=jnp.float32):
  return {
    "image": jnp.asarray(arrays["input/image"].transpose(0, 2, 3, 1), dtype),
    "depth": jnp.asarray(arrays["input/depth"], dtype),
    "class_id": jnp.asarray(arrays["input/class_ids"], jnp.int32),
  }


def everything(state):
  return state.params, state.frozen, state.stats


def scores_on_nyu(task, depth, truth):
  """SCORES of small pictures [B, h, w] with the release's crop, which is in pixels."""
  task = copy.copy(task)
  task.eval_crop = "eigen_nyu"
  rows = task.measure(depth, {"depth": truth})
  scores = task.summarize({name: np.asarray(x) for name, x in rows.items()})
  return [scores[name] for name in SCORES]


def run_steps(exp, state, batch, table=released.vpd_depth, count=5):
  """Gradients, the states before and after each of `count` steps, their logs; network and optimizer compiled once."""
  gradients = jax.jit(training_step.make_gradients(exp, loss_group=0, accumulation=1))
  update = jax.jit(training_step.make_update(exp))
  states, logs, first = [state], [], None
  for _ in range(count):
    result = gradients(*everything(states[-1]), batch)
    first = first or result
    state, log = update(states[-1], *result)
    states.append(state)
    logs.append(jax.device_get(log))
  return {
    "grads": rules.to_source(first[0], table()),
    "loss": first[1],
    "stats": first[3],
    "states": states,
    "logs": logs,
  }
