"""The gate: VPD's referring segmentation in float64 against the authors' code in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.helpers import referring_network as single
from tests.helpers.gradients import check_gradients, check_steps
from vpd_jax import optim
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released_referring
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import layers
from vpd_jax.tasks.referring.task import Referring

pytestmark = [pytest.mark.x64, pytest.mark.slow]
TOKENS = 40


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("vpd_refer_40.tiny_f64.npz")


@pytest.fixture(scope="module")
def run():
  """Five steps of AdamW; the sinusoid is the authors' float32 one, widened, as libraries differ in its last bit."""
  parts = single.describe(TOKENS, jnp.float64)
  named, batch = single.weights(parts, TOKENS, np.float64), single.batch_of(TOKENS, jnp.float64)
  groups = optim.groups(parts.params, single.AS_RUN, single.DECAY)
  rate = optim.schedule(**single.RECIPE["schedule"] | {"num_steps": 10}, lr=single.RECIPE["lr"])
  kept = {name: single.RECIPE[name] for name in ("decay", "b1", "b2", "epsilon", "clip_norm")}
  chain = optim.optimizer(rate, groups, **kept)
  params = {name: named[name] for name in groups.lr}
  frozen = {name: named[name] for name in parts.params | parts.buffers if name not in params}
  stats = {name: named[name] for name in parts.stats}

  def loss(params, frozen, stats):
    model = parts.merge(params, frozen, stats)
    value = Referring().loss(model(batch, training=True), batch).value
    return value, params_lib.stats(model)

  def evaluated(params, frozen, stats):
    return Referring().loss(parts.merge(params, frozen, stats)(batch, training=False), batch).value

  sinusoid = oracle.golden("sd_unet_hier.tiny.npz")["output/timestep_embedding"][1:2]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, "timestep_embedding", lambda timesteps, width: jnp.asarray(sinusoid))
    gradients, evaluated = jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(evaluated)
    update, state = jax.jit(chain.update), chain.init(params)
    losses, first, before = [], None, params
    eval_losses = [evaluated(params, frozen, stats)]
    for _ in range(5):
      (value, stats), grads = gradients(params, frozen, stats)
      first = first or grads
      losses.append(float(value))
      updates, state = update(grads, state, params)
      params = {name: params[name] + updates[name] for name in params}
    eval_losses.append(evaluated(params, frozen, stats))
  return {"losses": losses, "eval": eval_losses, "grads": first, "before": before, "after": params, "frozen": frozen}


def in_their_names(named):
  return rules.to_source({n: x for n, x in named.items() if n != single.CLASS_VECTORS}, released_referring.vpd_refer())


def test_losses_agree_to_1e_10(run, arrays):
  np.testing.assert_allclose(run["losses"], arrays["trace/loss"], rtol=0, atol=1e-10)
  expected = [arrays["output/eval_loss"], arrays["trace/eval_loss_after"]]
  np.testing.assert_allclose(run["eval"], expected, rtol=0, atol=1e-10)


def test_gradients_agree_to_1e_9(run, arrays):
  check_gradients(in_their_names(run["grads"]), arrays, 1e-9)


def test_five_steps_move_every_parameter_as_the_authors(run, arrays):
  before, after = (in_their_names(run[name] | run["frozen"]) for name in ("before", "after"))
  check_steps(before, after, arrays, "vpd_refer")
