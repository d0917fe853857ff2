"""The gate: MetaPrompts depth in float64 against the authors' code in float64, where rounding plays no part.

Nothing of the network is compiled as a whole: for three passes of the UNet that takes longer than five steps without.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import meta_prompts as single
from tests.helpers import oracle
from tests.helpers.gradients import check_gradients, check_steps
from vpd_jax import experiment
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.tasks.depth.task import silog
from vpd_jax.training import step as training_step

pytestmark = pytest.mark.x64
TABLE = released.meta_prompts_depth()


class Run:
  """One setup: its first gradients, and five steps where the authors stored them."""

  def __init__(self, data):
    self.data = data
    self.experiment = experiment.assemble(single.config(data, dtype="float64", param_dtype="float64"))
    self.batch = single.batch_of(data, jnp.float64)
    self.states = [single.state_of(self.experiment, np.float64)]
    self.gradients = training_step.make_gradients(self.experiment, loss_group=0, accumulation=1)
    self.first = self.gradients(*single.everything(self.states[0]), self.batch)
    self.single = oracle.golden(f"meta_depth_{data}.tiny.npz")
    self.double = oracle.golden(f"meta_depth_{data}.tiny_f64.npz")

  def steps(self):
    """Logs of five steps, whose states are kept."""
    update, logs, result = jax.jit(training_step.make_update(self.experiment)), [], self.first
    for _ in range(5):
      state, log = update(self.states[-1], *result)
      self.states.append(state)
      logs.append(jax.device_get(log))
      if len(logs) < 5:
        result = self.gradients(*single.everything(state), self.batch)
    return logs


@pytest.fixture(scope="module")
def nyu():
  return Run("nyu")


@pytest.fixture(scope="module")
def kitti():
  return Run("kitti")


@pytest.fixture(scope="module")
def logs(nyu):
  return nyu.steps()


@pytest.fixture(params=["nyu", pytest.param("kitti", marks=pytest.mark.slow)])
def run(request):
  return request.getfixturevalue(request.param)


def test_the_loss_in_training_agrees_to_1e_10(run):
  assert abs(float(run.first[1]) - float(run.double["train/loss"])) < 1e-10
  assert abs(float(run.first[1]) - float(run.single["train/loss"])) < 2e-5


def test_every_gradient_agrees_to_1e_9(run):
  grads = rules.to_source(run.first[0], TABLE)
  check_gradients(grads, run.double, 1e-9)
  # Whole arrays are stored in float32 only.
  stored = {key.removeprefix("train/grad/"): x for key, x in run.single.items() if key.startswith("train/grad/")}
  assert len(stored) == (5 if run.data == "nyu" else 0)
  for name, expected in stored.items():
    np.testing.assert_allclose(grads[name], expected, atol=2e-2 * np.abs(expected).max())


def test_batch_statistics_of_neck_and_head_move_as_the_authors(run):
  after = rules.to_source(run.first[3], TABLE)
  assert len(after) == 26
  for name, value in after.items():
    np.testing.assert_allclose(value, run.single[f"train/bn_after/{name}"], atol=4e-5)  # stored in float32


@pytest.mark.slow  # the optimizer is that of VPD, whose five steps every run of the tests compares
def test_losses_and_rates_of_five_steps_agree(nyu, logs):
  np.testing.assert_allclose([log["train/loss"] for log in logs], nyu.double["trace/loss"], rtol=0, atol=1e-10)
  groups = {str(n): i for i, n in enumerate(nyu.double["trace/group_names"])}
  rates = [[log["lr/rest" if n.startswith("layer_1") else "lr/unet"] for n in groups] for log in logs]
  np.testing.assert_allclose(rates, nyu.double["trace/lr"], rtol=1e-9)


@pytest.mark.slow  # the optimizer is that of VPD, whose five steps every run of the tests compares
def test_depth_before_and_after_five_steps_agrees(nyu, logs):
  evaluate = lambda named, batch: nyu.experiment.spec.merge(*named)(batch, training=False)["depth"]
  losses = [
    float(silog(evaluate(single.everything(state), nyu.batch), nyu.batch["depth"])[0])
    for state in (nyu.states[0], nyu.states[-1])
  ]
  expected = [nyu.double["output/eval_loss"], nyu.double["trace/eval_loss_after"]]
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-10)


@pytest.mark.slow  # the optimizer is that of VPD, whose five steps every run of the tests compares
def test_five_steps_move_every_parameter_as_the_authors(nyu, logs):
  first, last = (rules.to_source({**s.params, **s.frozen}, TABLE) for s in (nyu.states[0], nyu.states[-1]))
  check_steps(first, last, nyu.double, "meta_depth")
