"""LoRA from start to end on a method of two kernels; what it trains, for all methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import one_convolution, small_unet, tiny
from tests.helpers.batches import batch_for
from vpd_jax import experiment, optim
from vpd_jax.checkpoints import initialize
from vpd_jax.checkpoints.checkpointer import Checkpoints
from vpd_jax.config import loader
from vpd_jax.config.presets import registry
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import evaluate
from vpd_jax.models import lora
from vpd_jax.planning import plan
from vpd_jax.training import compilation, train

KERNELS = ("method/unet/conv/kernel", "method/unet/mix/kernel")
TARGETS = (r"/unet/conv/kernel$", r"/unet/mix/kernel$")


def rooms(rank=4, **changes):
  return one_convolution.rooms(**{"lora.rank": rank, "lora.targets": TARGETS if rank else (), **changes})


@pytest.fixture(scope="module", autouse=True)
def _the_method_is_known():
  with small_unet.known():
    yield


@pytest.fixture(scope="module")
def products():
  """With LoRA, and without."""
  return experiment.assemble(rooms()), experiment.assemble(rooms(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, scores) of a run of four steps in parts of two images, with a moving average."""
  workdir = tmp_path_factory.mktemp("lora")
  return workdir, train.run(averaged(), str(workdir))


def averaged(**changes):
  return rooms(
    **{"optim.accumulation": 3, "optim.loss_group": 2, "optim.norm_group": 2, "optim.ema_decay": 0.5, **changes}
  )


def of(exp, named):
  """Parameters, frozen arrays and statistics."""
  return tuple(initialize.split(exp, named).values())


def test_the_base_is_frozen_and_head_and_factors_are_trained(products):
  exp, plain = products
  trained = set(exp.groups.lr)
  assert {n for n in trained if n.startswith(lora.PREFIX)} == {f"lora/{k}/{p}" for k in KERNELS for p in "ab"}
  assert {n for n in trained if not n.startswith(lora.PREFIX)} == {n for n in plain.groups.lr if "/unet/" not in n}
  assert {n for n in exp.groups.frozen if "/unet/" in n} == {n for n in plain.spec.shapes if "/unet/" in n}
  shapes = {n: exp.spec.shapes[n].shape for n in trained if n.startswith(lora.PREFIX)}
  assert shapes == {
    "lora/method/unet/conv/kernel/a": (192, 4),
    "lora/method/unet/conv/kernel/b": (4, 8),
    "lora/method/unet/mix/kernel/a": (8, 4),
    "lora/method/unet/mix/kernel/b": (4, 8),
  }
  rows = {row[0]: row for row in optim.table(exp.groups, exp.spec.shapes)}
  assert rows["lora"][1:5] == (1.0, 1.0, 4, 192 * 4 + 4 * 8 + 8 * 4 + 4 * 8)
  assert set(experiment.model_shapes(rooms())) == set(plain.spec.shapes)


def test_the_first_output_is_that_of_the_base_to_the_last_bit(products):
  exp, plain = products
  config = rooms()
  named, lines = initialize.weights(config, exp)
  base, _ = initialize.weights(rooms(0), plain)
  assert lines[-1] == "LoRA: 2 kernels of the UNet, which begins as it is"
  assert any(np.abs(x).min() > 0 for n, x in named.items() if n.endswith("/a"))
  batch = batch_for(exp, config)
  depth = [
    jax.jit(lambda w, b, p=p: p.spec.merge(*w)(b, training=False)["depth"])(of(p, n), batch)
    for p, n in ((exp, named), (plain, base))
  ]
  np.testing.assert_array_equal(*depth)


