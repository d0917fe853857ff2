"""On CPU products of matrices stand in for convolutions of some sizes: the same numbers and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill
from vpd_jax.models.backbones import cpu_convolution
from vpd_jax.models.backbones.cpu_convolution import as_product, convolve, with_product_gradient

NUMBERS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
SAME = ((1, 1), (1, 1))


def inputs(height=5, width=7, channels=6, filters=4, size=3, dtype=np.float32):
  shapes = {"x": (2, height, width, channels), "kernel": (size, size, channels, filters)}
  return tuple(jnp.asarray(fill.normal(name, shape, 0), dtype) for name, shape in shapes.items())


def plain(x, kernel):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), SAME, **NUMBERS)


@pytest.mark.parametrize("function", [as_product, with_product_gradient])
def test_products_are_the_convolution_with_its_gradients(function):
  x, kernel = inputs()
  weights = fill.normal("cotangent", (2, 5, 7, 4), 0)
  run = lambda f: jax.value_and_grad(lambda *a: (f(*a) * weights).sum(), (0, 1))(x, kernel)
  np.testing.assert_allclose(function(x, kernel), plain(x, kernel), rtol=1e-5, atol=1e-5)
  for actual, expected in zip(jax.tree.leaves(run(function)), jax.tree.leaves(run(plain)), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def taken(monkeypatch):
  """Which way each call went."""
  seen = []
  for name in ("as_product", "with_product_gradient"):
    monkeypatch.setattr(cpu_convolution, name, lambda x, kernel, name=name: seen.append(name) or plain(x, kernel))
  return seen


# Positions, channels; the rooms' tiny network has 96 channels at most, SD's deep levels 1280, heads 192 and more.
@pytest.mark.parametrize("side, channels, way", [
  (16, 512, ["as_product"]), (17, 512, []), (16, 511, []),
  (64, 128, ["with_product_gradient"]), (63, 128, []), (64, 127, []),
])  # fmt: skip
def test_the_size_decides(side, channels, way, taken):
  x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, side, side, channels), (3, 3, channels, channels)))
  jax.eval_shape(lambda *a: convolve(*a, (1, 1), SAME, **NUMBERS), x, kernel)
  assert taken == way


def test_accelerators_are_left_to_xla(taken, monkeypatch):
  monkeypatch.setattr(cpu_convolution, "platform", lambda: "tpu")
  x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 8, 8, 1280), (3, 3, 1280, 1280)))
  jax.eval_shape(lambda *a: convolve(*a, (1, 1), SAME, **NUMBERS), x, kernel)
  assert taken == []


@pytest.mark.parametrize(
  "size, strides, padding, rest",
  [
    (1, (1, 1), ((0, 0), (0, 0)), {}),
    (3, (2, 2), SAME, {}),
    (3, (1, 1), ((0, 0), (0, 0)), {}),
    (3, (1, 1), SAME, {"rhs_dilation": (2, 2)}),
    (3, (1, 1), SAME, {"lhs_dilation": (2, 2)}),
  ],
)
def test_other_convolutions_are_xlas(size, strides, padding, rest, taken, monkeypatch):
  monkeypatch.setattr(cpu_convolution, "LARGE", 1)
  x, kernel = inputs(size=size)
  actual = convolve(x, kernel, strides, padding, **rest, **NUMBERS)
  np.testing.assert_array_equal(actual, jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest, **NUMBERS))
  assert taken == []
