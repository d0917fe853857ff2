"""The gate: EcoDepth in float64 against the authors' code in float64, where rounding plays no part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eco_depth, fill, oracle, tiny
from tests.helpers import vpd_depth as single
from tests.helpers.gradients import check_gradients
from vpd_jax import experiment
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.vit import LEVELS

pytestmark = pytest.mark.x64


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("eco_depth_nyu.tiny_f64.npz")


@pytest.fixture(scope="module")
def run():
  """Five steps in float64; the sinusoid is the authors' float32 one, widened, as libraries differ in its last bit."""
  config = eco_depth.config(dtype="float64", param_dtype="float64")
  product = experiment.assemble(config)
  state = tiny.train_state(product, eco_depth.weights(config, np.float64))
  sinusoid = oracle.golden("sd_unet_hier.tiny.npz")["output/timestep_embedding"][1:2]
  batch = eco_depth.batch_of(dtype=jnp.float64)

  @jax.jit
  def evaluate(named, batch):
    model = product.parts.merge(*named)
    context = model.method.context
    states = context.vit_model(jnp.asarray(LEVELS)[context.picture(batch["image"])].astype(jnp.float64))
    taps = {f"vit.layer.{i}": x for i, x in enumerate(states.hidden[1:])} | {"vit.embeddings": states.hidden[0]}
    taps |= {"vit.layernorm": states.last, "vit.logits": states.logits, "cide.context": context(batch)}
    return product.task.loss(model(batch, training=False), batch).value, taps

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, "timestep_embedding", lambda timesteps, width: jnp.asarray(sinusoid))
    result = single.run_steps(product, state, batch, released.eco_depth_depth)
    first = evaluate(single.everything(state), batch)
    last = evaluate(single.everything(result["states"][-1]), batch)
  return result | {"eval_loss": [float(first[0]), float(last[0])], "taps": first[1]}


def test_taps_of_classifier_and_context_agree_to_1e_12(run, arrays):
  for name, value in run["taps"].items():
    oracle.compare(value, arrays, f"tap/{name}", 1e-12)
  assert len(run["taps"]) == 7


def test_losses_agree_to_1e_10(run, arrays):
  assert abs(float(run["loss"]) - float(arrays["train/loss"])) < 1e-10
  np.testing.assert_allclose([log["train/loss"] for log in run["logs"]], arrays["trace/loss"], rtol=0, atol=1e-10)
  np.testing.assert_allclose(
    run["eval_loss"], [arrays["output/eval_loss"], arrays["trace/eval_loss_after"]], rtol=0, atol=1e-10
  )


def test_gradients_agree_to_1e_9(run, arrays):
  check_gradients(run["grads"], arrays, 1e-9)
  assert arrays["train/no_grad_names"].size == 0


def test_rates_are_the_authors(run, arrays):
  groups = [str(name) for name in arrays["trace/group_names"]]
  ours = {"layer_1": "lr/rest", "layer_0": "lr/unet", "layer_-1": "lr/embeddings"}
  for log, rates in zip(run["logs"], arrays["trace/lr"], strict=True):
    told = [log[ours[name.removesuffix("_decay").removesuffix("_no")]] for name in groups]
    np.testing.assert_allclose(told, rates, rtol=1e-5)


def test_five_steps_move_every_parameter_as_the_authors(run, arrays):
  first, last = (
    rules.to_source({**s.params, **s.frozen}, released.eco_depth_depth()) for s in (run["states"][0], run["states"][-1])
  )
  names = [str(n) for n in arrays["trace/param_names"]]
  assert set(names) == first.keys()
  worst = 0.0
  for i, name in enumerate(names):
    delta = np.asarray(last[name]) - np.asarray(first[name])
    along = fill.normal("probe/" + name, delta.shape, 0).astype(np.float64)
    expected = arrays["trace/param_delta_l2"][i]
    if oracle.is_noise("eco_depth", name):
      continue
    error = abs(np.linalg.norm(delta) - expected)
    worst = max(worst, error / expected if expected else error)
    assert abs((delta * along).sum() - arrays["trace/param_delta_probe"][i]) <= 1e-9 * max(1.0, expected), name
  assert worst < 1e-9, worst
