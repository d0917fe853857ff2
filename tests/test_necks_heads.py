"""The fusion neck and the deconvolution head against restatements, their sizes and their refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.golden import fill
from vpd_jax.models import parameters
from vpd_jax.models.heads.deconv import Deconv
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.necks.unet_features import Fusion
from vpd_jax.types import Features

WIDTHS, STRIDES = (16, 32, 16, 48), (8, 16, 32, 64)
KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def made(build):
  """A module with made-up arrays, and these."""
  parts = parameters.describe(build)
  named = tiny.filled(parts.shapes)
  return parts, named


def fusion():
  return Fusion(WIDTHS, STRIDES, frame="padded", width=64, **KINDS, rngs=nnx.Rngs(0))


def head(**options):
  options = {"max_depth": 10.0, "filters": (8, 8, 8), "width": 12} | options
  return lambda: Deconv((16,), (32,), **options, **KINDS, rngs=InitKeys(0))


def features(height, width, image_size, batch=2):
  """Four maps of an image that was padded to height x width."""
  maps = [fill.normal(f"map{s}", (batch, height // s, width // s, w), 0) for s, w in zip(STRIDES, WIDTHS, strict=True)]
  return Features(tuple(map(jnp.asarray, maps)), jnp.zeros((batch, 1, 4)), image_size)


def convolved(x, kernel, bias, stride=1):
  """A convolution with padding (size - 1) // 2, in float64."""
  size = kernel.shape[0]
  pad = (size - 1) // 2
  x = np.pad(np.asarray(x, np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
  out = np.zeros((x.shape[0], rows, columns, kernel.shape[3])) + bias
  for a, b in np.ndindex(size, size):
    out += x[:, a : a + stride * rows : stride, b : b + stride * columns : stride][:, :rows, :columns] @ kernel[a, b]
  return out


def group_normed(x, scale, bias, groups=16):
  parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
  mean, var = (f(axis=(1, 3), keepdims=True) for f in (parts.mean, parts.var))
  return ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias


def joined(named, maps):
  """The neck's formula, layer by layer."""
  layer = lambda name: (named[f"{name}/kernel"], named[f"{name}/bias"])
  x = convolved(maps[0], *layer("layer1/0"), stride=2)
  x = np.maximum(group_normed(x, named["layer1/1/scale"], named["layer1/1/bias"]), 0)
  finest = convolved(x, *layer("layer1/3"), stride=2)
  fine = convolved(maps[1], *layer("layer2/0"), stride=2)
  doubled = np.asarray(maps[3]).repeat(2, axis=1).repeat(2, axis=2)
  x = convolved(np.concatenate([finest, fine, maps[2], doubled], axis=-1), *layer("out_layer/0"))
  return np.maximum(group_normed(x, named["out_layer/1/scale"], named["out_layer/1/bias"]), 0)


@pytest.fixture(scope="module")
def neck():
  parts, named = made(fusion)
  return named, lambda f: parts.merge(named)(f)


def test_fusion_is_its_formula(neck):
  named, run = neck
  given = features(128, 192, (128, 192))
  fused = run(given)
  assert len(fused.maps) == 1 and fused.maps[0].shape == (2, 4, 6, 64)
  np.testing.assert_allclose(fused.maps[0], joined(named, given.maps), rtol=1e-5, atol=1e-5)
  assert fused.context is given.context and fused.image_size == given.image_size


@pytest.mark.parametrize("padded, image_size, expected", [
  ((512, 512), (480, 480), (15, 15)), ((384, 384), (352, 352), (11, 11)), ((512, 512), (512, 512), (16, 16)),
  ((512, 640), (488, 640), (16, 20)), ((512, 640), (480, 640), (15, 20)), ((64, 64), (1, 33), (1, 2)),
])  # fmt: skip
def test_fusion_keeps_what_shows_the_image(neck, padded, image_size, expected):
  shapes = jax.eval_shape(
    lambda maps: neck[1](Features(maps, None, image_size)).maps, features(*padded, image_size).maps
  )
  assert shapes[0].shape == (2, *expected, 64)


def test_the_crop_comes_after_everything_else(neck):
  whole, cropped = (neck[1](features(128, 128, size)).maps[0] for size in ((128, 128), (96, 100)))
  np.testing.assert_array_equal(cropped, whole[:, :3])


def test_fusion_states_what_it_gives(neck):
  module = nnx.eval_shape(fusion)
  assert (module.widths, module.strides) == ((64,), (32,))


def test_fusion_joins_four_maps_and_no_other_number():
  with pytest.raises(ValueError) as error:
    Fusion(WIDTHS[:3], STRIDES[:3], frame="padded", width=64, **KINDS, rngs=nnx.Rngs(0))
  assert str(error.value) == "neck 'fusion' joins four maps, but the method gives 3."


def doubled(x):
  """Bilinear to twice the size: quarters of the neighbours, edges repeated."""
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


def test_depth_is_float32_and_within_its_limit_whatever_the_dtype():
  kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
  parts, named = made(
    lambda: Deconv((16,), (32,), max_depth=80.0, filters=(8, 8, 8), width=12, **kinds, rngs=nnx.Rngs(0))
  )
  named["last_layer_depth/2/bias"] = np.asarray([30.0], np.float32)
  x = jnp.asarray(fill.normal("x", (1, 2, 2, 16), 0), jnp.bfloat16)
  depth = evaluated(parts, (64, 64))(named, x)
  assert depth.dtype == jnp.float32 and depth.max() <= 80.0 and depth.min() > 79.0


def test_every_norm_of_the_head_has_the_group():
  module = parameters.describe(head(norm_group=3)).model
  assert [module.deconv_layers[i].group for i in (1, 4, 7)] + [module.conv_layers[1].group] == [3] * 4


def test_groups_of_a_batch_are_normalised_apart():
  parts, named = made(head(norm_group=2))
  x = jnp.asarray(fill.normal("x", (4, 2, 2, 16), 0))
  run = jax.jit(lambda n, x: parts.merge(n)(Features((x,), None, (64, 64)), training=True)["depth"])
  np.testing.assert_allclose(run(named, x)[:2], run(named, x.at[2:].mul(5.0))[:2], rtol=1e-6)


@pytest.mark.parametrize("strides, filters, most", [((32,), (8,) * 6, 5), ((4,), (8, 8, 8), 2)])
def test_more_doublings_than_the_stride_has_are_refused(strides, filters, most):
  with pytest.raises(ValueError) as error:
    Deconv((16,), strides, max_depth=10.0, filters=filters, **KINDS, rngs=nnx.Rngs(0))
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
