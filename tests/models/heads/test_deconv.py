"""The deconvolution head against a restatement, its sizes and its refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, tiny
from tests.helpers.modules import COMMON, grouped
from tests.helpers.restated import convolved
from vpd_jax.models import parameters
from vpd_jax.models.heads.deconv import Deconv
from vpd_jax.types import Features, MapInfo


def made(build):
  """A module with made-up arrays, and these."""
  parts = parameters.describe(build)
  named = tiny.filled(parts.shapes)
  return parts, named


def head(norm_group=0, **options):
  options = {"max_depth": 10.0, "filters": (8, 8, 8), "width": 12} | options
  return lambda: Deconv(MapInfo((16,), (32,)), grouped(norm_group), **options)


def doubled(x):
  """Bilinear to twice the size: quarters of the neighbors, edges repeated."""
  for axis in (1, 2):
    before = np.concatenate([x.take([0], axis), x.take(range(x.shape[axis] - 1), axis)], axis)
    after = np.concatenate([x.take(range(1, x.shape[axis]), axis), x.take([-1], axis)], axis)
    x = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return x


def decoded(named, x, count, doublings):
  """The head's formula in evaluation."""

  def normed(x, name):
    return np.maximum(
      (x - named[f"{name}/mean"]) / np.sqrt(named[f"{name}/var"] + 1e-5) * named[f"{name}/scale"]
      + named[f"{name}/bias"],
      0,
    )

  for i in range(0, 3 * count, 3):
    kernel = np.asarray(named[f"deconv_layers/{i}/kernel"], np.float64)
    blocks = np.einsum("bhwc,ijcd->bhiwjd", x, kernel)  # kernel 2 and stride 2 do not overlap
    x = normed(blocks.reshape(x.shape[0], 2 * x.shape[1], 2 * x.shape[2], -1), f"deconv_layers/{i + 1}")
  layer = lambda name: (named[f"{name}/kernel"], named[f"{name}/bias"])
  x = normed(convolved(x, *layer("conv_layers/0")), "conv_layers/1")
  for _ in range(doublings):
    x = doubled(x)
  x = convolved(np.maximum(convolved(x, *layer("last_layer_depth/0")), 0), *layer("last_layer_depth/2"))
  return 10 / (1 + np.exp(-x[..., 0]))


def evaluated(parts, size):
  """Arrays and one map to depth."""
  return jax.jit(lambda named, x: parts.merge(named)(Features((x,), None, size), training=False)["depth"])


@pytest.mark.parametrize("filters", [(8, 8, 8), (8,), (8, 8, 8, 8, 8)])
def test_deconv_is_its_formula(filters):
  parts, named = made(head(filters=filters))
  x = fill.normal("x", (2, 2, 3, 16), 0)
  depth = evaluated(parts, (64, 96))(named, jnp.asarray(x))
  assert depth.shape == (2, 64, 96) and depth.dtype == jnp.float32
  np.testing.assert_allclose(depth, decoded(named, x, len(filters), 5 - len(filters)), rtol=1e-5)


def test_deconv_crops_to_the_image_from_the_upper_left():
  parts, named = made(head())
  x = jnp.asarray(fill.normal("x", (1, 2, 3, 16), 0))
  whole, cropped = (evaluated(parts, size)(named, x) for size in ((64, 96), (40, 65)))
  np.testing.assert_allclose(cropped, whole[:, :40, :65], rtol=1e-6)


def test_padding_is_cut_before_or_after_the_last_convolutions():
  """Two convolutions of 3 x 3 see two rows beyond the image, or zeros."""
  x = jnp.asarray(fill.normal("x", (1, 2, 3, 16), 0))
  parts, named = made(head())
  after = evaluated(parts, (40, 65))(named, x)
  before = evaluated(made(head(cut_padding="features"))[0], (40, 65))(named, x)
  np.testing.assert_array_equal(before[:, :38, :63], after[:, :38, :63])
  assert (before != after)[:, 39].all() and (before != after)[:, :, 64].all()
  parts, _ = made(head(cut_padding="features"))
  np.testing.assert_array_equal(evaluated(parts, (64, 96))(named, x), evaluated(made(head())[0], (64, 96))(named, x))
  with pytest.raises(
    ValueError, match=r"^head\.cut_padding='map' is unknown; choose one of \('prediction', 'features'"
  ):
    made(head(cut_padding="map"))


