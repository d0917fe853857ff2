"""The gate: segmentation in float64 against the authors' code in float64, where rounding plays no part.

One value-and-gradient per setup, compiled once. Three passes of the UNet take a minute or two: those of MetaPrompts are
for `-m "x64 and slow"`; in every run test_meta_prompts_float64.py has theirs, test_segmentation_oracle.py the head's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.helpers import segmentation_setups as setups
from tests.helpers.gradients import check_gradients, check_steps
from vpd_jax import experiment
from vpd_jax.models.backbones import layers
from vpd_jax.training import step as training_step

pytestmark = pytest.mark.x64


class Run:
  """One setup: its first gradients, and five steps where the authors stored them."""

  def __init__(self, setup):
    self.setup = setup
    self.experiment = experiment.assemble(setups.config(setup, dtype="float64", param_dtype="float64"))
    self.batch = setups.batch_of(setup, jnp.float64)
    self.states = [setups.state_of(setup, self.experiment, np.float64)]
    self.gradients = jax.jit(training_step.make_gradients(self.experiment, loss_group=0, accumulation=1))
    self.single, self.double = (oracle.golden(f"{setup}.{size}.npz") for size in ("tiny", "tiny_f64"))
    self.logs = []
    # The sinusoid is the authors' float32 one, widened, as libraries differ in its last bit.
    sinusoid = oracle.golden("sd_unet_hier.tiny.npz")["output/timestep_embedding"][1:2]
    self._patch = lambda patch: patch.setattr(layers, "timestep_embedding", lambda *args: jnp.asarray(sinusoid))
    self.first = self.of(self.states[0])

  def of(self, state):
    """(gradients, loss, logs, statistics) of the batch."""
    with pytest.MonkeyPatch.context() as patch:
      self._patch(patch)
      return self.gradients(*setups.everything(state), self.batch)

  def steps(self):
    """Takes five steps; their states and logs are kept."""
    update, result = jax.jit(training_step.make_update(self.experiment)), self.first
    for i in range(5):
      state, log = update(self.states[-1], *result)
      self.states.append(state)
      self.logs.append(jax.device_get(log))
      result = self.of(state) if i < 4 else None
    return self

  def eval_loss(self, state):
    with pytest.MonkeyPatch.context() as patch:
      self._patch(patch)
      return float(self._eval_loss(setups.everything(state)))

  @property
  def _eval_loss(self):
    if "evaluate" not in self.__dict__:
      run = lambda named: self.experiment.spec.merge(*named)(self.batch, training=False)
      self.evaluate = jax.jit(lambda named: self.experiment.task.loss(run(named), self.batch).value)
    return self.evaluate


@pytest.fixture(scope="module")
def vpd_seg():
  return Run("vpd_seg").steps()


@pytest.fixture(scope="module")
def meta_seg_ade():
  return Run("meta_seg_ade").steps()


@pytest.fixture(scope="module")
def meta_seg_cityscapes():
  return Run("meta_seg_cityscapes")


SETUPS = ("vpd_seg", *(pytest.param(f"meta_seg_{data}", marks=pytest.mark.slow) for data in ("ade", "cityscapes")))


@pytest.fixture(params=SETUPS)
def run(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(params=SETUPS[:2])
def traced(request):
  return request.getfixturevalue(request.param)


def test_losses_in_training_agree_to_1e_10(run):
  assert abs(float(run.first[1]) - float(run.double["train/loss"])) < 1e-10
  setups.check_logs(run.first[2] | {"loss": run.first[1]}, run.single, run.batch)


def test_every_gradient_agrees_to_1e_9(run):
  grads = setups.named_as_by_the_authors(run.setup, run.first[0])
  check_gradients(grads, run.double, 1e-9)
  # Whole arrays are stored in float32 only.
  stored = {key.removeprefix("train/grad/"): x for key, x in run.single.items() if key.startswith("train/grad/")}
  assert len(stored) == {"vpd_seg": 3, "meta_seg_ade": 4, "meta_seg_cityscapes": 6}[run.setup]
  for name, expected in stored.items():
    np.testing.assert_allclose(grads[name], expected, atol=2e-2 * np.abs(expected).max(), err_msg=name)


def test_what_gets_no_gradient_is_frozen(run):
  without = {str(name) for name in run.double["train/no_grad_names"]}
  frozen = setups.named_as_by_the_authors(run.setup, run.states[0].frozen)
  rest = {name for name in frozen if not name.startswith("encoder_vq.")} - {"class_embeddings"}
  assert rest == without and len(without) == 4


def test_batch_statistics_of_the_head_move_as_the_authors(run):
  after = setups.named_as_by_the_authors(run.setup, run.first[3])
  assert len(after) == sum(key.startswith("train/bn_after/") for key in run.single) > 0
  limit = 1e-5 if run.setup == "vpd_seg" else 4e-5  # the authors' distance between float32, stored, and float64
  for name, value in after.items():
    np.testing.assert_allclose(value, run.single[f"train/bn_after/{name}"], rtol=0, atol=limit, err_msg=name)


def test_losses_of_five_steps_agree_to_1e_10(traced):
  np.testing.assert_allclose(
    [log["train/loss"] for log in traced.logs], traced.double["trace/loss"], rtol=0, atol=1e-10
  )
  names = [str(name) for name in traced.double["trace/log_names"]]
  assert {f"train/{name}" for name in names} == {name for name in traced.logs[0] if name.startswith("train/")}
  for i, name in enumerate(names):
    # Percentages are float32 in the authors' code.
    limits = {"rtol": 1e-7, "atol": 0} if "acc" in name else {"rtol": 0, "atol": 1e-10}
    logged = [log[f"train/{name}"] for log in traced.logs]
    np.testing.assert_allclose(logged, traced.double["trace/log_values"][:, i], err_msg=name, **limits)


def test_rate_and_decay_of_every_parameter_agree(traced):
  groups, rates = traced.experiment.groups, traced.experiment.rate(jnp.arange(5))
  double, shapes = traced.double, traced.experiment.spec.shapes
  ours = {}
  for name in groups.lr:
    (source,) = setups.named_as_by_the_authors(traced.setup, {name: np.broadcast_to(0.0, shapes[name].shape)})
    ours[source] = groups.lr[name] * np.asarray(rates), groups.decay[name] * 1e-3
  for i, name in enumerate(map(str, double["trace/group_names"])):
    if name in ours:
      np.testing.assert_allclose(ours[name][0], double["trace/lr"][:, i], rtol=1e-12, err_msg=name)
      np.testing.assert_allclose(ours[name][1], double["trace/group_weight_decay"][i], rtol=1e-12, err_msg=name)
  assert ours.keys() == {str(name) for name in double["train/grad_names"]}
  logged = {log["lr/unet"] / log["lr/rest"] for log in traced.logs if log["lr/rest"]}
  np.testing.assert_allclose(sorted(logged), 0.1, rtol=1e-12)


def test_scores_before_and_after_five_steps_agree(traced):
  losses = [traced.eval_loss(traced.states[0]), traced.eval_loss(traced.states[-1])]
  expected = [traced.double["output/eval_loss"], traced.double["trace/eval_loss_after"]]
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-10)


def test_five_steps_move_every_parameter_as_the_authors(traced):
  """What gets no gradient does not move at all, not even by decay."""
  states = (traced.states[0], traced.states[-1])
  first, last = (setups.named_as_by_the_authors(traced.setup, s.params | s.frozen) for s in states)
  first.pop("class_embeddings", None)  # an input there
  check_steps(first, last, traced.double, f"{traced.setup[:4].rstrip('_')}_seg")
