"""The batches of a run, as its config asks for them."""

import contextlib
import types

import numpy as np
import pytest

from tests.helpers.squares import KEYS, Squares
from vpd_jax.config import loader
from vpd_jax.distributed import sharding
from vpd_jax.training import session


def orders(config):
  """The records of three epochs."""
  exp = types.SimpleNamespace(keys=KEYS, method=types.SimpleNamespace(prepare=None))
  config.data.update({"batch_size": 10, "workers": 0})
  batches = session.training_batches(config, exp, Squares(10), sharding.make_mesh(1, 1), 0)
  with contextlib.closing(batches):
    return np.array([next(batches)["index"] for _ in range(3)])


@pytest.mark.parametrize("data", ["nyu", "kitti"])
def test_epochs_have_one_order_as_in_the_release(data):
  kept = orders(loader.load(f"configs/{data}_depth.py:tiny"))
  np.testing.assert_array_equal(kept, np.tile(kept[0], (3, 1)))


@pytest.mark.parametrize("given", [{"reshuffle_each_epoch": True}, {}])
def test_epochs_are_reshuffled_on_demand_and_where_a_config_does_not_say(given):
  config = loader.load("configs/nyu_depth.py:tiny").unlock()
  del config.data.reshuffle_each_epoch
  config.data.update(given)
  assert len({tuple(order) for order in orders(config)}) == 3
