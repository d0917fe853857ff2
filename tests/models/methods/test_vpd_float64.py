"""The gate: VPD depth in float64 against the authors' code in float64, where rounding plays no part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle, tiny
from tests.helpers import vpd_depth as single
from tests.helpers.gradients import check_gradients, check_steps
from vpd_jax import experiment
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.models.backbones import layers
from vpd_jax.tasks.depth.task import silog

pytestmark = pytest.mark.x64


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("vpd_depth.tiny_f64.npz")


@pytest.fixture(scope="module")
def run():
  """Five steps in float64; the sinusoid is the authors' float32 one, widened, as libraries differ in its last bit."""
  exp = experiment.assemble(tiny.depth_config(dtype="float64", param_dtype="float64"))
  state = tiny.train_state(exp, tiny.depth_weights(dtype=np.float64))
  sinusoid = oracle.golden("sd_unet_hier.tiny.npz")["output/timestep_embedding"][1:2]
  inputs = oracle.golden("vpd_depth.tiny.npz")
  batch = single.batch_of(inputs, jnp.float64)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, "timestep_embedding", lambda timesteps, width: jnp.asarray(sinusoid))
    result = single.run_steps(exp, state, batch)
    evaluate = jax.jit(lambda named, batch: exp.spec.merge(*named)(batch, training=False)["depth"])
    result["eval_loss"] = [
      float(silog(evaluate(single.everything(s), batch), batch["depth"])[0]) for s in (state, result["states"][-1])
    ]
  return result


def test_losses_agree_to_1e_10(run, arrays):
  assert abs(float(run["loss"]) - float(arrays["train/loss"])) < 1e-10
  np.testing.assert_allclose([log["train/loss"] for log in run["logs"]], arrays["trace/loss"], rtol=0, atol=1e-10)
  np.testing.assert_allclose(
    run["eval_loss"], [arrays["output/eval_loss"], arrays["trace/eval_loss_after"]], rtol=0, atol=1e-10
  )


def test_gradients_agree_to_1e_9(run, arrays):
  check_gradients(run["grads"], arrays, 1e-9)


def test_five_steps_move_every_parameter_as_the_authors(run, arrays):
  first, last = (
    rules.to_source({**s.params, **s.frozen}, released.vpd_depth()) for s in (run["states"][0], run["states"][-1])
  )
  del first["encoder.class_embeddings"]  # an input there
  check_steps(first, last, arrays, "vpd_depth")
