"""Inputs and steps of the authors' tiny VPD depth network; the steps serve other networks for depth too."""

import jax
import jax.numpy as jnp

from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.training import step as training_step


def batch_of(arrays, dtype=jnp.float32):
  return {
    "image": jnp.asarray(arrays["input/image"].transpose(0, 2, 3, 1), dtype),
    "depth": jnp.asarray(arrays["input/depth"], dtype),
    "class_id": jnp.asarray(arrays["input/class_ids"], jnp.int32),
  }


def everything(state):
  return state.params, state.frozen, state.stats


def run_steps(product, state, batch, table=released.vpd_depth):
  """Gradients, the states before and after each of five steps, their logs; network and optimizer compiled once."""
  gradients = jax.jit(training_step.make_gradients(product, loss_group=0, accumulation=1))
  update = jax.jit(training_step.make_update(product))
  states, logs, first = [state], [], None
  for _ in range(5):
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
