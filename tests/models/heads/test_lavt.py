"""LAVT's decoder: PyTorch's formulas, corners kept, sizes and refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle, tiny
from tests.helpers.modules import COMMON
from vpd_jax.models import parameters
from vpd_jax.models.heads import lavt
from vpd_jax.types import Features, MapInfo

WIDTHS, STRIDES = (4, 10, 14, 8), (8, 16, 32, 64)


def head(map_extent="padded", **options):
  return lavt.Lavt(MapInfo(WIDTHS, STRIDES, map_extent=map_extent), COMMON, **{"width": 6} | options)


def features(size, batch=2):
  maps = [fill.normal(f"map{s}", (batch, -(-size[0] // s), -(-size[1] // s), w), 0)
          for s, w in zip(STRIDES, WIDTHS, strict=True)]  # fmt: skip
  return Features(tuple(map(jnp.asarray, maps)), jnp.zeros((batch, 1, 4)), size)


@pytest.mark.reference
@pytest.mark.parametrize("old, new", [((4, 4), (8, 8)), ((3, 5), (7, 4)), ((1, 6), (5, 6)), ((5, 2), (1, 3))])
def test_resizing_keeps_corners_as_pytorch(old, new):
  import torch
  import torch.nn.functional as F

  x = fill.normal("resize", (2, *old, 3), 0)
  expected = F.interpolate(torch.tensor(oracle.nchw(x).copy()), size=new, mode="bilinear", align_corners=True).numpy()
  np.testing.assert_allclose(oracle.nchw(lavt.resize_corners(jnp.asarray(x), new)), expected, atol=1e-6)


def test_resizing_is_linear_between_the_corners():
  x = jnp.asarray([[[[0.0], [3.0]], [[6.0], [9.0]]]])
  np.testing.assert_allclose(lavt.resize_corners(x, (3, 4))[0, ..., 0],
                             [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]], atol=1e-6)  # fmt: skip
  assert lavt.resize_corners(x.astype(jnp.bfloat16), (3, 4)).dtype == jnp.bfloat16


@pytest.mark.reference
def test_the_decoder_is_pytorchs():
  """Restated with torch.nn.functional, in training, on sides that the strides do not divide."""
  import torch
  import torch.nn.functional as F

  given, parts = features((72, 104)), parameters.describe(lambda: head(map_extent="resized"))
  named = tiny.filled(parts.shapes)
  model = parts.merge({name: jnp.asarray(x) for name, x in named.items()})
  logits = model(given, training=True)["logits"]
  t = {k: torch.tensor(v.transpose(3, 2, 0, 1).copy() if v.ndim == 4 else v.copy()) for k, v in named.items()}
  c1, c2, c3, x = (torch.tensor(oracle.nchw(m).copy()) for m in given.maps)
  up = lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=True)
  for level, finer in ((4, c3), (3, c2), (2, c1)):
    x = torch.cat([up(x, finer.shape[2:]), finer], 1)
    for part in (1, 2):
      norm = [t[f"bn{part}_{level}/{name}"] for name in ("mean", "var", "scale", "bias")]
      x = F.conv2d(x, t[f"conv{part}_{level}/kernel"], padding=1)
      x = F.relu(F.batch_norm(x, *norm, training=True, momentum=0.1, eps=1e-5))
  expected = up(F.conv2d(x, t["conv1_1/kernel"], t["conv1_1/bias"]), (72, 104)).numpy()
  np.testing.assert_allclose(oracle.nchw(logits), expected, rtol=0, atol=3e-5 * np.abs(expected).max())
  for name, value in parameters.stats(model).items():
    np.testing.assert_allclose(value, t[name], rtol=1e-4, atol=1e-5, err_msg=name)  # torch moved its own in place


def test_scores_of_a_padded_image_are_cut_and_those_of_an_image_stretched():
  given = features((128, 128))._replace(image_size=(100, 72))
  named = tiny.filled(parameters.describe(head).shapes)
  model = parameters.describe(head).merge(named)
  scores = model.scores(given.maps, training=False)
  assert scores.shape == (2, 16, 16, 2)
  cut = model(given, training=False)["logits"]
  np.testing.assert_array_equal(cut, lavt.resize_corners(scores, (128, 128))[:, :100, :72])
  shown = parameters.describe(lambda: head(map_extent="resized")).merge(named)(given, training=False)["logits"]
  np.testing.assert_array_equal(shown, lavt.resize_corners(scores, (100, 72)))


def test_names_are_the_authors():
  names = {"/".join(name.split("/")[:1]) for name in parameters.describe(head).shapes}
  assert names == {f"{layer}_{level}" for layer in ("conv1", "bn1", "conv2", "bn2") for level in (2, 3, 4)} | {
    "conv1_1"
  }


@pytest.mark.parametrize("build, message", [
  (lambda: head(map_extent="all"), r"^map_extent='all' is unknown; choose one of \('padded', 'resized'\)"),
  (lambda: lavt.Lavt(MapInfo((8,), (8,)), COMMON), r"^head 'lavt' joins maps of several strides, but wid"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    parameters.describe(build)
