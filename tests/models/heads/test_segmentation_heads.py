"""FPN, UPerNet and the auxiliary FCN head: the authors' taps, PyTorch's formulas, sizes and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle, tiny
from tests.helpers.modules import COMMON
from vpd_jax.models import parameters
from vpd_jax.models.backbones import layers
from vpd_jax.models.heads.fpn import Fpn, SemanticFpn
from vpd_jax.models.heads.upernet import UperNet
from vpd_jax.types import Features, MapInfo

FPN_WIDTHS, FPN_STRIDES = (32, 32 * 2 + 150, 32 * 4 + 150, 128), (8, 16, 32, 64)
UPER_WIDTHS, UPER_STRIDES = (150,) * 4, (4, 8, 16, 32)


def fpn_neck():
  return Fpn(MapInfo(FPN_WIDTHS, FPN_STRIDES), COMMON, width=32)


def fpn_head(map_extent="padded", **options):
  options = {"classes": 150, "width": 32} | options
  return SemanticFpn(MapInfo((32,) * 4, FPN_STRIDES, map_extent=map_extent), COMMON, **options)


def upernet(map_extent="resized", **options):
  options = {"classes": 19, "width": 32} | options
  return UperNet(MapInfo(UPER_WIDTHS, UPER_STRIDES, map_extent=map_extent), COMMON, **options)


def authors(build, prefixes=("",)):
  """The module with the weights the authors' names give, which its own names are up to their last word."""
  parts = parameters.describe(build)
  words = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

  def source(name, shape):
    *path, last = name.split("/")
    full = ".".join((*prefixes, *path, words.get(last, last))).lstrip(".")
    shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape
    array = fill.weight(full, shape, 0)
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array

  return parts.merge({name: jnp.asarray(source(name, s.shape)) for name, s in parts.shapes.items()})


def nhwc(array):
  return jnp.asarray(array.transpose(0, 2, 3, 1))


