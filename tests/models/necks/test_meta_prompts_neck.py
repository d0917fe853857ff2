"""MetaPrompts' depth neck against a restatement, and what the head makes of maps smaller than the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, tiny
from tests.helpers.modules import COMMON, grouped
from tests.helpers.restated import bilinear, convolved, group_normed
from vpd_jax.models import parameters
from vpd_jax.models.heads.deconv import Deconv
from vpd_jax.models.necks.unet_features import Einsum, Fusion
from vpd_jax.types import Features, MapInfo

WIDTHS, STRIDES, PROMPTS, WIDTH = (16, 32, 16, 48), (8, 16, 32, 64), 5, 32


def neck(norm_group=0, **options):
  maps = MapInfo(WIDTHS, STRIDES, (PROMPTS, WIDTH), "resized")
  return lambda: Einsum(maps, grouped(norm_group), **{"inner": 8} | options)


def features(height, width, image_size, batch=2):
  """Four maps of an image that was resized to height x width, and prompts."""
  maps = [fill.normal(f"map{s}", (batch, height // s, width // s, w), 0) for s, w in zip(STRIDES, WIDTHS, strict=True)]
  prompts = fill.normal("prompts", (batch, PROMPTS, WIDTH), 0)
  return Features(tuple(map(jnp.asarray, maps)), jnp.asarray(prompts), image_size)


@pytest.fixture(scope="module")
def made():
  parts = parameters.describe(neck())
  named = tiny.filled(parts.shapes)
  return parts, named


def transposed(x, kernel):
  """Kernel 4, stride 2, padding 1: out[2 i + a - 1] += x[i] @ kernel[a], in float64."""
  b, h, w, _ = x.shape
  out = np.zeros((b, 2 * h + 2, 2 * w + 2, kernel.shape[3]))
  for i, j in np.ndindex(4, 4):
    out[:, i : i + 2 * h : 2, j : j + 2 * w : 2] += np.asarray(x, np.float64) @ kernel[i, j]
  return out[:, 1:-1, 1:-1]


def restated(named, given):
  """The neck's formula in evaluation, before the last resizing."""

  def normed(x, name):
    x = (x - named[f"{name}/mean"]) / np.sqrt(named[f"{name}/var"] + 1e-5)
    return np.maximum(x * named[f"{name}/scale"] + named[f"{name}/bias"], 0)

  layer = lambda name: (named[f"{name}/kernel"], named[f"{name}/bias"])
  grouped = lambda x, name: np.maximum(group_normed(x, named[f"{name}/scale"], named[f"{name}/bias"]), 0)
  joined = [grouped(convolved(given.maps[0], *layer("layer1/0")), "layer1/1")]
  for doublings in (1, 2, 3):
    x, name = given.maps[doublings], f"layer{doublings + 1}"
    for i in range(0, 3 * doublings, 3):
      x = normed(transposed(x, named[f"{name}/deconv_layers/{i}/kernel"]), f"{name}/deconv_layers/{i + 1}")
    joined.append(normed(convolved(x, *layer(f"{name}/conv_layers/0")), f"{name}/conv_layers/1"))
  x = grouped(convolved(np.concatenate(joined, axis=-1), *layer("out_layer/0")), "out_layer/1")
  return np.einsum("bhwc,bnc->bhwn", x, np.asarray(given.context, np.float64))


def test_einsum_is_its_formula(made):
  parts, named = made
  given = features(64, 128, (40, 100))
  out = jax.jit(lambda n, m, c: parts.merge(n)(Features(m, c, (40, 100)), training=False).maps[0])(
    named, given.maps, given.context
  )
  expected = bilinear(jnp.asarray(restated(named, given), jnp.float32), (5, 12))
  assert out.shape == (2, 5, 12, PROMPTS)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_einsum_states_what_it_gives_and_takes_groups_for_its_norms():
  module = parameters.describe(neck(norm_group=3)).model
  assert (module.map_info.widths, module.map_info.strides) == ((PROMPTS,), (8,))
  norms = [layer for name in ("layer2", "layer3", "layer4") for part in ("deconv_layers", "conv_layers")
           for layer in getattr(getattr(module, name), part) if hasattr(layer, "group")]  # fmt: skip
  assert [norm.group for norm in norms] == [3] * 9


def test_fresh_kernels_are_the_releases():
  wanted = ["layer1/0/kernel", "layer2/deconv_layers/0/kernel", "layer4/conv_layers/0/kernel", "out_layer/0/kernel"]
  fresh = parameters.describe(neck()).initialize(wanted)
  # PyTorch's default of a transposed convolution: uniform up to 1 / sqrt(outputs x 16).
  bound = 1 / np.sqrt(8 * 16)
  deconv = np.asarray(fresh.pop("layer2/deconv_layers/0/kernel"))
  assert np.abs(deconv).max() <= bound and np.abs(deconv).max() > 0.95 * bound
  for kernel in fresh.values():
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.1)


def test_maps_of_another_frame_are_refused():
  with pytest.raises(ValueError, match=r"^neck 'einsum' shows a resized image, but the method's is padded; use neck"):
    Einsum(MapInfo(WIDTHS, STRIDES, (5, 32), "padded"), COMMON)
  with pytest.raises(ValueError, match=r"^neck 'fusion' cuts padding off, but the method's image is resized; use neck"):
    Fusion(MapInfo(WIDTHS, STRIDES, (5, 32), "resized"), COMMON)


@pytest.mark.parametrize("widths, strides, message", [
  ((16, 16, 16), (8, 16, 32), "neck 'einsum' joins four maps, but the method gives 3."),
  ((16,) * 4, (4, 8, 16, 64), "neck 'einsum' joins maps whose strides double, but the method's are (4, 8, 16, 64)."),
])  # fmt: skip
def test_other_maps_are_refused(widths, strides, message):
  with pytest.raises(ValueError) as error:
    Einsum(MapInfo(widths, strides, (5, 32), "resized"), COMMON)
  assert str(error.value) == message


def test_a_map_that_ends_before_the_image_is_stretched_to_it():
  """20 rows of stride 8 round down to 2 cells, which show all 20: 16 rows become 20."""
  build = lambda: Deconv(MapInfo((4,), (8,)), COMMON, max_depth=10.0, filters=(8, 8, 8), width=12)
  parts = parameters.describe(build)
  named = tiny.filled(parts.shapes)
  x = jnp.asarray(fill.normal("x", (1, 2, 3, 4), 0))
  run = lambda size: jax.jit(lambda n, x: parts.merge(n)(Features((x,), None, size), training=False)["depth"])(named, x)
  whole, stretched = run((16, 24)), run((20, 24))
  logits = lambda depth: np.log(depth / (10 - depth))[..., None]
  assert stretched.shape == (1, 20, 24)
  np.testing.assert_allclose(logits(stretched), bilinear(jnp.asarray(logits(whole)), (20, 24)), atol=1e-4)
