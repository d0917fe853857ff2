"""Schedules and parameter groups against the authors' numbers; the chain against torch and against its formula."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle
from vpd_jax import experiment, optim
from vpd_jax.config import loader
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released

SHAPES = {"unet/kernel": (3, 4), "unet/bias": (4,), "head/kernel": (4, 2), "head/scale": (5,)}
LR_GROUPS = ((r"/unet/", 0.01), (r"", 1.0))
DECAY_GROUPS = ((r"/(bias|scale)$", 0.0), (r"", 1.0))
ADAM = {"decay": 0.1, "b1": 0.9, "b2": 0.999, "epsilon": 1e-8}


def nyu_schedule(half):
  return optim.schedule("triangular_poly", lr=5e-4, min_lr=3e-5, half=half, power=0.9)


def rates_of_the_authors(data):
  arrays = oracle.golden("schedules.depth.npz")
  return (arrays[f"depth_{data}/{name}"] for name in ("iters_per_epoch", "step", "lr"))


@pytest.mark.parametrize("data", ["nyu", "kitti"])
def test_the_learning_rate_of_every_step_is_the_authors(data):
  iterations, steps, expected = rates_of_the_authors(data)
  rate = jax.jit(nyu_schedule(12 * int(iterations)))
  actual = rate(jnp.asarray(steps - 1, jnp.int32))  # theirs counts from 1
  # Near its end the rate is a difference of numbers ten times as large, each rounded to float32.
  np.testing.assert_allclose(actual, expected, rtol=3e-6)


@pytest.mark.x64
@pytest.mark.parametrize("data", ["nyu", "kitti"])
def test_the_learning_rate_in_float64_is_the_authors_to_the_last_digits(data):
  iterations, steps, expected = rates_of_the_authors(data)
  actual = nyu_schedule(12 * int(iterations))(jnp.asarray(steps - 1, jnp.int32))
  assert actual.dtype == jnp.float64
  np.testing.assert_allclose(actual, expected, rtol=1e-13)


def test_the_config_of_nyu_has_the_authors_schedule():
  iterations, steps, expected = rates_of_the_authors("nyu")
  config = loader.load("configs/nyu_depth.py")
  rate = optim.schedule(**config.optim.schedule, lr=config.optim.lr)
  np.testing.assert_allclose(rate(jnp.asarray(steps[-1] - 1)), expected[-1], rtol=3e-6)
  assert config.optim.schedule.half == 12 * iterations and config.num_steps == 25 * iterations >= steps[-1]


def test_the_rate_stays_at_its_least_after_the_end():
  rate = nyu_schedule(10)
  np.testing.assert_allclose([rate(10**6), rate(25)], [3e-5, 3e-5], rtol=1e-6)


def test_cosine_warms_up_and_falls_to_its_least():
  rate = optim.schedule("cosine", lr=1e-3, min_lr=1e-5, num_steps=100, warmup=10)
  np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 55, 100)], [0, 5e-4, 1e-3, 5.05e-4, 1e-5], rtol=1e-5)


def test_an_unknown_schedule_names_the_known_ones():
  with pytest.raises(ValueError, match=r"optim\.schedule\.name='linear' is unknown; choose one of \['cosine', 'poly'"):
    optim.schedule("linear")


@pytest.mark.parametrize(
  "config, steps, end",
  [
    ("ade20k_seg.py", 160_000, 80_000),
    ("cityscapes_seg.py:meta_prompts", 80_001, 80_000),
    ("nyu_depth.py", 50 * 1009, 24 * 1009),
    ("kitti_depth.py:meta_prompts", 30 * 965, 24 * 965),
  ],
)
def test_a_schedule_that_ends_before_the_run_is_refused_with_both_numbers(config, steps, end):
  longer = loader.changed(loader.load(f"configs/{config}"), {"num_steps": steps})
  with pytest.raises(
    ValueError, match=rf"ends at step {end}, the run at config\.num_steps={steps}: .*; set .*"
  ) as told:
    optim.check_length(steps, **loader.schedule(longer))
  assert "\n" not in str(told.value)


@pytest.mark.parametrize("steps", [1, 3, 5, 100])
def test_the_length_that_a_message_proposes_is_accepted(steps):
  with pytest.raises(ValueError, match=r"schedule\.half=(\d+)\.$") as told:
    optim.check_length(steps, "triangular_poly", half=0)
  optim.check_length(steps, "triangular_poly", half=int(re.search(r"half=(\d+)", str(told.value))[1]))


@pytest.mark.parametrize("path", sorted((loader.PROJECT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_the_schedule_of_a_shipped_config_reaches_the_end_also_of_a_shorter_run(path):
  config = loader.load(str(path))
  for steps in (config.num_steps, 10):
    optim.check_length(steps, **loader.schedule(loader.changed(config, {"num_steps": steps})))


def test_step_falls_at_its_drops_and_warms_up_linearly():
  rate = optim.schedule("step", lr=2.0, drops=(10, 20), warmup=4, warmup_ratio=0.001)
  rates = [rate(step) for step in (0, 2, 4, 9, 10, 19, 20, 99)]
  first = 2 * (1 - np.float32(0.999))  # as released, where 1 - 0.999 in float32 has four digits
  np.testing.assert_allclose(rates, [first, 2 * (1 - 0.5 * 0.999), 2, 2, 0.2, 0.2, 0.02, 0.02], rtol=1e-5)


@pytest.fixture(scope="module")
def full():
  """The experiment of the full config; nothing of it is allocated."""
  return experiment.assemble(loader.load("configs/nyu_depth.py"))


def in_source_names(exp, names):
  phantoms = {n: np.broadcast_to(np.float32(0), exp.spec.shapes[n].shape) for n in names}
  pairs = {}
  for name, array in phantoms.items():
    (source,) = rules.to_source({name: array}, released.vpd_depth())
    pairs[name] = source
  assert len(set(pairs.values())) == len(pairs)
  return pairs


def test_every_parameter_of_the_full_network_is_in_the_authors_group(full):
  with gzip.open(oracle.GOLDEN / "optimizer_groups.depth.json.gz", "rt") as f:
    authors = json.load(f)["vpd_depth"]
  config = loader.load("configs/nyu_depth.py").optim
  assert authors["base_lr"] == config.lr and authors["trainable_but_in_no_group"] == []
  assert authors["optimizer"] == f"AdamW betas ({config.b1}, {config.b2}) eps {config.epsilon}, no gradient clipping"
  assert config.clip_norm == 0
  expected = {}
  for key, group in authors["groups"].items():
    fields = dict(field.split("=") for field in key.split())
    assert fields["trainable"] == "True" and group["count"] == len(group["names"])
    for name in group["names"]:
      expected[name] = (float(fields["lr_mult"]), float(fields["weight_decay"]))
  groups = full.groups
  actual = {
    source: (groups.lr[name], config.decay * groups.decay[name])
    for name, source in in_source_names(full, groups.lr).items()
  }
  assert actual == expected
  assert len(actual) == 22 + 12 + 281 + 401


def test_what_is_not_trained_is_what_the_authors_do_not_train(full):
  with gzip.open(oracle.GOLDEN / "optimizer_groups.depth.json.gz", "rt") as f:
    trained = {name for group in json.load(f)["vpd_depth"]["groups"].values() for name in group["names"]}
  expected = {entry["name"] for entry in oracle.manifest("vpd_depth", "full")} - trained
  counters = {name for name in expected if name.endswith("num_batches_tracked")}
  held = full.groups.frozen | full.spec.buffers | full.spec.stats
  assert set(in_source_names(full, held).values()) == expected - counters
  assert not held & full.groups.lr.keys()
  assert "method/class_vectors" in full.spec.buffers
  assert any(name.startswith("method/vae/post_quant_conv/") for name in full.spec.buffers | full.groups.frozen)


def test_the_table_of_groups_counts_every_parameter_once(full):
  rows = optim.table(full.groups, full.spec.shapes)
  assert {row[:4] for row in rows} == {
    ("rest", 1.0, 0.0, 22), ("rest", 1.0, 1.0, 12), ("unet", 0.01, 1.0, 281), ("unet", 0.01, 0.0, 401),
    ("frozen", None, None, len(full.groups.frozen)),
  }  # fmt: skip
  assert sum(row[4] for row in rows) == sum(full.spec.shapes[name].size for name in full.spec.params)
  assert all(row[5] in full.spec.params for row in rows)


def test_groups_name_what_they_freeze_and_label_the_rest():
  groups = optim.groups(SHAPES, ((r"/head/", None), (r"/unet/", 0.5)), ((r"/bias$", 0.0), (r"", 1.0)))
  assert groups.frozen == {"head/kernel", "head/scale"}
  assert groups.lr == {"unet/bias": 0.5, "unet/kernel": 0.5}
  assert groups.decay == {"unet/bias": 0.0, "unet/kernel": 1.0}
  assert set(groups.label.values()) == {"unet"}


def test_patterns_that_read_alike_have_labels_of_their_own():
  groups = optim.groups(SHAPES, ((r"/unet/b", 0.1), (r"[unet/b]", 0.2)), ((r"", 1.0),))
  assert groups.label == {
    "unet/bias": "unet_b",
    "unet/kernel": "unet_b_2",
    "head/kernel": "unet_b_2",
    "head/scale": "unet_b_2",
  }
  assert optim._labels(["a", "/a/", "a_2", "(a)", "", "rest"]) == ["a", "a_2", "a_2_2", "a_3", "rest", "rest_2"]


def test_a_decay_rule_for_frozen_arrays_alone_is_idle():
  with pytest.raises(ValueError, match=r"config\.optim\.decay_groups: rules that match no array: \['/head/'\]"):
    optim.groups(SHAPES, ((r"/head/", None), (r"", 1.0)), ((r"/head/", 0.0), (r"", 1.0)))


# A hundred times the release's rates: at those, weight decay of the UNet is lost in float32's rounding.
LARGE = optim.schedule("triangular_poly", lr=5e-2, min_lr=3e-3, half=3, power=0.9)


def values(seed=0, scale=1.0):
  return {name: np.float32(scale) * fill.normal(name, shape, seed) for name, shape in SHAPES.items()}


def gradient_of(step):
  """Gradients of very different sizes; those of one array are all zero, and a few of the others."""
  grads = values(seed=step + 1, scale=10.0 ** (step - 3))
  grads["head/kernel"][:] = 0
  grads["unet/kernel"][0] = 0
  return grads


def five_steps(rate, **options):
  groups = optim.groups(SHAPES, LR_GROUPS, DECAY_GROUPS)
  chain = optim.optimizer(rate, groups, **(ADAM | {"clip_norm": 0.0} | options))
  params = {name: jnp.asarray(x) for name, x in values().items()}
  state, history = chain.init(params), []
  update = jax.jit(chain.update)
  for step in range(5):
    updates, state = update({n: jnp.asarray(g) for n, g in gradient_of(step).items()}, state, params)
    params = {name: p + updates[name] for name, p in params.items()}
    history.append(jax.device_get(params))
  return history


@pytest.mark.reference
def test_five_steps_are_those_of_torch_adamw():
  import torch

  rate = LARGE
  tensors = {name: torch.nn.Parameter(torch.from_numpy(x.copy())) for name, x in values().items()}
  groups = optim.groups(SHAPES, LR_GROUPS, DECAY_GROUPS)
  reference = torch.optim.AdamW(
    [{"params": [t], "weight_decay": 0.1 * groups.decay[n], "name": n} for n, t in tensors.items()], lr=1.0
  )
  for step, params in enumerate(five_steps(rate)):
    for group in reference.param_groups:
      group["lr"] = float(rate(step)) * groups.lr[group["name"]]
    for name, gradient in gradient_of(step).items():
      tensors[name].grad = torch.from_numpy(gradient)
    reference.step()
    for name, tensor in tensors.items():
      np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=f"{name} {step}")


def test_five_steps_follow_the_formula_of_adamw():
  rate = LARGE
  params = {name: x.astype(np.float64) for name, x in values().items()}
  first, second = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
  for step, actual in enumerate(five_steps(rate)):
    for name, gradient in gradient_of(step).items():
      lr = float(rate(step)) * (0.01 if "unet" in name else 1)
      first[name] += 0.1 * (gradient - first[name])
      second[name] += 0.001 * (gradient.astype(np.float64) ** 2 - second[name])
      root = np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + 1e-8
      decay = 0.1 if name.endswith("kernel") else 0.0
      params[name] = params[name] * (1 - lr * decay) - lr * first[name] / (1 - 0.9 ** (step + 1)) / root
      np.testing.assert_allclose(actual[name], params[name], rtol=1e-6, atol=1e-6, err_msg=f"{name} {step}")


def test_a_gradient_of_zero_leaves_decay_alone():
  rate = LARGE
  expected = values()["head/kernel"].astype(np.float64)
  for step, actual in enumerate(five_steps(rate)):
    expected *= 1 - float(rate(step)) * 0.1
    np.testing.assert_allclose(actual["head/kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 1e6, 0.01])
def test_clipping_bounds_the_norm_of_all_gradients_together(clip_norm):
  groups = optim.groups(SHAPES, ((r"", 1.0),), ((r"", 0.0),))
  chain = optim.optimizer(lambda step: jnp.float32(1), groups, **(ADAM | {"clip_norm": clip_norm, "epsilon": 1.0}))
  params, grads = ({name: jnp.asarray(x) for name, x in values(seed).items()} for seed in (0, 1))
  updates, _ = chain.update(grads, chain.init(params), params)
  norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values()))
  share = min(1, clip_norm / norm) if clip_norm else 1
  for name, gradient in grads.items():  # the first step of Adam is g / (|g| + epsilon)
    clipped = np.asarray(gradient, np.float64) * share
    np.testing.assert_allclose(updates[name], -clipped / (np.abs(clipped) + 1), rtol=1e-5, err_msg=name)


def test_ema_is_the_weighted_mean_of_old_and_new():
  old, new = values(), values(seed=1)
  mean = optim.ema({n: jnp.asarray(x) for n, x in old.items()}, {n: jnp.asarray(x) for n, x in new.items()}, 0.75)
  for name in SHAPES:
    np.testing.assert_allclose(mean[name], 0.75 * old[name] + 0.25 * new[name], rtol=1e-5, atol=1e-7)