def test_merging_on_the_host_is_merging_in_the_model_and_the_formula(products):
  exp, plain = products
  named, _ = initialize.weights(rooms(), exp)
  named |= {n: x / 10 for n, x in tiny.filled(exp.spec.shapes).items() if n.startswith(lora.PREFIX)}
  host = lora.merged(named, 16.0)
  assert host.keys() == plain.spec.shapes.keys()
  inside = exp.spec.fold({name: jnp.asarray(x) for name, x in named.items()})
  for name in KERNELS:
    a, b = (named[f"lora/{name}/{part}"].astype(np.float64) for part in "ab")
    expected = named[name] + 16 / 4 * (a @ b).reshape(named[name].shape)
    np.testing.assert_allclose(host[name], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(inside[name], expected, rtol=1e-6, atol=1e-6)
  batch = batch_for(exp, rooms())
  depth = [
    jax.jit(lambda w, b, p=p: p.spec.merge(*w)(b, training=False)["depth"])(of(p, n), batch)
    for p, n in ((exp, named), (plain, host))
  ]
  np.testing.assert_allclose(*depth, rtol=1e-6, atol=1e-5)  # of 10 m


def test_a_run_moves_the_factors_and_leaves_the_base_and_evaluates_alike(run, capsys):
  workdir, scores = run
  config = averaged()
  exp = experiment.assemble(config)
  first, _ = initialize.weights(config, exp)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    saved = checkpoints.restore_weights(4)
    named = checkpoints.evaluated(4, saved)
  for name, x in saved["frozen"].items():
    np.testing.assert_array_equal(x, first[name], err_msg=name)
  factors = [n for n in saved["params"] if n.startswith(lora.PREFIX)]
  assert len(factors) == 4 and all(np.abs(saved["params"][n] - first[n]).max() > 0 for n in factors)
  assert named.keys() == exp.spec.paths.keys() and np.abs(named[KERNELS[0]] - first[KERNELS[0]]).max() > 0
  for again in (averaged(), rooms(0)):  # also where the config does not say that there was LoRA
    found = evaluate.run(again, str(workdir))
    assert found == pytest.approx(scores, rel=1e-5)
  assert "LoRA" not in capsys.readouterr().out  # it is merged


def test_a_new_run_begins_with_what_was_merged(run):
  config = rooms(2, **{"init.run": str(run[0])})
  named, lines = initialize.weights(config, experiment.assemble(config))
  with Checkpoints(run[0], read_only=True) as checkpoints:
    before = checkpoints.evaluated(4, checkpoints.restore_weights(4))
  for name, x in before.items():
    np.testing.assert_array_equal(named[name], x, err_msg=name)
  assert named["lora/method/unet/conv/kernel/a"].shape == (192, 2) and lines[-1].startswith("LoRA: 2 kernels")


def test_the_plan_counts_no_gradient_state_of_the_base(products):
  exp, _ = products
  found = plan.state_bytes(rooms(), exp, sharding.make_mesh(1, 1))
  numbers = sum(exp.spec.shapes[n].size for n in exp.groups.lr)
  assert found["params"] == 4 * numbers and found["opt_state"] == 8 * numbers + 8
  assert found["frozen"] == 4 * sum(exp.spec.shapes[n].size for n in exp.groups.frozen)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"lora.targets": (r"/unet/mix/", r"/attn9/")},
      r"^config\.lora\.targets: \['/attn9/'\] match no kernel of the UNet",
    ),
    ({"lora.targets": (r"/head/",)}, r"^config\.lora\.targets: \['/head/'\] match no kernel"),
    ({"lora.targets": ()}, r"^config\.lora\.targets: \['/attn\[12\].*match no kernel"),
    ({"lora.targets": (r"(",)}, r"^config\.lora\.targets: '\(' is not a regular expression"),
    ({"lora.rank": 0}, r"^config\.lora\.targets=\(.* has no effect with config\.lora\.rank=0; give a rank, or leave"),
    (
      {"lora.rank": 0, "lora.targets": (), "lora.alpha": 8.0, "lora.lr": 0.1},
      r"^config\.lora\.alpha=8\.0 has no effect .*; config\.lora\.lr=0\.1 has no effect with config\.lora\.rank=0",
    ),
    ({"lora.rank": -1}, r"^config\.lora\.rank=-1 must be at least 0"),
    ({"lora.alpha": 0.0}, r"^config\.lora\.alpha=0\.0 must be above 0\.$"),
    (
      {"optim.lr_groups": ((r"/unet/", None), (r"", 1.0))},
      r"^config\.lora adapts .*; give it a learning rate there, or set",
    ),
  ],
)
def test_what_would_have_no_effect_is_refused_in_one_line(changes, message):
  with pytest.raises(ValueError, match=message) as told:
    experiment.assemble(rooms(**changes))
  assert "\n" not in str(told.value)


