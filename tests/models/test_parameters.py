"""Names, shapes and kinds of a model's arrays, and the rules that give every name a value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vpd_jax.models import initializers, parameters
from vpd_jax.types import Buffer


class Layer(nnx.Module):
  """A kernel, a running mean and a buffer."""

  def __init__(self, width, rngs):
    self.kernel = nnx.Param(initializers.normal(1.0)(rngs.params(), (width, width), jnp.float32))
    self.mean = nnx.BatchStat(initializers.zeros(rngs.params(), (width,), jnp.float32))
    self.table = Buffer(initializers.constant(3)(rngs.params(), (3,), jnp.int32))

  def __call__(self, x):
    self.mean[...] = self.mean[...] + x.mean(axis=0)
    return x @ self.kernel[...]


class Model(nnx.Module):
  """Two layers in a list, one beside it."""

  def __init__(self, rngs):
    self.blocks = nnx.List([Layer(2, rngs), nnx.List([Layer(2, rngs)])])
    self.last = Layer(2, rngs)

  def __call__(self, x):
    return self.last(self.blocks[1][0](self.blocks[0](x)))


PLACES = ("blocks/0", "blocks/1/0", "last")


def build():
  return Model(initializers.InitKeys(0))


@pytest.fixture(scope="module")
def parts():
  return parameters.describe(build)


@pytest.fixture
def named(parts):
  return parts.initialize(parts.shapes)


def test_names_are_paths_joined_by_slashes_and_sorted_by_kind(parts):
  assert parts.params == {f"{place}/kernel" for place in PLACES}
  assert parts.stats == {f"{place}/mean" for place in PLACES}
  assert parts.buffers == {f"{place}/table" for place in PLACES}
  assert parts.shapes.keys() == parts.params | parts.stats | parts.buffers == parts.paths.keys()


def test_shapes_are_known_without_any_array(parts):
  assert all(isinstance(shape, jax.ShapeDtypeStruct) for shape in parts.shapes.values())
  assert parts.shapes["last/table"].dtype == jnp.int32 and parts.shapes["last/kernel"].shape == (2, 2)
  assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(parts.model)))


def test_describing_a_model_larger_than_memory_costs_nothing():
  class Huge(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.zeros((2**20, 2**20)))

  assert parameters.describe(Huge).shapes["kernel"].shape == (2**20, 2**20)


def test_state_of_an_unknown_kind_is_refused():
  class Cache(nnx.Variable):
    pass

  class Bad(nnx.Module):
    def __init__(self):
      self.memory = Cache(jnp.zeros(3))

  with pytest.raises(
    TypeError, match=r"has state that checkpoints do not store: \['memory'\]; use Param, Buffer or Batch"
  ):
    parameters.describe(Bad)


def test_fresh_arrays_follow_their_initializers(named):
  np.testing.assert_array_equal(named["last/table"], np.full(3, 3, np.int32))
  kernels = np.stack([named[f"{place}/kernel"] for place in PLACES])
  assert len(np.unique(kernels)) == kernels.size, "every array has numbers of its own"


def test_an_array_that_nothing_draws_is_named():
  parts = parameters.describe(lambda: Model(nnx.Rngs(0)))
  with pytest.raises(ValueError, match=r"no initializer is recorded for \['last/kernel'\]"):
    parts.initialize(["last/kernel"])


def test_a_part_of_the_arrays_has_the_same_fresh_values(parts, named):
  assert parts.initialize(()) == {}
  part = parts.initialize(["last/kernel", "blocks/0/mean"])
  assert part.keys() == {"last/kernel", "blocks/0/mean"}
  for name, value in part.items():
    np.testing.assert_array_equal(value, named[name])


def test_a_merged_model_computes_with_the_given_arrays(parts, named):
  named["blocks/0/kernel"] = 2 * jnp.eye(2)
  named["blocks/1/0/kernel"], named["last/kernel"] = jnp.eye(2), 3 * jnp.eye(2)
  split = [{n: x for n, x in named.items() if n in kind} for kind in (parts.params, parts.stats, parts.buffers)]
  out = jax.jit(lambda arrays, x: parts.merge(*arrays)(x))(split, jnp.ones((4, 2)))
  np.testing.assert_allclose(out, np.full((4, 2), 6.0))


def test_statistics_of_a_forward_pass_are_read_and_the_given_arrays_stay(parts, named):
  named["blocks/0/kernel"] = named["blocks/1/0/kernel"] = 2 * jnp.eye(2)

  @jax.jit
  def run(named, x):
    model = parts.merge(named)
    model(x)
    return parameters.stats(model), named

  stats, after = run(named, jnp.ones((4, 2)))
  assert stats.keys() == parts.stats
  for name, expected in zip(("blocks/0/mean", "blocks/1/0/mean", "last/mean"), (1.0, 2.0, 4.0), strict=True):
    np.testing.assert_array_equal(stats[name], np.full(2, expected))
    np.testing.assert_array_equal(after[name], np.zeros(2))


def test_arrays_that_do_not_fit_are_named(parts, named):
  named["blocks/2/kernel"] = named.pop("last/kernel")
  with pytest.raises(ValueError, match=r"missing \['last/kernel'\], unknown \['blocks/2/kernel'\]\.$"):
    parts.merge(named)


NAMES = ("unet/conv/kernel", "unet/conv/bias", "vae/conv/kernel", "head/bias")


def test_the_first_rule_that_matches_counts():
  found = parameters.match_rules(
    NAMES, ((r"/vae/", None), (r"/bias$", 0.0), (r"^/unet/", 0.1), (r"", 1.0)), field="optim.x"
  )
  assert found == {"unet/conv/kernel": 0.1, "unet/conv/bias": 0.0, "vae/conv/kernel": None, "head/bias": 0.0}


def test_a_leading_slash_names_a_whole_level():
  rules = ((r"/conv/", "inside"), (r"", "outside"))
  assert parameters.match_rules(["conv/kernel", "my_conv/kernel"], rules, field="x") == {
    "conv/kernel": "inside", "my_conv/kernel": "outside",
  }  # fmt: skip


@pytest.mark.parametrize(
  "rules, shadowed",
  [
    (((r"", 1.0), (r"/unet/", 0.01)), r"'/unet/' behind ''; remove"),
    (((r"/unet/", 1.0), (r"/unet/", 0.1), (r"", 1.0)), r"'/unet/' behind '/unet/'; remove"),
    (((r"kernel$", 1.0), (r"/unet/", 0.1), (r"unet/conv/bias", 0.0), (r"", 1.0)), r"'unet/conv/bias' behind '/unet/'"),
    (((r"kernel", 1.0), (r"bias", 0.1), (r"/conv/", 0.0), (r"", 1.0)), r"'/conv/' behind 'kernel', 'bias'; remove"),
    (((r"", 1.0), (r"", 0.5)), r"'' behind ''; remove"),
  ],
)
def test_a_rule_whose_arrays_earlier_rules_all_take_is_refused(rules, shadowed):
  with pytest.raises(ValueError, match=rf"^x: rules that never apply .*: {shadowed}"):
    parameters.match_rules(NAMES, rules, field="x")


def test_a_rule_behind_others_may_share_arrays_with_them():
  assert parameters.match_rules(["a/bias", "b/bias"], ((r"/a/", 1), (r"bias", 2)), field="x") == {
    "a/bias": 1,
    "b/bias": 2,
  }


def test_a_pattern_that_is_no_regular_expression_is_named():
  with pytest.raises(ValueError, match=r"^x: '/unet\(' is not a regular expression"):
    parameters.match_rules(NAMES, ((r"/unet(", 1), (r"", 2)), field="x")


def test_names_without_rule_and_rules_without_name_are_listed_together():
  with pytest.raises(ValueError) as error:
    parameters.match_rules(NAMES, ((r"/unet/", 1), (r"/unit/", 2), (r"/vea/", 3)), field="config.optim.lr_groups")
  assert str(error.value) == (
    "config.optim.lr_groups: 2 arrays match no rule: head/bias, vae/conv/kernel; add one; "
    "rules that match no array: ['/unit/', '/vea/']; remove or correct them."
  )


def test_at_most_ten_names_are_listed_but_all_are_counted():
  with pytest.raises(ValueError, match="12 arrays match no rule") as error:
    parameters.match_rules([f"layer/{i:02d}" for i in range(12)] + ["a"], ((r"/a", 1),), field="x")
  assert "layer/09" in str(error.value) and "layer/10" not in str(error.value)
