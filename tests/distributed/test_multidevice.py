"""Eight virtual devices against one."""

import jax
import numpy as np
import pytest

from tests.helpers.batches import batch_for
from tests.helpers.devices import depth_of_rooms, loss, make_mesh, step
from vpd_jax import experiment
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import evaluate
from vpd_jax.training import compilation

pytestmark = pytest.mark.multidevice


def test_scores_count_each_image_once_whatever_the_devices():
  config, exp, state = depth_of_rooms()
  found = []
  for mesh in (make_mesh("one"), make_mesh("data")):
    evaluator = evaluate.Evaluator(config, exp, experiment.dataset(config, exp), mesh)
    spread = sharding.replicated(mesh)
    weights = tuple(jax.device_put(part, spread) for part in (state.params, state.frozen, state.stats))
    found.append(evaluator.run(weights).scores)
  assert found[0]["eval/rooms/images"] == 5  # of eight rows
  assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("name", [pytest.param("data", marks=pytest.mark.slow), "fsdp"])
def test_a_step_on_eight_devices_is_the_step_on_one(name):
  np.testing.assert_allclose(step(name)["train/loss"], step("one")["train/loss"], rtol=1e-5)
  np.testing.assert_allclose(step(name)["norm/gradients"], step("one")["norm/gradients"], rtol=1e-3)


def test_a_loss_over_the_whole_batch_is_that_of_one_device():
  assert [loss(0, "data"), loss(0, "fsdp")] == pytest.approx([loss(0, "one")] * 2, rel=1e-5)
  assert abs(loss(0, "one") / step("one")["train/loss"] - 1) > 0.1  # these images tell groups of three from all


@pytest.mark.slow
def test_the_parts_of_an_accumulated_batch_are_spread_over_all_devices():
  """XLA counts a loop's body once: per device, a half of the batch costs half of the whole."""
  config, _, _ = depth_of_rooms()
  flops = {}
  for accumulation in (1, 2):
    changed = config.copy_and_resolve_references().unlock()
    changed.data.batch_size, changed.optim.accumulation = 48, accumulation
    exp = experiment.assemble(changed.lock())
    mesh = make_mesh("data")
    batch = batch_for(exp, changed)
    flops[accumulation] = compilation.compile_step(changed, exp, mesh, batch).cost_analysis()["flops"]
  assert flops[2] < 0.7 * flops[1]
