"""The picture that EcoDepth's classifier sees against the authors' bytes, and the mixture with every option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eco_depth, fill, oracle, tiny
from tests.helpers.modules import COMMON
from vpd_jax.models import parameters
from vpd_jax.models.backbones import layers, vit
from vpd_jax.models.context import class_mixture
from vpd_jax.models.context.class_mixture import ClassMixture, ClassToken

WIDTH, COUNT = 8, 6
SIZES = vit.VitSizes(width=16, layers=1, heads=2, mlp_width=32, image_size=28, patch=14, labels=10)


def mixture(sizes=SIZES, **changes):
  options = {"vit_bytes": "truncated", "class_scores": "logits", "padding": (64, -1.0), **changes}
  return ClassMixture(sizes, WIDTH, COUNT, layers.Identity(), **options, **COMMON.layer)


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("metrics.eco_depth.npz")


@pytest.fixture(scope="module")
def named():
  """Made-up arrays, with scores that tell pictures from each other and weights that are not all or nothing."""
  arrays = tiny.filled(parameters.describe(mixture).shapes)
  return arrays | {"fc/0/kernel": 10 * arrays["fc/0/kernel"], "fc/2/kernel": arrays["fc/2/kernel"] / 100}


def made(named, **changes):
  return parameters.describe(lambda: mixture(**changes)).merge(named)


@pytest.mark.parametrize("kind", ["bytes", "floats", "traced floats"])
def test_every_byte_comes_back_as_in_the_release(arrays, kind):
  levels = np.arange(256, dtype=np.uint8)
  image = levels if kind == "bytes" else levels.astype(np.float32) / np.float32(255)
  convert = lambda x: class_mixture.to_bytes(x, "truncated")
  back = (jax.jit(convert) if kind == "traced floats" else convert)(jnp.asarray(image))
  np.testing.assert_array_equal(back, arrays["eco_cide/truncated_value_of_byte"])
  np.testing.assert_array_equal(back, levels.astype(np.int32) - ((levels > 0) & (levels < 64)))


@pytest.mark.parametrize("image", [np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.float32) / np.float32(255)])
def test_rounded_bytes_come_back_as_they_were(image):
  back = jax.jit(lambda x: class_mixture.to_bytes(x, "rounded"))(jnp.asarray(image))
  np.testing.assert_array_equal(back, np.arange(256))


@pytest.mark.parametrize("case, size", [("nyu", (480, 640)), ("kitti", (352, 640)), ("portrait", (300, 200))])
def test_the_picture_for_the_classifier_is_the_authors(arrays, named, case, size):
  """Real sizes: black padding, the square, Pillow's resize and the levels of the processor, bit by bit."""
  image = jnp.asarray(eco_depth.picture((1, *size), name=f"metrics/vit/{case}/image"))
  context = made(named)
  square = context.square(image)
  assert square.shape == tuple(arrays[f"eco_cide/{case}/square_shape"])
  assert int(np.asarray(square).sum(dtype=np.int64)) == arrays[f"eco_cide/{case}/square_sum"]
  resized = np.asarray(jax.jit(lambda x: vit.resized_bytes(context.square(x), 224))(image)).transpose(0, 3, 1, 2)
  np.testing.assert_array_equal(resized.ravel()[::101], arrays[f"eco_cide/{case}/resized_stride101"])
  assert resized.sum(dtype=np.int64) == arrays[f"eco_cide/{case}/resized_sum"]
  np.testing.assert_array_equal(vit.LEVELS[resized].ravel()[::101], arrays[f"eco_cide/{case}/pixel_values_stride101"])


@pytest.mark.parametrize("side, size", [(28, 28), (20, 28), (29, 28), (640, 28)])
def test_a_resize_of_one_byte_is_that_byte(side, size):
  resized = vit.resized_bytes(jnp.full((1, side, side, 3), 77, jnp.int32), size)
  assert resized.shape == (1, size, size, 3) and bool((resized == 77).all())


