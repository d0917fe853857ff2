"""Eight virtual devices against one."""

import jax
import numpy as np
import pytest

from tests import tiny
from tests.test_configs import batch_for
from vpd_jax import assemble, config_file, evaluate, sharding, start, train

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def setup():
  config = tiny.shrunk(config_file.load("configs/rooms.py:depth,tiny")).unlock()
  config.data.batch_size, config.eval.batch_size = 24, 8
  config.optim.norm_group = config.optim.loss_group = 3
  product = assemble.assemble(config.lock())
  return config, product, tiny.train_state(product, tiny.filled(product.parts.shapes))


def meshes():
  return {
    "one": sharding.make_mesh(1, 1, devices=jax.devices()[:1]),
    "data": sharding.make_mesh(8, 1),
    "fsdp": sharding.make_mesh(2, 4),
  }


def test_scores_count_each_image_once_whatever_the_devices(setup):
  config, product, state = setup
  found = []
  for mesh in (meshes()["one"], meshes()["data"]):
    evaluator = evaluate.Evaluator(config, product, assemble.dataset(config, product), mesh)
    spread = sharding.replicated(mesh)
    weights = tuple(jax.device_put(part, spread) for part in (state.params, state.frozen, state.stats))
    found.append(evaluator.run(weights).scores)
  assert found[0]["eval/rooms/images"] == 5  # of eight rows
  assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_step_on_eight_devices_is_the_step_on_one(setup):
  config, product, state = setup
  host = jax.device_get(batch_for(product, config))
  results = {}
  for name, mesh in meshes().items():
    where = start.state_shardings(config, product, mesh)
    placed = jax.tree.map(jax.device_put, jax.device_get(state), where)
    batch = jax.device_put(host, sharding.batch_sharding(mesh))
    _, logs = train.compile_step(config, product, mesh, batch)(placed, batch)
    results[name] = jax.device_get(logs)
  for name in ("data", "fsdp"):
    np.testing.assert_allclose(results[name]["train/loss"], results["one"]["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(results[name]["norm/gradients"], results["one"]["norm/gradients"], rtol=1e-3)


def test_the_parts_of_an_accumulated_batch_are_spread_over_all_devices(setup):
  """XLA counts a loop's body once: per device, a half of the batch costs half of the whole."""
  config, _, _ = setup
  flops = {}
  for accumulation in (1, 2):
    changed = config.copy_and_resolve_references().unlock()
    changed.data.batch_size, changed.optim.accumulation = 48, accumulation
    product = assemble.assemble(changed.lock())
    mesh = meshes()["data"]
    batch = batch_for(product, changed)
    flops[accumulation] = train.compile_step(changed, product, mesh, batch).cost_analysis()["flops"]
  assert flops[2] < 0.7 * flops[1]