def features(widths, strides, size, batch=2):
  maps = [
    fill.normal(f"map{s}", (batch, -(-size[0] // s), -(-size[1] // s), w), 0)
    for s, w in zip(strides, widths, strict=True)
  ]
  return Features(tuple(map(jnp.asarray, maps)), jnp.zeros((batch, 1, 4)), size)


@pytest.fixture(scope="module")
def vpd():
  return oracle.golden("vpd_seg.heads.npz")


@pytest.fixture(scope="module")
def meta():
  return oracle.golden("meta_seg_cityscapes.heads.npz")


def test_the_pyramid_is_the_authors(vpd):
  """From the authors' lateral maps on, where these are stored whole; the coarsest from the features themselves."""
  neck = authors(fpn_neck, ("neck",))
  lateral = neck.lateral_convs[3](nhwc(vpd["output/extract_feat.3"]))
  oracle.compare(oracle.nchw(lateral), vpd, "tap/neck.lateral_convs.3", 1e-5)
  neck.lateral_convs = [lambda x: x] * 4
  maps = [nhwc(vpd[f"tap/neck.lateral_convs.{i}"]) for i in (1, 2, 3)]
  out = neck(Features((jnp.zeros((2, 16, 16, 32)), *maps), None, (128, 128)))
  for i in (1, 2, 3):
    oracle.compare(oracle.nchw(out.maps[i]), vpd, f"tap/neck.fpn_convs.{i}", 1e-5)
  assert out.maps[0].shape == (2, 16, 16, 32)


def test_the_levels_of_the_fpn_head_are_the_authors(vpd):
  head = authors(fpn_head)
  for i in (1, 2, 3):
    x = nhwc(vpd[f"tap/neck.fpn_convs.{i}"])
    for step in head.decode_head.scale_heads[i]:
      x = step(x, training=False) if hasattr(step, "bn") else step(x)
    oracle.compare(oracle.nchw(x), vpd, f"tap/decode_head.scale_heads.{i}", 1e-5)


def test_the_pooled_pyramid_of_upernet_is_the_authors(meta):
  head = authors(upernet).decode_head
  x = nhwc(meta["output/extract_feat.3"])
  for i, (pool, conv) in enumerate(head.psp_modules):
    oracle.compare(oracle.nchw(conv(pool(x), training=False)), meta, f"tap/decode_head.psp_modules.{i}", 5e-5)
  pooled = head.pooled(x, training=False)
  oracle.compare(oracle.nchw(pooled), meta, "tap/decode_head.bottleneck", 5e-5)
  lateral = nhwc(meta["tap/decode_head.lateral_convs.2"])
  joined = lateral + layers.resize(pooled, lateral.shape[1:3])
  oracle.compare(oracle.nchw(head.fpn_convs[2](joined, training=False)), meta, "tap/decode_head.fpn_convs.2", 5e-5)


def test_names_are_the_authors():
  for setup, builds in {
    "vpd_seg": {"neck.": fpn_neck, "": fpn_head},
    "meta_seg_cityscapes": {"": upernet},
  }.items():
    wanted = {name: tuple(shape) for name, shape in oracle.golden(f"{setup}.heads.npz").items() if name[:6] == "shape/"}
    wanted = {name[6:]: tuple(int(n) for n in shape) for name, shape in wanted.items()}
    words = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    ours = {}
    for prefix, build in builds.items():
      for name, s in parameters.describe(build).shapes.items():
        *path, last = name.split("/")
        shape = (s.shape[3], s.shape[2], *s.shape[:2]) if len(s.shape) == 4 else s.shape
        ours[prefix + ".".join((*path, words.get(last, last)))] = shape
    assert ours == wanted


def test_auxiliary_scores_leave_out_the_padding_of_padded_maps():
  """As the main scores: an image of 72 x 104, padded to 96 x 128."""
  outputs = {}
  for extent in ("padded", "resized"):
    parts = parameters.describe(lambda extent=extent: upernet(extent))
    model = parts.merge({name: jnp.asarray(x) for name, x in tiny.filled(parts.shapes).items()})
    given = features(UPER_WIDTHS, UPER_STRIDES, (96, 128))
    outputs[extent] = model(given._replace(image_size=(72, 104)), training=True)
  aux = outputs["resized"]["aux_logits"]
  assert aux.shape == (2, 6, 8, 19) and outputs["padded"]["aux_logits"].shape == (2, 72, 104, 19)
  expected = layers.resize(aux, (96, 128))[:, :72, :104]
  np.testing.assert_allclose(outputs["padded"]["aux_logits"], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.reference
@pytest.mark.parametrize("training", [False, True])
def test_upernet_is_pytorchs(training):
  """Every formula restated with torch.nn.functional, on odd sizes, with running statistics after training."""
  import torch
  import torch.nn.functional as F

  parts = parameters.describe(lambda: upernet())
  named = tiny.filled(parts.shapes)
  given = features(UPER_WIDTHS, UPER_STRIDES, (72, 104))
  model = parts.merge({name: jnp.asarray(x) for name, x in named.items()})  # statistics move in place in numpy arrays
  outputs = model(given, training=training)
  t = {k: torch.tensor(v.transpose(3, 2, 0, 1).copy() if v.ndim == 4 else v.copy()) for k, v in named.items()}
  maps = [torch.tensor(oracle.nchw(x).copy()) for x in given.maps]

  def block(name, x):
    pad = t[f"{name}/conv/kernel"].shape[2] // 2
    x = F.conv2d(x, t[f"{name}/conv/kernel"], padding=pad)
    bn = (t[f"{name}/bn/{n}"] for n in ("mean", "var", "scale", "bias"))
    return F.relu(F.batch_norm(x, *bn, training=training, momentum=0.1, eps=1e-5))

  def up(x, like):
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

  d = "decode_head"
  laterals = [block(f"{d}/lateral_convs/{i}", maps[i]) for i in range(3)]
  pooled = [block(f"{d}/psp_modules/{i}/1", F.adaptive_avg_pool2d(maps[3], s)) for i, s in enumerate((1, 2, 3, 6))]
  laterals.append(block(f"{d}/bottleneck", torch.cat([maps[3], *(up(x, maps[3]) for x in pooled)], 1)))
  for i in (3, 2, 1):
    laterals[i - 1] = laterals[i - 1] + up(laterals[i], laterals[i - 1])
  levels = [*(block(f"{d}/fpn_convs/{i}", laterals[i]) for i in range(3)), laterals[3]]
  x = block(f"{d}/fpn_bottleneck", torch.cat([up(level, levels[0]) for level in levels], 1))
  seg = lambda name, x: F.conv2d(x, t[f"{name}/conv_seg/kernel"], t[f"{name}/conv_seg/bias"])
  logits = F.interpolate(seg(d, x), size=(72, 104), mode="bilinear", align_corners=False)
  aux = seg("auxiliary_head", block("auxiliary_head/convs/0", maps[2]))
  for name, expected in (("logits", logits), ("aux_logits", aux)):
    expected = expected.numpy()
    np.testing.assert_allclose(oracle.nchw(outputs[name]), expected, rtol=0, atol=3e-5 * np.abs(expected).max())
  for name, value in parameters.stats(model).items():
    np.testing.assert_allclose(value, t[name], rtol=1e-4, atol=1e-5, err_msg=name)  # torch moved its own in place


@pytest.mark.reference
def test_the_fpn_and_its_head_are_pytorchs():
  """On sides that the strides do not divide."""
  import torch
  import torch.nn.functional as F

  given = features(FPN_WIDTHS, FPN_STRIDES, (72, 104))
  results, t = given, {}
  for prefix, build in (("", fpn_neck), ("", fpn_head)):
    parts = parameters.describe(build)
    named = tiny.filled(parts.shapes)
    model = parts.merge(named)
    results = model(results) if build is fpn_neck else model.decode_head(results.maps, training=False)
    t |= {
      prefix + k: torch.tensor(v.transpose(3, 2, 0, 1).copy() if v.ndim == 4 else v.copy()) for k, v in named.items()
    }
  maps = [torch.tensor(oracle.nchw(x).copy()) for x in given.maps]
  conv = lambda name, x: F.conv2d(x, t[f"{name}/conv/kernel"], t[f"{name}/conv/bias"], padding="same")
  laterals = [conv(f"lateral_convs/{i}", x) for i, x in enumerate(maps)]
  for i in (3, 2, 1):
    laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:], mode="nearest")
  total = 0
  for i, x in enumerate(laterals):
    x = conv(f"fpn_convs/{i}", x)
    for j in range(max(i, 1)):
      name = f"decode_head/scale_heads/{i}/{2 * j}"
      x = F.conv2d(x, t[f"{name}/conv/kernel"], padding=1)
      x = F.relu(F.batch_norm(x, *(t[f"{name}/bn/{n}"] for n in ("mean", "var", "scale", "bias")), eps=1e-5))
      x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if i else x
    total = total + (F.interpolate(x, size=laterals[0].shape[2:], mode="bilinear", align_corners=False) if i else x)
  expected = F.conv2d(total, t["decode_head/conv_seg/kernel"], t["decode_head/conv_seg/bias"]).numpy()
  np.testing.assert_allclose(oracle.nchw(results), expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", [3, 6])
def test_bins_of_adaptive_pooling_overlap(size):
  x = np.asarray(fill.normal("pool", (1, 4, 16, 2), 0))
  bins = lambda n: [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
  expected = [[x[0, a:b, c:d].mean((0, 1)) for c, d in bins(16)] for a, b in bins(4)]
  np.testing.assert_allclose(layers.adaptive_avg_pool(jnp.asarray(x), size)[0], expected, rtol=1e-5, atol=1e-6)


def test_scores_of_a_padded_image_are_cut_and_those_of_an_image_stretched():
  given = features((32,) * 4, FPN_STRIDES, (128, 128))._replace(image_size=(100, 72))
  parts = parameters.describe(fpn_head)
  named = tiny.filled(parts.shapes)
  model = parts.merge(named)
  scores = model.decode_head(given.maps, training=False)
  whole = layers.resize(scores, (128, 128))
  cut = model(given, training=False)["logits"]
  np.testing.assert_array_equal(cut, whole[:, :100, :72])
  shown = parameters.describe(lambda: fpn_head(map_extent="resized")).merge(named)(given, training=False)["logits"]
  np.testing.assert_array_equal(shown, layers.resize(scores, (100, 72)))


def test_dropout_drops_whole_channels_before_the_classifier_in_training_only():
  x = jnp.ones((4, 3, 5, 200))
  dropped = np.asarray(layers.drop_channels(x, 0.25, jax.random.key(0)))
  np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:, :1, :1], dropped.shape))
  assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
  assert abs((dropped == 0).mean() - 0.25) < 0.05
  given = features(UPER_WIDTHS, UPER_STRIDES, (64, 64))
  parts = parameters.describe(lambda: upernet(dropout=0.5))
  named = tiny.filled(parts.shapes)
  run = lambda **options: parts.merge(named)(given, **options)["logits"]
  first, second = (run(training=True, key=jax.random.key(i)) for i in (0, 1))
  assert np.abs(np.asarray(first - second)).max() > 1e-3
  np.testing.assert_array_equal(first, run(training=True, key=jax.random.key(0)))
  np.testing.assert_array_equal(run(training=False), run(training=False, key=jax.random.key(0)))
  with pytest.raises(ValueError, match=r"^head\.dropout=0\.5 needs a random key in training"):
    run(training=True)


def test_the_auxiliary_head_can_be_left_out():
  parts = parameters.describe(lambda: upernet(auxiliary_width=0))
  assert not [name for name in parts.shapes if "auxiliary" in name]
  given = features(UPER_WIDTHS, UPER_STRIDES, (64, 64))
  shapes = jax.eval_shape(lambda maps: parts.merge(tiny.filled(parts.shapes))(
    given._replace(maps=maps), training=False), given.maps)  # fmt: skip
  assert {name: x.shape for name, x in shapes.items()} == {"logits": (2, 64, 64, 19)}


@pytest.mark.parametrize("build, message", [
  (lambda: fpn_head(dropout=1.0), r"^head\.dropout=1\.0 must be at least 0 and below 1"),
  (lambda: upernet(map_extent="all"), r"^map_extent='all' is unknown; choose one of \('padded', 'resized'\)"),
  (lambda: upernet(auxiliary_map=4), r"^head\.auxiliary_map=4 must be the number of one of 4 maps"),
  (lambda: SemanticFpn(MapInfo((8, 8), (8, 24)), COMMON, classes=3), r"^head 'fpn' doubles every map"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    parameters.describe(build)
