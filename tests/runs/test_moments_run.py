"""A run with small moments: saved and resumed bit for bit, converted where the setting changes, alike on all meshes."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers import one_convolution, tiny
from tests.helpers.batches import batch_for
from vpd_jax import experiment, moments
from vpd_jax.checkpoints import initialize
from vpd_jax.checkpoints.checkpointer import Checkpoints
from vpd_jax.config import loader
from vpd_jax.distributed import sharding
from vpd_jax.planning import plan
from vpd_jax.training import compilation, train

BLOCKED = "head/deconv_layers/3/kernel"  # [2, 2, 32, 32], of which blocks are made


def rooms(kind, **changes):
  return one_convolution.rooms(**{"optim.moments": kind, "head.filters": (32, 32, 32), **changes})


@pytest.fixture(scope="module", autouse=True)
def _the_method_is_known():
  with one_convolution.known():
    yield


def restored(config, workdir, *, accept_changes=False, mesh=None):
  """(state of the newest checkpoint, lines), on one device where no mesh is given."""
  exp = experiment.assemble(config)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return initialize.resume_or_start(
      config, exp, mesh or sharding.make_mesh(1, 1), checkpoints, accept_changes=accept_changes
    )


def by_name(tree):
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_equal(one, other):
  one, other = by_name(one), by_name(other)
  assert one.keys() == other.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(x, other[name], err_msg=name)


@pytest.fixture(scope="module", params=moments.FORMATS[1:])  # float32: test_run.py
def runs(request, tmp_path_factory):
  """(kind, workdir of four steps, workdir of two and, resumed, two more)."""
  whole, parts = (tmp_path_factory.mktemp(f"{request.param}-{name}") for name in ("whole", "parts"))
  train.run(rooms(request.param), str(whole))
  for steps in (2, 4):
    train.run(rooms(request.param, num_steps=steps, eval_every=steps), str(parts), accept_changes=True)
  return request.param, whole, parts


def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(runs):
  kind, whole, parts = runs
  state, lines = restored(rooms(kind), whole)
  assert int(state.step) == 4 and lines == ["resumed: checkpoint of step 4"]
  assert_equal(state, restored(rooms(kind), parts)[0])
  mu = state.opt_state[1].mu
  assert isinstance(mu[BLOCKED], moments.Blocks) == (kind == "int8")
  assert mu["method/only/kernel"].dtype == ("bfloat16" if kind == "bfloat16" else "float32")


def test_moments_are_converted_where_the_setting_changes_and_a_line_says_so(runs):
  kind, whole, _ = runs
  before = restored(rooms(kind), whole)[0]
  for other in moments.FORMATS:
    if other == kind:
      continue
    with pytest.raises(ValueError, match=rf"optim\.moments: '{kind}' -> '{other}'\. .*--accept_config_changes"):
      restored(rooms(other), whole)
    state, lines = restored(rooms(other), whole, accept_changes=True)
    assert lines[-1] == f"moments converted from {kind} to {other}"
    assert_equal(state.params, before.params)
    for old, new in zip(before.opt_state[1][1:], state.opt_state[1][1:], strict=True):
      assert new.keys() == old.keys()
      for name in old:
        values = [np.asarray(moments.dequantize(x[name], np.float32)) for x in (old, new)]
        gap = np.abs(values[0]).max() / 32
        np.testing.assert_allclose(*values, rtol=2**-8, atol=gap, err_msg=name)


def test_a_workdir_from_before_the_option_has_float32():
  config = rooms("int8")
  held = config.to_dict()
  del held["optim"]["moments"]
  assert loader.differences(held, config) == ["optim.moments: 'float32' -> 'int8'"]


def test_the_plan_counts_the_bytes_of_each_kind():
  size = {}
  for kind in moments.FORMATS:
    config = rooms(kind)
    exp = experiment.assemble(config)
    size[kind] = plan.state_bytes(config, exp, sharding.make_mesh(1, 1))["opt_state"] - 8  # two counters
  numbers = {n: exp.spec.shapes[n].size for n in exp.groups.lr}
  assert size["float32"] == 8 * sum(numbers.values()) and size["bfloat16"] == 4 * sum(numbers.values())
  blocked = {n: moments.layout(exp.spec.shapes[n].shape)[0] for n in numbers}
  scale = lambda n: 4 * blocked[n] * max(exp.spec.shapes[n].shape)
  assert size["int8"] == 2 * sum(numbers[n] + scale(n) if blocked[n] else 4 * numbers[n] for n in numbers)
  assert blocked[BLOCKED] and size["int8"] < 0.7 * size["float32"]


@pytest.mark.multidevice
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_step_of_eight_devices_is_that_of_one_and_moments_are_split_as_parameters(kind):
  config = rooms(kind, **{"data.batch_size": 8, "optim.loss_group": 0, "optim.norm_group": 0})
  exp = experiment.assemble(config)
  batch, start = batch_for(exp, config), tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  ends = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "state_shardings", functools.partial(sharding.state_shardings, min_bytes=2**10))
    for mesh in (sharding.make_mesh(1, 1, devices=jax.devices()[:1]), sharding.make_mesh(2, 4)):
      where = initialize.state_shardings(config, exp, mesh)
      state = sharding.place(jax.device_get(start), where)
      rows = jax.device_put(batch, sharding.batch_sharding(mesh))
      state, _ = compilation.compile_step(config, exp, mesh, rows)(state, rows)
      ends.append(jax.device_get(state))
  assert where.params[BLOCKED].spec == P(None, None, None, "fsdp")
  nu = where.opt_state[1].nu[BLOCKED]
  if kind == "int8":
    assert nu.codes.spec == where.params[BLOCKED].spec and nu.scales.spec == P(None, "fsdp")
  else:
    assert nu.spec == where.params[BLOCKED].spec
  for name, one in ends[0].params.items():
    np.testing.assert_allclose(one, ends[1].params[name], rtol=1e-4, atol=1e-6, err_msg=name)
  for one, other in zip(*(jax.tree.leaves(end.opt_state) for end in ends), strict=True):
    if one.dtype in (np.int8, np.uint8):
      assert (np.abs(one.astype(int) - other) > 1).mean() == 0 and (one != other).mean() < 0.01
    else:
      np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=2**-7, atol=1e-6)


@pytest.mark.multidevice
def test_a_rule_that_cuts_blocks_is_refused_in_one_line():
  config = rooms("int8", **{"mesh.rules": ((f"/{BLOCKED}$", (None, None, "fsdp")),), "mesh.fsdp": 4})
  exp = experiment.assemble(config)
  with pytest.raises(ValueError, match=r"^config\.optim\.moments='int8' keeps blocks .*; add \(r'/head/.*rules, or ch"):
    initialize.state_shardings(config, exp, sharding.make_mesh(2, 4))
