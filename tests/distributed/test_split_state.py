"""A state that is really split: the arrays of the test networks are all below the size from which that is done."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import devices as multidevice
from vpd_jax.distributed import sharding
from vpd_jax.monitoring import xla_cost
from vpd_jax.training import compilation

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def split():
  """The compiled step with arrays of 4 KiB and more split over four devices, its logs, and those of unsplit arrays."""
  config, exp, _ = multidevice.depth_of_rooms(3)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "state_shardings", functools.partial(sharding.state_shardings, min_bytes=2**12))
    mesh, state, batch = multidevice.placed(3, "fsdp")
    compiled = compilation.compile_step(config, exp, mesh, batch)
    parts = [x.sharding for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    return compiled, jax.device_get(compiled(state, batch)[1]), len(parts)


def test_the_step_is_that_of_an_unsplit_state(split):
  _, logs, parts = split
  assert parts > 50
  np.testing.assert_allclose(logs["train/loss"], multidevice.step("data")["train/loss"], rtol=1e-5)
  np.testing.assert_allclose(logs["norm/gradients"], multidevice.step("data")["norm/gradients"], rtol=1e-3)


def test_weights_are_gathered_and_activations_stay_where_they_are(split):
  compiled, _, _ = split
  found = xla_cost.collectives(compiled.as_text())
  assert found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}, found