def test_depth_is_float32_and_within_its_limit_whatever_the_dtype():
  common = dataclasses.replace(COMMON, dtype=jnp.bfloat16)
  parts, named = made(lambda: Deconv(MapInfo((16,), (32,)), common, max_depth=80.0, filters=(8, 8, 8), width=12))
  named["last_layer_depth/2/bias"] = np.asarray([30.0], np.float32)
  x = jnp.asarray(fill.normal("x", (1, 2, 2, 16), 0), jnp.bfloat16)
  depth = evaluated(parts, (64, 64))(named, x)
  assert depth.dtype == jnp.float32 and depth.max() <= 80.0 and depth.min() > 79.0


def test_every_norm_of_the_head_has_the_group():
  module = parameters.describe(head(norm_group=3)).model
  assert [module.deconv_layers[i].group for i in (1, 4, 7)] + [module.conv_layers[1].group] == [3] * 4


def test_groups_of_a_batch_are_normalized_apart():
  parts, named = made(head(norm_group=2))
  x = jnp.asarray(fill.normal("x", (4, 2, 2, 16), 0))
  run = jax.jit(lambda n, x: parts.merge(n)(Features((x,), None, (64, 64)), training=True)["depth"])
  np.testing.assert_allclose(run(named, x)[:2], run(named, x.at[2:].mul(5.0))[:2], rtol=1e-6)


@pytest.mark.parametrize("strides, filters, most", [((32,), (8,) * 6, 5), ((4,), (8, 8, 8), 2)])
def test_more_doublings_than_the_stride_has_are_refused(strides, filters, most):
  with pytest.raises(ValueError) as error:
    Deconv(MapInfo((16,), strides), COMMON, max_depth=10.0, filters=filters)
  assert str(error.value) == (
    f"head 'deconv' with {len(filters)} filters cannot read a map of stride {strides[0]}; use at most {most} filters."
  )


def test_fresh_kernels_are_narrow():
  """The release's spread of 0.001, so that training starts at half of the largest depth everywhere."""
  parts = parameters.describe(head())
  named = parts.initialize(parts.params) | {n: jnp.ones(parts.shapes[n].shape) for n in parts.stats}
  for name in ("deconv_layers/0", "conv_layers/0", "last_layer_depth/0", "last_layer_depth/2"):
    np.testing.assert_allclose(np.std(named[f"{name}/kernel"]), 0.001, rtol=0.3)
  x = jnp.asarray(fill.normal("x", (1, 2, 2, 16), 0))
  depth = evaluated(parts, (64, 64))(named, x)
  np.testing.assert_allclose(depth, 5.0, atol=1e-3)


def test_transposed_convolutions_may_begin_as_upsampling_to_the_nearest_neighbor():
  parts = parameters.describe(head(init="fan_in_nearest"))
  named = parts.initialize(parts.params)
  for name in ("deconv_layers/0", "deconv_layers/3", "deconv_layers/6"):
    kernel = named[f"{name}/kernel"]  # [2, 2, in, out]
    np.testing.assert_array_equal(kernel, np.broadcast_to(kernel[:1, :1], kernel.shape))
    np.testing.assert_allclose(kernel.std(), (2 / kernel.shape[2]) ** 0.5, rtol=0.3)
  plain = parameters.describe(head(init="fan_in"))
  same = "conv_layers/0/kernel"
  np.testing.assert_array_equal(named[same], plain.initialize([same])[same])
