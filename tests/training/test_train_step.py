"""The step: groups, accumulation, branches, what moves and what does not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, tiny
from tests.helpers.two_branches import TwoBranches
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert.finite import check_finite
from vpd_jax.tasks.depth.task import Depth, silog
from vpd_jax.training import step as training_step
from vpd_jax.types import Branch

BATCH, SIDE = 12, 64
EMPTY = slice(6, 9)  # the third group of three has no ground truth at all
# The gradient of a 3x3 kernel at full size sums 49152 float32 terms of both signs, so that another order moves it by
# 1e-6 to 2.4e-6 of the norm of all. In float64 the two agree to 1e-14.
IN_ANOTHER_ORDER = 5e-6
# Compiles in half the time; the steps here are too small to gain from more.
QUICK = {"xla_backend_optimization_level": 0}


def config_of(**changes):
  """The smallest network of the NYU config with batches of 12 in groups of 3."""
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.data.batch_size = BATCH
  config.optim.schedule.half = 3  # rates at which float32 shows every step
  config.update_from_flattened_dict(changes)
  return config.lock()


def two_branches(**changes):
  """The experiment of a method that a config knows by name here only."""
  config = config_of(**changes).unlock()
  config.method = {"name": "two_branches"}
  config.optim.lr_groups = ((r"/mix/", 0.5), (r"", 1.0))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(experiment.METHODS, "two_branches", TwoBranches)
    return experiment.assemble(config)


def examples():
  """12 images with holes in their depth; one group has none of it."""
  images = fill.integers("image", (BATCH, SIDE, SIDE, 3), 256, 0).astype(np.uint8)
  depth = fill.uniform("depth", (BATCH, SIDE, SIDE), 0, 0.5, 10) * (fill.uniform("holes", (BATCH, SIDE, SIDE), 0) > 0.3)
  depth[EMPTY] = 0
  classes = fill.integers("class", (BATCH,), 27, 0).astype(np.int32)
  return [{"image": i, "depth": d, "class_id": c} for i, d, c in zip(images, depth, classes, strict=True)]


def batch_for(exp):
  """What the pipeline makes of the examples: prepared by the method, the experiment's keys, stacked."""
  prepared = [exp.method.prepare(example) for example in examples()]
  return {key: jnp.asarray(np.stack([example[key] for example in prepared])) for key in exp.keys}


def everything(state):
  return state.params, state.frozen, state.stats


def close(actual, expected, limit):
  """Every array differs by at most `limit` of the norm of all arrays together."""
  assert actual.keys() == expected.keys()
  norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
  total = norm([norm(x) for x in expected.values()])
  for name, x in expected.items():
    error = norm(np.asarray(actual[name], np.float64) - np.asarray(x, np.float64)) / total
    assert error <= limit, f"{name}: {error:.1e} of the norm of all, limit {limit:.0e}"


