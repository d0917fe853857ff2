"""The gate: TADP in float64 against the authors' code in float64, where rounding plays no part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle, tadp, vpd_depth
from tests.helpers.gradients import check_gradients, check_steps
from vpd_jax.convert import rules
from vpd_jax.models.backbones import layers
from vpd_jax.training import step as training_step

pytestmark = pytest.mark.x64
BATCHES = {
  "tadp_depth_nyu": lambda: tadp.depth_batch((2, 96, 96), jnp.float64),
  "tadp_seg_ade": lambda: tadp.segmentation_batch(jnp.float64),
}


class Run:
  """One setup with its batch, whose latents are those of the stored noise in all steps."""

  def __init__(self, setup):
    self.setup, self.experiment = setup, tadp.assembled(setup, "float64")
    self.state, self.arrays = tadp.state(setup, np.float64), oracle.golden(f"{setup}.tiny_f64.npz")
    # The sinusoid is the authors' float32 one, widened, as libraries differ in its last bit.
    sinusoid = oracle.golden("sd_unet_hier.tiny.npz")["output/timestep_embedding"][1:2]
    self._patch = lambda patch: patch.setattr(layers, "timestep_embedding", lambda *args: jnp.asarray(sinusoid))
    noise, merge = tadp.noise(2, 16, jnp.float64), self.experiment.spec.merge
    with_latents = jax.jit(lambda named, batch: tadp.with_latents(merge(*named), batch, noise))
    self.batch = with_latents(vpd_depth.everything(self.state), BATCHES[setup]())
    with pytest.MonkeyPatch.context() as patch:
      self._patch(patch)
      self.result = self.first() if setup == "tadp_seg_ade" else self.steps()

  def first(self):
    gradients = jax.jit(training_step.make_gradients(self.experiment, loss_group=0, accumulation=1))
    grads, loss, _, _ = gradients(*vpd_depth.everything(self.state), self.batch)
    return {"grads": rules.to_source(grads, tadp.table(self.setup)), "loss": loss, "states": [self.state]}

  def steps(self):
    return vpd_depth.run_steps(self.experiment, self.state, self.batch, lambda: tadp.table(self.setup))

  def eval_losses(self):
    run = lambda named, batch: self.experiment.task.loss(
      self.experiment.spec.merge(*named)(batch, training=False), batch
    )
    with pytest.MonkeyPatch.context() as patch:
      self._patch(patch)
      evaluate, states = jax.jit(run), self.result["states"]
      return [float(evaluate(vpd_depth.everything(state), self.batch).value) for state in (states[0], states[-1])]


@pytest.fixture(scope="module")
def depth():
  return Run("tadp_depth_nyu")


@pytest.fixture(scope="module")
def segmentation():
  return Run("tadp_seg_ade")


@pytest.fixture(params=["depth", "segmentation"])
def run(request):
  return request.getfixturevalue(request.param)


def test_losses_in_training_agree_to_1e_10(run):
  assert abs(float(run.result["loss"]) - float(run.arrays["train/loss"])) < 1e-10


def test_every_gradient_agrees_to_1e_9(run):
  check_gradients(run.result["grads"], run.arrays, 1e-9)
  single = oracle.golden(f"{run.setup}.tiny.npz")  # whole arrays are stored in float32 only
  stored = {key.removeprefix("train/grad/"): x for key, x in single.items() if key.startswith("train/grad/")}
  assert len(stored) >= 1
  for name, expected in stored.items():
    np.testing.assert_allclose(run.result["grads"][name], expected, atol=2e-2 * np.abs(expected).max(), err_msg=name)


def test_losses_in_evaluation_agree_to_1e_10(run):
  expected = [run.arrays[key] for key in ("output/eval_loss", "trace/eval_loss_after") if key in run.arrays]
  np.testing.assert_allclose(run.eval_losses()[: len(expected)], expected, rtol=0, atol=1e-10)


def test_the_sample_of_the_posterior_is_the_authors(depth):
  oracle.compare(oracle.nchw(depth.batch["latents"]) * 0.18215, depth.arrays, "tap/latents", 1e-12)


def test_losses_and_rates_of_five_steps_agree(depth):
  logs, arrays = depth.result["logs"], depth.arrays
  np.testing.assert_allclose([log["train/loss"] for log in logs], arrays["trace/loss"], rtol=0, atol=1e-10)
  for i, log in enumerate(logs):
    for name, expected in zip(arrays["trace/group_names"], arrays["trace/lr"][i], strict=True):
      ours = log["lr/unet"] if str(name).startswith("layer_0") else log["lr/rest"]
      np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_five_steps_move_every_parameter_as_the_authors(depth):
  states = (depth.result["states"][0], depth.result["states"][-1])
  first, last = (rules.to_source({**s.params, **s.frozen}, tadp.table(depth.setup)) for s in states)
  assert {str(name) for name in depth.arrays["train/no_grad_names"]} == {"encoder.gamma"}
  check_steps(first, last, depth.arrays, "tadp_depth")
