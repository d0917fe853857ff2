"""The engine of conversion: both directions, and every complaint."""

import jax
import numpy as np
import pytest

from vpd_jax.convert import rules
from vpd_jax.convert.rules import Drop, Rule

TABLE = [
  Rule("net.blocks", "method/blocks"),
  Rule("net.up", "method/up", (rules.deconv, rules.norm, rules.bias, *rules.BATCH_NORM)),
  Rule("net.gamma", "method/gamma", (rules.plain,)),
  Rule("net.words", "method/words", (rules.embedding,), optional=True),
  Drop(r".*\.num_batches_tracked", "counted elsewhere"),
]


def source() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shapes = {
    "net.blocks.0.weight": (5, 4, 3, 3),
    "net.blocks.0.bias": (5,),
    "net.blocks.1.norm.weight": (5,),
    "net.blocks.2.weight": (6, 5),
    "net.up.0.weight": (4, 7, 2, 2),
    "net.up.1.weight": (7,),
    "net.up.1.running_mean": (7,),
    "net.up.1.running_var": (7,),
    "net.gamma": (3,),
  }
  named = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  return named | {"net.up.1.num_batches_tracked": np.asarray(9)}


TARGETS = {
  "method/blocks/0/kernel": (3, 3, 4, 5),
  "method/blocks/0/bias": (5,),
  "method/blocks/1/norm/scale": (5,),
  "method/blocks/2/kernel": (5, 6),
  "method/up/0/kernel": (2, 2, 4, 7),
  "method/up/1/scale": (7,),
  "method/up/1/mean": (7,),
  "method/up/1/var": (7,),
  "method/gamma": (3,),
}


def targets(**changes) -> dict[str, jax.ShapeDtypeStruct]:
  shapes = TARGETS | changes
  return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items() if shape is not None}


def test_names_and_layouts_become_ours():
  given = source()
  named, report = rules.convert(given, TABLE, targets())
  assert {name: array.shape for name, array in named.items()} == TARGETS
  assert named["method/blocks/0/kernel"][2, 1, 3, 4] == given["net.blocks.0.weight"][4, 3, 2, 1]
  assert named["method/blocks/2/kernel"][3, 5] == given["net.blocks.2.weight"][5, 3]
  assert named["method/up/0/kernel"][1, 0, 2, 6] == given["net.up.0.weight"][2, 6, 1, 0]
  assert all(array.flags.c_contiguous for array in named.values())
  assert report.dropped == {"net.up.1.num_batches_tracked": "counted elsewhere"} and report.fresh == ()
  assert report.used["net.gamma"] == "method/gamma"
  assert "9 tensors used" in report.summary() and "1 dropped: counted elsewhere" in report.summary()


def test_the_way_back_gives_the_source():
  given = source()
  named, _ = rules.convert(given, TABLE, targets())
  back = rules.to_source(named, TABLE)
  del given["net.up.1.num_batches_tracked"]
  assert back.keys() == given.keys()
  for name, value in given.items():
    np.testing.assert_array_equal(back[name], value)


def test_any_part_goes_back_as_gradients_do():
  gradient = np.arange(12, dtype=np.float64).reshape(3, 4)
  back = rules.to_source({"method/blocks/7/attn/kernel": gradient}, TABLE)
  assert list(back) == ["net.blocks.7.attn.weight"]
  np.testing.assert_array_equal(back["net.blocks.7.attn.weight"], gradient.T)


def test_values_take_the_dtype_of_the_target():
  half = {name: value.astype(np.float16) for name, value in source().items()}
  named, _ = rules.convert(half, TABLE, targets())
  assert {array.dtype.name for array in named.values()} == {"float32"}


def test_what_is_copied_is_aligned_for_a_cpu_device_and_the_rest_is_not_copied():
  given = source()
  named, _ = rules.convert(given, TABLE, targets(), aligned=True)
  plain, _ = rules.convert(given, TABLE, targets())
  cpu = jax.devices("cpu")[0]
  for name, array in named.items():
    np.testing.assert_array_equal(array, plain[name])
    shared = any(np.shares_memory(array, value) for value in given.values())
    assert shared != (jax.device_put(array, cpu).unsafe_buffer_pointer() == array.ctypes.data and array.ndim > 1), name


def test_matrices_may_become_1x1_convolutions_and_back():
  matrix = np.arange(6.0).reshape(2, 3)
  kernel = rules.linear_as_conv.forward(matrix)
  assert kernel.shape == (1, 1, 3, 2)
  np.testing.assert_array_equal(rules.linear_as_conv.backward(kernel), matrix)