class TestGroupLosses:
  """Without a network."""

  task, branches = Depth(max_depth=10.0), (Branch("only", 1.0),)

  def data(self):
    batch = {"image": jnp.zeros((BATCH, 1, 1, 3)), "depth": jnp.asarray(np.stack([e["depth"] for e in examples()]))}
    return {"depth": jnp.asarray(fill.uniform("prediction", (2 * BATCH, SIDE, SIDE), 0, 0.5, 10))}, batch

  def of_groups(self, prediction, truth, group):
    return [float(silog(prediction[i : i + group], truth[i : i + group])[0]) for i in range(0, BATCH, group)]

  @pytest.mark.parametrize("group, counted", [(3, 3), (1, 9), (6, 2), (12, 1), (0, 1)])
  def test_the_loss_is_the_mean_over_groups_with_ground_truth(self, group, counted):
    outputs, batch = self.data()
    outputs = {"depth": outputs["depth"][:BATCH]}
    loss = training_step.group_losses(self.task, outputs, batch, self.branches, group)
    assert loss.weight == counted
    values = self.of_groups(outputs["depth"], batch["depth"], group or BATCH)
    np.testing.assert_allclose(loss.value / loss.weight, sum(values) / counted, rtol=1e-6)
    np.testing.assert_allclose(loss.logs["silog"], loss.value, rtol=1e-6)

  def test_the_grouping_matters(self):
    outputs, batch = self.data()
    outputs = {"depth": outputs["depth"][:BATCH] * jnp.linspace(0.2, 2, BATCH)[:, None, None]}
    means = [
      loss.value / loss.weight
      for loss in (training_step.group_losses(self.task, outputs, batch, self.branches, group) for group in (1, 3, 0))
    ]
    assert np.abs(np.diff(means)).min() > 1e-3

  def test_branches_add_up_with_their_weights(self):
    outputs, batch = self.data()
    both = (Branch("plain", 1.0), Branch("negative", 0.5))
    loss = training_step.group_losses(self.task, outputs, batch, both, 3)
    values = [self.of_groups(outputs["depth"][i * BATCH :][:BATCH], batch["depth"], 3) for i in (0, 1)]
    np.testing.assert_allclose(loss.value, sum(values[0]) + 0.5 * sum(values[1]), rtol=1e-6)
    assert loss.weight == 3 and loss.logs.keys() == {"plain/silog", "negative/silog"}
    np.testing.assert_allclose(loss.logs["negative/silog"], sum(values[1]), rtol=1e-6)


@pytest.fixture(scope="module")
def network():
  """The smallest VPD, a state and a batch with ready latents, so that the VAE need not be compiled."""
  exp = experiment.assemble(config_of())
  batch = batch_for(exp) | {"latents": jnp.asarray(fill.normal("latents", (BATCH, 8, 8, 4), 0))}
  return exp, tiny.train_state(exp, tiny.filled(exp.spec.shapes)), batch


@pytest.fixture(scope="module")
def dummy():
  exp = two_branches()
  return exp, tiny.train_state(exp, tiny.filled(exp.spec.shapes)), batch_for(exp)


def gradients_of(setup, accumulation=1):
  """The compiled gradient function of an experiment, and its result on the batch."""
  exp, state, batch = setup
  run = training_step.make_gradients(exp, loss_group=3, accumulation=accumulation)
  run = jax.jit(run, compiler_options=QUICK)
  return run, run(*everything(state), batch)


@pytest.fixture(scope="module")
def whole(network):
  return gradients_of(network)[1]


@pytest.fixture(scope="module")
def in_two_parts(network):
  """The second part is one empty and one full group: parts count by their groups, not alike."""
  return gradients_of(network, 2)[1]


@pytest.fixture(scope="module")
def of_dummy(dummy):
  """By number of parts: functions and results for the method with two branches."""
  return {parts: gradients_of(dummy, parts) for parts in (1, 4)}


def test_accumulated_gradients_are_those_of_the_whole_batch(whole, in_two_parts):
  close(in_two_parts[0], whole[0], IN_ANOTHER_ORDER)


def test_accumulated_loss_logs_and_statistics_are_those_of_the_whole_batch(whole, in_two_parts):
  np.testing.assert_allclose(in_two_parts[1], whole[1], rtol=1e-6)
  close(in_two_parts[2], whole[2], 1e-6)
  close(in_two_parts[3], whole[3], 1e-6)


def test_accumulation_of_two_branches_is_the_whole_batch(of_dummy):
  accumulated, whole = of_dummy[4][1], of_dummy[1][1]
  close(accumulated[0], whole[0], IN_ANOTHER_ORDER)
  np.testing.assert_allclose(accumulated[1], whole[1], rtol=1e-6)
  close(accumulated[2], whole[2], 1e-6)
  close(accumulated[3], whole[3], 1e-6)


