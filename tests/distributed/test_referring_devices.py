"""Referring segmentation on eight virtual devices against one: the same pixels for every sentence."""

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.referring_rooms import small
from vpd_jax import experiment
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import evaluate

pytestmark = pytest.mark.multidevice


def test_intersections_and_unions_of_eight_devices_are_those_of_one_to_the_last_bit():
  found = []
  for devices in (1, 8):
    config = small().copy_and_resolve_references().unlock()
    # One image a device on both: with another batch a matrix product rounds otherwise, and a pixel may change sides.
    config.eval.batch_size, config.data.eval_count = devices, 3
    exp = experiment.assemble(config.lock())
    state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
    mesh = sharding.make_mesh(devices, 1, devices=jax.devices()[:devices])
    weights = jax.device_put((state.params, state.frozen, state.stats), sharding.replicated(mesh))
    evaluator = evaluate.Evaluator(config, exp, experiment.dataset(config, exp), mesh)
    found.append(evaluator.run(weights).rows)
  assert len(found[0]["union"]) % 8, "the last batch is filled up"
  for name in ("intersection", "union"):
    np.testing.assert_array_equal(found[0][name], found[1][name])
  assert (found[0]["intersection"] > 0).any() and (found[0]["intersection"] < found[0]["union"]).all()
