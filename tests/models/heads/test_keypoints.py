"""Heads of keypoints: sizes, PyTorch's formulas, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle, tiny
from tests.helpers.modules import COMMON
from vpd_jax.models import parameters
from vpd_jax.models.backbones import layers
from vpd_jax.models.heads import keypoints
from vpd_jax.types import Features, MapInfo

HEADS = {
  "fused": (keypoints.FusedHead, {"width": 16}),
  "simple": (keypoints.ViTPoseSimpleHead, {}),
  "classic": (keypoints.DeconvHead, {"width": 16}),
  "direct": (keypoints.IdentityHead, {}),
}
PROMPTS = (17,) * 4, (4, 8, 16, 32)  # widths and strides after the einsum neck
MAPS = (32, 64, 128, 128), (8, 16, 32, 64)  # of the UNet itself


def made(name, widths, strides, map_extent="padded", **options):
  build, own = HEADS[name]
  options = {"keypoints": 17} | own | options
  maps = MapInfo(widths, strides, map_extent=map_extent)
  return parameters.describe(lambda: build(maps, COMMON, **options))


def features(widths, strides, size, shown, batch=2):
  """Maps of an image of `size` that the method shows as one of `shown`."""
  maps = [
    fill.normal(f"map{s}", (batch, -(-shown[0] // s), -(-shown[1] // s), w), 0)
    for s, w in zip(strides, widths, strict=True)
  ]
  return Features(tuple(map(jnp.asarray, maps)), jnp.zeros((batch, 1, 4)), size)


@pytest.mark.parametrize("size, shown, map_extent", [
  ((256, 192), (256, 192), "padded"),
  ((384, 288), (384, 320), "padded"),  # VPD and IEDP pad to multiples of 64
  ((384, 288), (384, 288), "resized"),  # MetaPrompts keeps the image; the coarse maps show a little more
  ((1024, 768), (1024, 768), "resized"),
])  # fmt: skip
@pytest.mark.parametrize("name, maps", [
  *((name, PROMPTS) for name in HEADS), *((name, MAPS) for name in ("fused", "simple", "classic"))
])  # fmt: skip
def test_heatmaps_have_a_quarter_of_the_sides(name, maps, size, shown, map_extent):
  widths, strides = maps
  parts = made(name, widths, strides, map_extent=map_extent)
  given = features(widths, strides, size, shown, batch=1)
  named = tiny.filled(parts.shapes)
  shapes = jax.eval_shape(lambda maps: parts.merge(named)(given._replace(maps=maps), training=False), given.maps)
  assert {key: x.shape for key, x in shapes.items()} == {"heatmaps": (1, size[0] // 4, size[1] // 4, 17)}


def test_padding_is_cut_off_and_a_resized_image_stretched():
  x = jnp.asarray(fill.normal("x", (1, 96, 80, 3), 0))
  given = Features((), None, (384, 288))
  np.testing.assert_array_equal(keypoints.to_heatmaps(x, given, "padded")["heatmaps"], x[:, :, :72])
  expected = layers.resize(x, (96, 72))
  np.testing.assert_array_equal(keypoints.to_heatmaps(x, given, "resized")["heatmaps"], expected)


def test_direct_is_the_finest_map():
  given = features(*PROMPTS, (64, 48), (64, 48))
  parts = made("direct", *PROMPTS)
  assert not parts.shapes
  np.testing.assert_array_equal(parts.merge({})(given, training=False)["heatmaps"], given.maps[0])


def test_heatmaps_are_float32_whatever_the_dtype():
  common = dataclasses.replace(COMMON, dtype=jnp.bfloat16)
  build = lambda: keypoints.ViTPoseSimpleHead(MapInfo(*MAPS), common, keypoints=17)
  parts = parameters.describe(build)
  given = features(*MAPS, (64, 48), (64, 64))
  out = parts.merge(tiny.filled(parts.shapes))(given, training=False)["heatmaps"]
  assert out.dtype == jnp.float32 and out.shape == (2, 16, 12, 17)


def test_statistics_move_in_training_only():
  given = features(*MAPS, (64, 64), (64, 64))
  for name in ("fused", "classic"):
    parts = made(name, *MAPS)
    named = {key: jnp.asarray(x) for key, x in tiny.filled(parts.shapes).items()}
    for training in (False, True):
      model = parts.merge(named)
      model(given, training=training)
      moved = [
        bool((np.asarray(value) != np.asarray(named[key])).any()) for key, value in parameters.stats(model).items()
      ]
      assert moved and all(moved) == training and any(moved) == training


def test_both_starts_are_as_named():
  build = lambda init: keypoints.DeconvHead(MapInfo(*MAPS), COMMON, keypoints=17, width=16, init=init)
  name = "deconv_layers/0/kernel"
  fresh = {
    init: parameters.describe(lambda init=init: build(init)).initialize([name]) for init in ("released", "fan_in")
  }
  spread = {init: float(np.std(values[name])) for init, values in fresh.items()}
  assert abs(spread["released"] - 0.001) < 1e-4
  np.testing.assert_allclose(spread["fan_in"], (2 / (16 * 64)) ** 0.5, rtol=0.05)


@pytest.mark.reference
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["fused", "simple", "classic"])
def test_heads_are_pytorchs(name, training):
  """Every formula restated with torch.nn.functional."""
  import torch
  import torch.nn.functional as F

  parts = made(name, *MAPS)
  named = tiny.filled(parts.shapes)
  given = features(*MAPS, (128, 96), (128, 128))
  model = parts.merge({key: jnp.asarray(x) for key, x in named.items()})
  found = model(given, training=training)["heatmaps"]
  t = {k: torch.tensor(v.transpose(3, 2, 0, 1).copy() if v.ndim == 4 else v.copy()) for k, v in named.items()}
  maps = [torch.tensor(oracle.nchw(x).copy()) for x in given.maps]
  up = lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=False)

  def norm(at, x):
    bn = (t[f"{at}/{n}"] for n in ("mean", "var", "scale", "bias"))
    return F.relu(F.batch_norm(x, *bn, training=training, momentum=0.1, eps=1e-5))

  if name == "simple":
    x = up(F.relu(maps[0]), (32, 32))
    x = F.conv2d(x, t["final_layer/kernel"], t["final_layer/bias"], padding=1)
  else:
    if name == "fused":
      x = norm("bn", F.conv2d(torch.cat([up(m, (32, 32)) for m in maps], 1), t["conv/kernel"], padding=1))
    else:
      x = maps[1]
      for i in (0, 3):
        kernel = torch.tensor(named[f"deconv_layers/{i}/kernel"].transpose(2, 3, 0, 1).copy())
        x = norm(f"deconv_layers/{i + 1}", F.conv_transpose2d(x, kernel, stride=2, padding=1))
    x = F.conv2d(x, t["final_layer/kernel"], t["final_layer/bias"])
  expected = x[..., :24].numpy()
  np.testing.assert_allclose(oracle.nchw(found), expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name, strides, options, message", [
  ("fused", PROMPTS[1], {"map_extent": "cut"}, r"^map_extent='cut' is unknown"),
  ("fused", PROMPTS[1], {"init": "zero"}, r"^head\.init='zero' is unknown; choose one of \['fan_in', 'released'\]"),
  ("simple", PROMPTS[1], {"stride": 64}, r"^head\.stride=64 of head 'simple' must be one of .* \(4, 8, 16, 32\)"),
  ("classic", (4, 12, 24, 48), {"stride": 12}, r"^head\.stride=12 of head 'classic' must be 4 times a power of two"),
  ("direct", PROMPTS[1], {"keypoints": 3}, r"^head 'direct' takes the 17 channels .* set method\.prompts=3"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(name, strides, options, message):
  with pytest.raises(ValueError, match=message):
    made(name, PROMPTS[0], strides, **options)