@pytest.mark.x64
def test_accumulation_in_float64_is_the_whole_batch_to_the_last_digits():
  exp = two_branches(dtype="float64", param_dtype="float64")
  setup = exp, tiny.train_state(exp, tiny.filled(exp.spec.shapes)), batch_for(exp)
  whole, accumulated = gradients_of(setup)[1], gradients_of(setup, 4)[1]
  close(accumulated[0], whole[0], 1e-14)
  close(accumulated[3], whole[3], 1e-14)


def test_a_group_without_ground_truth_gives_no_gradient(dummy, of_dummy):
  _, state, batch = dummy
  run, plain = of_dummy[1]
  changed = run(*everything(state), batch | {"latents": batch["latents"].at[EMPTY].mul(3.0)})
  close(changed[0], plain[0], IN_ANOTHER_ORDER)
  assert changed[1] == plain[1]
  assert any(np.abs(changed[3][name] - plain[3][name]).max() > 1e-6 for name in plain[3])  # but it is seen


@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_without_ground_truth_has_loss_0_and_gradient_0(dummy, of_dummy, parts):
  _, state, batch = dummy
  empty = batch | {"depth": jnp.zeros_like(batch["depth"])}
  grads, loss, logs, stats = of_dummy[parts][0](*everything(state), empty)
  assert loss == 0 and set(map(float, logs.values())) == {0.0}
  assert all(not g.any() for g in grads.values()) and all(np.isfinite(s).all() for s in stats.values())


@pytest.mark.parametrize("changes, message", [
  ({"norm_group": 0, "accumulation": 2}, r"norm_group=0, the whole batch, cannot be accumulated over 2 parts; set it "
                                         r"to a divisor of 6, or config\.optim\.accumulation=1\.$"),
  ({"loss_group": 0, "accumulation": 2}, r"loss_group=0, the whole batch, cannot be accumulated over 2 parts"),
  ({"norm_group": 5}, r"norm_group=5 must divide the 12 images of the batch\.$"),
  ({"loss_group": 4, "accumulation": 2}, r"loss_group=4 must divide the 6 images of a part of the batch\.$"),
  ({"accumulation": 5}, r"accumulation=5 must divide config\.data\.batch_size=12\.$"),
  ({"accumulation": 0}, r"accumulation=0 must be at least 1\.$"),
])  # fmt: skip
def test_groups_that_do_not_fit_are_refused_in_one_line(changes, message):
  with pytest.raises(ValueError, match=r"^config\.optim\." + message):
    two_branches(**{f"optim.{name}": value for name, value in changes.items()})


def test_two_branches_of_ready_latents_go_through_a_step(dummy):
  exp, state, batch = dummy
  assert exp.keys == ("image", "depth", "latents")
  forward = lambda arrays, batch: exp.spec.merge(*arrays)(batch, training=True)["depth"]
  depth = jax.jit(forward, compiler_options=QUICK)(everything(state), batch)
  assert depth.shape == (2 * BATCH, SIDE, SIDE)
  values = [
    [float(silog(rows[i : i + 3], batch["depth"][i : i + 3])[0]) for i in (0, 3, 9)]
    for rows in (depth[:BATCH], depth[BATCH:])
  ]
  after, logs = jax.jit(training_step.make_step(exp, loss_group=3), compiler_options=QUICK)(state, batch)
  plain, negative = np.mean(values[0]), np.mean(values[1])
  np.testing.assert_allclose(logs["train/loss"], plain + 0.5 * negative, rtol=1e-6)
  np.testing.assert_allclose([logs["train/plain/silog"], logs["train/negative/silog"]], [plain, negative], rtol=1e-6)
  assert after.step == 1 and logs["norm/gradients"] > 0
  rate = exp.rate(0)
  np.testing.assert_allclose([logs["lr/mix"], logs["lr/rest"]], [0.5 * rate, rate], rtol=1e-6)


def test_only_the_first_branch_is_evaluated(dummy):
  exp, state, batch = dummy
  outputs = jax.eval_shape(lambda a, b: exp.spec.merge(*a)(b, training=False), everything(state), batch)
  assert outputs["depth"].shape == (BATCH, SIDE, SIDE)


