"""A workdir written by the code of an earlier commit goes on.

tests/golden/workdir_880ccdc.tar.gz: the checkpoint of step 1 that commit 880ccdc wrote for the network and config of
tests/helpers/one_convolution.py, both in the words of that commit.
"""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import one_convolution
from tests.helpers.paths import GOLDEN
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.checkpoints.checkpointer import Checkpoints
from vpd_jax.distributed import sharding
from vpd_jax.training import train


@pytest.fixture
def workdir(tmp_path):
  shutil.unpack_archive(GOLDEN / "workdir_880ccdc.tar.gz", tmp_path)
  with one_convolution.known():
    yield tmp_path


def by_name(tree):
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def test_every_array_of_an_old_workdir_is_restored(workdir):
  config = one_convolution.rooms()
  exp, mesh = experiment.assemble(config), sharding.make_mesh(1, 1)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    state, lines = initialize.resume_or_start(config, exp, mesh, checkpoints)
  assert lines[0] == "resumed: checkpoint of step 1" and int(state.step) == 1
  folder, handler = workdir / "checkpoints" / "1" / "state", ocp.PyTreeCheckpointHandler()
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
  with ocp.Checkpointer(handler) as reader:
    stored = by_name(reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))
  restored = by_name(state)
  assert restored.keys() == stored.keys() and len(stored) > 50
  for name, value in stored.items():
    np.testing.assert_array_equal(restored[name], value, err_msg=name, strict=True)


def test_an_old_workdir_goes_on(workdir):
  scores = train.run(one_convolution.rooms(num_steps=2), str(workdir))
  assert scores and all(np.isfinite(value) for value in scores.values())
  with Checkpoints(workdir, read_only=True) as checkpoints:
    assert checkpoints.steps() == [1, 2]


def test_an_old_workdir_of_another_config_is_refused_in_one_line(workdir):
  config = one_convolution.rooms(**{"optim.lr": 0.5})
  with pytest.raises(ValueError, match=r"made with another config: .*lr.*--accept_config_changes") as caught:
    train.run(config, str(workdir))
  assert "\n" not in str(caught.value)