@pytest.mark.parametrize("method", registry.METHODS)
def test_lora_goes_with_every_method(method):
  config = loader.load(f"configs/nyu_depth.py:{method},tiny")
  config = loader.changed(tiny.shrunk(config), {"lora.rank": 2, "backbone.unet.attention_levels": (2,)})
  exp = experiment.assemble(config)
  factors = [n for n in exp.groups.lr if n.startswith(lora.PREFIX)]
  assert factors and len(factors) % 16 == 0  # two matrices for four projections of two attentions
  assert not any(n.startswith(lora.UNET) for n in exp.groups.lr)
  assert any(n.startswith("head/") for n in exp.groups.lr)
  evaluated = experiment.assemble(config, training=False).spec
  assert not any(n.startswith(lora.PREFIX) for n in evaluated.shapes)


def test_frozen_arrays_in_bfloat16_are_their_rounded_values_and_take_half(tmp_path):
  config, plain = rooms(frozen_dtype="bfloat16"), rooms()
  exp, wide = experiment.assemble(config), experiment.assemble(plain)
  named, _ = initialize.weights(config, exp)
  before, _ = initialize.weights(plain, wide)
  frozen = exp.groups.frozen
  assert {n for n, x in named.items() if x.dtype == jnp.bfloat16} == frozen and frozen >= set(KERNELS)
  batch, rounded = batch_for(exp, config), {n: named[n].astype(x.dtype) for n, x in before.items()}
  run = lambda p: jax.jit(lambda w, b: p.spec.merge(*w)(b, training=True)["depth"])
  np.testing.assert_array_equal(run(exp)(of(exp, named), batch), run(wide)(of(wide, rounded), batch))
  mesh = sharding.make_mesh(1, 1)
  size = [plan.state_bytes(c, p, mesh) for c, p in ((config, exp), (plain, wide))]
  assert size[0] == size[1] | {"frozen": size[1]["frozen"] // 2}
  scores = train.run(config, str(tmp_path))
  assert evaluate.run(config, str(tmp_path)) == pytest.approx(scores, rel=1e-4)
  assert evaluate.run(rooms(0), str(tmp_path)) == pytest.approx(scores, rel=1e-4)
  assert {x.dtype.name for x in experiment.model_shapes(config).values()} == {"float32"}


def test_an_unknown_dtype_of_frozen_arrays_is_refused():
  with pytest.raises(ValueError, match=r"^config\.frozen_dtype='float16' is unknown; choose one of \('float32', 'bf"):
    experiment.assemble(rooms(frozen_dtype="float16"))


@pytest.mark.multidevice
def test_a_step_of_eight_devices_is_that_of_one():
  config = rooms(**{"data.batch_size": 8, "optim.loss_group": 0, "optim.norm_group": 0})
  exp = experiment.assemble(config)
  batch, start = batch_for(exp, config), tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  ends = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "state_shardings", functools.partial(sharding.state_shardings, min_bytes=2**7))
    for mesh in (sharding.make_mesh(1, 1, devices=jax.devices()[:1]), sharding.make_mesh(2, 4)):
      where = initialize.state_shardings(config, exp, mesh)
      rows = jax.device_put(batch, sharding.batch_sharding(mesh))
      state = sharding.place(jax.device_get(start), where)
      state, logs = compilation.compile_step(config, exp, mesh, rows)(state, rows)
      ends.append((jax.device_get(state.params), jax.device_get(logs)))
  assert "fsdp" in where.frozen[KERNELS[0]].spec and "fsdp" in where.params[f"lora/{KERNELS[0]}/a"].spec
  (one, logs), (eight, others) = ends
  np.testing.assert_allclose(logs["norm/gradients"], others["norm/gradients"], rtol=1e-4)
  for name, x in one.items():
    np.testing.assert_allclose(x, eight[name], rtol=1e-4, atol=1e-5, err_msg=name)