@pytest.fixture(scope="module")
def three_steps(network):
  """The states before and after each of three donated steps of VPD, on the host; the function; what was donated."""
  exp, state, batch = network
  state = jax.tree.map(jnp.copy, state.replace(ema=state.params))
  step = training_step.make_step(exp, loss_group=3, ema_decay=0.9)
  step = jax.jit(step, donate_argnums=0, compiler_options=QUICK)
  keep = lambda state: jax.device_get(jax.tree.map(jnp.copy, state))  # a view of a buffer would keep it from donation
  states, donated, logs = [keep(state)], [], []
  for _ in range(3):
    donated.append(state)
    state, log = step(state, batch)
    states.append(keep(state))
    logs.append(jax.device_get(log))
  return states, step, donated, logs


def test_the_step_compiles_once(three_steps):
  assert three_steps[1]._cache_size() == 1


def test_the_donated_state_is_gone(three_steps):
  for state in three_steps[2]:
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_shapes_and_dtypes_of_the_state_stay(three_steps):
  first, last = three_steps[0][0], three_steps[0][-1]
  kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (first, last)]
  assert kinds[0] == kinds[1] and last.step.dtype == np.int32


def test_the_step_counts(three_steps):
  assert [int(state.step) for state in three_steps[0]] == [0, 1, 2, 3]


def test_frozen_arrays_do_not_move(three_steps):
  first, last = three_steps[0][0], three_steps[0][-1]
  assert "method/class_vectors" in first.frozen and any("/vae/" in name for name in first.frozen)
  assert not any("/vae/" in name for name in first.params)
  for name, value in first.frozen.items():
    np.testing.assert_array_equal(value, last.frozen[name])


def test_every_statistic_moves_in_every_step(three_steps):
  states = three_steps[0]
  for before, after in itertools.pairwise(states):
    assert all((before.stats[name] != after.stats[name]).any() for name in before.stats)


def test_trained_arrays_move_but_for_the_norm_before_attention_to_one_token(three_steps):
  """The softmax over one token is 1 whatever the query: no gradient, and a norm has no decay."""
  first, last = three_steps[0][0], three_steps[0][-1]
  still = {name for name, x in first.params.items() if np.array_equal(x, last.params[name])}
  assert still >= {name for name in first.params if "/transformer_blocks/0/norm2/" in name} != set()
  # In this network every group of a norm is one channel, which takes the gradient of the biases before it as well.
  assert all(name.startswith("method/unet/") and not name.endswith("/kernel") for name in still)


def test_ema_follows_the_parameters(three_steps):
  states = three_steps[0]
  for before, after in itertools.pairwise(states):
    close(after.ema, {n: 0.9 * before.ema[n] + 0.1 * x for n, x in after.params.items()}, 1e-6)


def test_the_logs_hold_loss_norm_and_the_rate_of_every_group(three_steps, network, whole):
  exp, logs = network[0], three_steps[3]
  assert logs[0].keys() == {"train/loss", "train/silog", "norm/gradients", "lr/unet", "lr/rest"}
  np.testing.assert_allclose(logs[0]["train/loss"], whole[1], rtol=1e-6)
  norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in whole[0].values()))
  np.testing.assert_allclose(logs[0]["norm/gradients"], norm, rtol=1e-5)
  for i, log in enumerate(logs):
    np.testing.assert_allclose([log["lr/unet"] * 100, log["lr/rest"]], [exp.rate(i)] * 2, rtol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_names_its_step():
  one, nan = jnp.float32(1), jnp.float32(np.nan)
  assert check_finite([(7, one, one)]) == []
  with pytest.raises(FloatingPointError, match=r"^the loss of step 8 is nan, .*Lower config\.optim\.lr"):
    check_finite([(7, one, one), (8, nan, nan), (9, nan, nan)])
  with pytest.raises(FloatingPointError, match=r"^the loss of step 8 is 1\.0, the norm of its gradients inf"):
    check_finite([(7, one, one), (8, one, jnp.float32(np.inf))])
