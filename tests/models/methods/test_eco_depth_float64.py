"""The gate: EcoDepth in float64 against the authors' code in float64, where rounding plays no part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eco_depth, oracle, tiny
from tests.helpers import vpd_depth as single
from tests.helpers.gradients import check_gradients, check_steps
from vpd_jax import experiment
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.vit import LEVELS

pytestmark = pytest.mark.x64


class Case:
  """Losses, gradients and taps of one of the authors' networks in float64; on NYU also five steps."""

  def __init__(self, data):
    self.arrays = oracle.golden(f"eco_depth_{data}.tiny_f64.npz")
    config = eco_depth.config(data, dtype="float64", param_dtype="float64")
    exp = experiment.assemble(config)
    state = tiny.train_state(exp, eco_depth.weights(config, np.float64))
    batch = eco_depth.batch_of(data, dtype=jnp.float64)

    @jax.jit
    def evaluate(named):
      model = exp.spec.merge(*named)
      context = model.method.context
      states = context.vit_model(jnp.asarray(LEVELS)[context.picture(batch["image"])].astype(jnp.float64))
      taps = {f"vit.layer.{i}": x for i, x in enumerate(states.hidden[1:])} | {"vit.embeddings": states.hidden[0]}
      taps |= {"vit.layernorm": states.last, "vit.logits": states.logits, "cide.context": context(batch)}
      return exp.task.loss(model(batch, training=False), batch).value, taps

    # The sinusoid is the authors' float32 one, widened, as libraries differ in its last bit.
    sinusoid = oracle.golden("sd_unet_hier.tiny.npz")["output/timestep_embedding"][1:2]
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(layers, "timestep_embedding", lambda timesteps, width: jnp.asarray(sinusoid))
      count = 5 if data == "nyu" else 1
      self.result = single.run_steps(exp, state, batch, released.eco_depth_depth, count=count)
      loss, self.taps = evaluate(single.everything(state))
      self.eval_losses = [float(loss)]
      if data == "nyu":
        self.eval_losses.append(float(evaluate(single.everything(self.result["states"][-1]))[0]))


@pytest.fixture(scope="module")
def cases():
  """Name of the data to its Case, made once."""
  return functools.cache(Case)


@pytest.fixture(params=["nyu", pytest.param("kitti", marks=pytest.mark.slow)])
def case(request, cases):
  return cases(request.param)


@pytest.fixture
def nyu(cases):
  return cases("nyu")


def test_taps_of_classifier_and_context_agree_to_1e_12(case):
  for name, value in case.taps.items():
    oracle.compare(value, case.arrays, f"tap/{name}", 1e-12)
  assert len(case.taps) == 7


def test_losses_agree_to_1e_10(case):
  assert abs(float(case.result["loss"]) - float(case.arrays["train/loss"])) < 1e-10
  assert abs(case.eval_losses[0] - float(case.arrays["output/eval_loss"])) < 1e-10


def test_gradients_agree_to_1e_9(case):
  check_gradients(case.result["grads"], case.arrays, 1e-9)
  assert case.arrays["train/no_grad_names"].size == 0


def test_losses_of_five_steps_agree_to_1e_10(nyu):
  losses = [log["train/loss"] for log in nyu.result["logs"]]
  np.testing.assert_allclose(losses, nyu.arrays["trace/loss"], rtol=0, atol=1e-10)
  assert abs(nyu.eval_losses[1] - float(nyu.arrays["trace/eval_loss_after"])) < 1e-10


def test_rates_are_the_authors(nyu):
  groups = [str(name) for name in nyu.arrays["trace/group_names"]]
  ours = {"layer_1": "lr/rest", "layer_0": "lr/unet", "layer_-1": "lr/embeddings"}
  for log, rates in zip(nyu.result["logs"], nyu.arrays["trace/lr"], strict=True):
    actual = [log[ours[name.removesuffix("_decay").removesuffix("_no")]] for name in groups]
    np.testing.assert_allclose(actual, rates, rtol=1e-5)


def test_five_steps_move_every_parameter_as_the_authors(nyu):
  states = (nyu.result["states"][0], nyu.result["states"][-1])
  first, last = (rules.to_source({**s.params, **s.frozen}, released.eco_depth_depth()) for s in states)
  check_steps(first, last, nyu.arrays, "eco_depth")