@pytest.mark.reference
@pytest.mark.parametrize("side", [30, 56, 100, 224, 701])
def test_the_resize_of_a_square_is_pillows(side):
  from PIL import Image

  image = fill.integers("resize", (side, side, 3), 256, 0).astype(np.uint8)
  theirs = np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(vit.resized_bytes(jnp.asarray(image[None], jnp.int32), 56)[0], theirs)


def test_padding_is_seen_in_its_color_or_not_at_all(named):
  image = jnp.full((1, 64, 80, 3), 200, jnp.uint8)
  square = {padding: np.asarray(made(named, padding=padding).square(image))[0, :, :, 0]
            for padding in ((64, -1.0), (64, 0.0), None)}  # fmt: skip
  assert {padding: x.shape for padding, x in square.items()} == {
    (64, -1.0): (128, 128),
    (64, 0.0): (128, 128),
    None: (80, 80),
  }
  assert (square[64, -1.0][:64, 80:] == 0).all() and (square[64, 0.0][:64, 80:] == 127).all()
  assert all((x[:64, :80] == 200).all() and (x[64:] == 0).all() for x in square.values())


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_the_token_is_the_weighted_mean_of_the_vectors(named, scores):
  context = made(named, class_scores=scores)
  image = eco_depth.picture((2, 40, 60))
  image = jnp.asarray(np.stack([image[0] // 8, image[1]]))  # dark and bright
  token = context({"image": image})
  logits = np.asarray(context.vit_model(jnp.asarray(vit.LEVELS)[context.picture(image)]).logits, np.float64)
  softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
  given = softmax(logits) if scores == "probabilities" else logits
  hidden = given @ named["fc/0/kernel"] + named["fc/0/bias"]
  hidden = np.asarray(jax.nn.gelu(hidden.astype(np.float32), approximate=False))
  weights = softmax(hidden @ named["fc/2/kernel"] + named["fc/2/bias"])
  np.testing.assert_allclose(token, (weights @ named["embeddings"])[:, None], rtol=2e-5, atol=2e-6)
  assert token.shape == (2, 1, WIDTH) and np.abs(token[0] - token[1]).max() > 1e-4


def token(width=SIZES.width):
  return ClassToken(SIZES, width, vit_bytes="truncated", padding=(64, 0.0), **COMMON.layer)


def test_the_class_token_is_the_last_layers_before_the_norm():
  parts = parameters.describe(token)
  context = parts.merge(tiny.filled(parts.shapes))
  image = jnp.asarray(eco_depth.picture((2, 40, 60)))
  states = context.vit_model(jnp.asarray(vit.LEVELS)[context.picture(image)])
  np.testing.assert_array_equal(context({"image": image}), states.hidden[-1][:, :1])
  assert np.abs(np.asarray(states.hidden[-1][:, 0] - states.last[:, 0])).max() > 0.1
  assert {name.removeprefix("vit_model/") for name in parts.buffers} == {
    *("vit/layernorm/scale", "vit/layernorm/bias", "classifier/kernel", "classifier/bias")
  }
  with pytest.raises(
    ValueError, match=r"^method\.prompt='class_token' hands tokens of backbone\.vit\.width=16 to a UNet"
  ):
    parameters.describe(lambda: token(768))


def test_the_classifier_is_never_trained(named):
  parts = parameters.describe(mixture)
  assert {name.split("/")[0] for name in parts.buffers} == {"vit_model"}
  assert {name.split("/")[0] for name in parts.params} == {"fc", "embeddings"}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"vit_bytes": "floor"}, r"method\.vit_bytes='floor' is unknown; choose one of \('truncated', 'rounded'\)\."),
    (
      {"class_scores": "votes"},
      r"method\.class_scores='votes' is unknown; choose one of \('logits', 'probabilities'\)",
    ),
  ],
)
def test_unknown_words_are_one_line(changes, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    parameters.describe(lambda: mixture(**changes))
