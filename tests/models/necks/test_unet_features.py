"""The fusion neck against a restatement, its sizes and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, tiny
from tests.helpers.modules import COMMON
from tests.helpers.restated import convolved, group_normed
from vpd_jax.models import parameters
from vpd_jax.models.necks.unet_features import Fusion
from vpd_jax.types import Features, MapInfo

WIDTHS, STRIDES = (16, 32, 16, 48), (8, 16, 32, 64)


def made(build):
  """A module with made-up arrays, and these."""
  parts = parameters.describe(build)
  named = tiny.filled(parts.shapes)
  return parts, named


def fusion():
  return Fusion(MapInfo(WIDTHS, STRIDES), COMMON, width=64)


def features(height, width, image_size, batch=2):
  """Four maps of an image that was padded to height x width."""
  maps = [fill.normal(f"map{s}", (batch, height // s, width // s, w), 0) for s, w in zip(STRIDES, WIDTHS, strict=True)]
  return Features(tuple(map(jnp.asarray, maps)), jnp.zeros((batch, 1, 4)), image_size)


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


@pytest.mark.parametrize("cut, shape", [(True, (2, 3, 4, 64)), (False, (2, 4, 6, 64))])
def test_padding_is_cut_off_or_kept(neck, cut, shape):
  named, _ = neck
  parts = parameters.describe(lambda: Fusion(MapInfo(WIDTHS, STRIDES), COMMON, width=64, cut_padding=cut))
  given = features(128, 192, (70, 100))
  fused = parts.merge(named)(given).maps[0]
  assert fused.shape == shape
  np.testing.assert_allclose(fused, joined(named, given.maps)[:, : shape[1], : shape[2]], rtol=1e-5, atol=1e-5)


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
  module = parameters.describe(fusion).model
  assert (module.map_info.widths, module.map_info.strides) == ((64,), (32,))


def test_fusion_joins_four_maps_and_no_other_number():
  with pytest.raises(ValueError) as error:
    Fusion(MapInfo(WIDTHS[:3], STRIDES[:3]), COMMON, width=64)
  assert str(error.value) == "neck 'fusion' joins four maps, but the method gives 3."