def test_every_problem_is_reported_at_once():
  given = source() | {"extra.weight": np.ones(2), "net.blocks.9.weight": np.ones((2, 2))}
  del given["net.gamma"]
  table = [*TABLE, Rule("net.up.1", "method/up/1", (rules.norm,)), Drop("never", "absent")]
  wanted = targets(**{"method/up/0/kernel": (2, 2, 4, 8), "head/kernel": (1, 1)})
  with pytest.raises(rules.ConversionError) as caught:
    rules.convert(given, table, wanted, table="test")
  message = str(caught.value)
  for part in (
    "test: the weights do not fit",
    "1 match no rule: extra.weight [2]",
    "1 match more than one rule: net.up.1.weight [7]",
    "2 are rules without effect (the source lacks what they describe): net.gamma, never",
    "1 have no place in the model: net.blocks.9.weight -> method/blocks/9/kernel",
    "1 have the wrong shape: net.up.0.weight gives [2, 2, 4, 7], method/up/0/kernel needs [2, 2, 4, 8]",
    "3 are filled by nothing and may not stay fresh: method/up/1/scale, method/gamma, head/kernel",
  ):
    assert part in message, part


def test_a_target_filled_twice_is_reported():
  table = [Rule("a", "x"), Rule("b", "x")]
  given = {"a.bias": np.ones(2), "b.bias": np.ones(2)}
  with pytest.raises(rules.ConversionError, match="1 are filled twice: x/bias"):
    rules.convert(given, table, {"x/bias": jax.ShapeDtypeStruct((2,), np.float32)})


def test_fresh_targets_are_listed_and_not_returned():
  wanted = targets(**{"head/kernel": (1, 1)})
  named, report = rules.convert(source(), TABLE, wanted, fresh=("^/head/",))
  assert report.fresh == ("head/kernel",) and "head/kernel" not in named


def test_long_lists_are_cut_with_their_count():
  given = {f"x.{i}": np.ones(1) for i in range(25)}
  with pytest.raises(rules.ConversionError, match=r"25 match no rule: .*, and 15 more"):
    rules.convert(given, [], {})


MANIFEST = [{"name": name, "shape": list(value.shape), "dtype": str(value.dtype)} for name, value in source().items()]


def test_the_export_is_what_the_manifest_says():
  alias = {"name": "copy.gamma", "shape": [3], "dtype": "float32", "alias_of": "net.gamma"}
  named, _ = rules.convert(source(), TABLE, targets())
  state = rules.export(dict(sorted(named.items())), TABLE, [*MANIFEST, alias], step=9)
  expected = source() | {"copy.gamma": source()["net.gamma"]}
  assert list(state) == list(expected)
  for name, value in expected.items():
    assert (state[name].dtype, state[name].tobytes()) == (value.dtype, value.tobytes()), name


def test_a_number_beyond_the_dtype_of_the_manifest_is_refused():
  named, _ = rules.convert(source(), TABLE, targets())
  half = [entry | {"dtype": "float16"} for entry in MANIFEST]
  assert rules.export(named, TABLE, half, step=60_000)["net.up.1.num_batches_tracked"] == 60_000
  with pytest.raises(
    rules.ConversionError, match=r"1 do not fit their dtype: net\.up\.1\.num_batches_tracked, float16"
  ):
    rules.export(named, TABLE, half, step=70_000)


def test_everything_an_export_lacks_is_reported_at_once():
  named, _ = rules.convert(source(), TABLE, targets())
  named["method/blocks/5/bias"] = named.pop("method/gamma")
  wrong = [entry | {"shape": [9]} if entry["name"] == "net.up.1.weight" else entry for entry in MANIFEST]
  missing = {"name": "net.head", "shape": [], "dtype": "float32"}
  with pytest.raises(rules.ConversionError) as caught:
    rules.export(named, TABLE, [*wrong, missing], step=0)
  for part in (
    "2 are in the manifest, but not in the weights: net.gamma, net.head",
    "1 have the wrong shape: net.up.1.weight is [7], the manifest says [9]",
    "1 are in the weights, but not in the manifest: net.blocks.5.bias",
  ):
    assert part in str(caught.value), part


def test_names_without_a_way_back_are_reported():
  with pytest.raises(rules.ConversionError, match=r"2 match no rule: a/b \[1\], c \[\]"):
    rules.to_source({"a/b": np.ones(1), "c": np.ones(())}, TABLE)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e300])
def test_tensors_that_hold_no_finite_numbers_are_named_all_at_once(wrong):
  given = source()
  for name in ("net.blocks.0.bias", "net.up.1.running_var"):
    given[name] = given[name].astype(np.float64)
    given[name][2] = wrong
  with pytest.raises(rules.NotFinite, match="2 arrays hold NaN or infinity") as caught:
    rules.convert(given, TABLE, targets())
  assert "net.blocks.0.bias as float32 (1 numbers)" in str(caught.value)
  assert "net.up.1.running_var" in str(caught.value) and "\n" not in str(caught.value)
