"""The batches of a run, as its config asks for them."""

import contextlib
import json
import types

import numpy as np
import pytest

from tests.helpers import tiny, turned_pictures
from tests.helpers.squares import KEYS, Squares
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
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


def test_a_run_stores_the_names_of_its_keypoints(tmp_path):
  """Its folder then suffices for prediction: nothing is read from the data."""
  turned_pictures.write(tmp_path / "data", 1)
  fields = {"data.root": str(tmp_path / "data"), "data.keypoints": (), "data.skeleton": ()}
  config = session.with_keypoint_names(loader.changed(loader.load("configs/my_pose.py:tiny"), fields))
  assert config.data.keypoints == ("a", "b")
  named = loader.changed(config, {"data.root": "nowhere"})
  assert session.with_keypoint_names(named) == named and len(experiment.assemble(tiny.shrunk(named)).classes) == 2


def test_a_run_of_before_that_stored_no_names_continues(monkeypatch):
  config = loader.changed(loader.load("configs/my_pose.py:tiny"), {"data.keypoints": ("a", "b"), "data.skeleton": ()})
  stored = json.loads(initialize.to_json(config))
  stored["data"]["keypoints"] = []
  checkpoints = types.SimpleNamespace(latest_step=lambda: 1, restore_config=lambda step: stored)
  monkeypatch.setattr(initialize, "_restored", lambda *_: ({}, []))
  assert initialize.resume_or_start(config, None, None, checkpoints)[1] == ["resumed: checkpoint of step 1"]
  stored["data"]["keypoints"] = ["a", "c"]
  with pytest.raises(ValueError, match=r"data\.keypoints"):
    initialize.resume_or_start(config, None, None, checkpoints)
