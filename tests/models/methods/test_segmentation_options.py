"""Attention maps joined to features, names as sentences, padding, merged classes: the options one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, modules, tiny
from tests.helpers.text_folders import VOCABULARY, write_tokenizer
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert.tokenizer import Tokenize
from vpd_jax.inference import tiles
from vpd_jax.models import parameters
from vpd_jax.models.backbones import layers, transformer
from vpd_jax.models.backbones.unet import UNetOutput, UNetSizes
from vpd_jax.models.backbones.vae import VaeSizes
from vpd_jax.models.context import label_sentences
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.vpd import Vpd
from vpd_jax.tasks.segmentation.task import Segmentation

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}
CLASSES = 5
UNET = UNetSizes(
  model_channels=32, channel_mult=(1,) * 4, num_res_blocks=1, attention_levels=(1, 2), num_heads=2, context_dim=16
)
SD = UNetSizes()


def method(**options):
  """The smallest VPD with maps, described, and made-up values of its arrays."""
  vae = VaeSizes(channels=32, channel_mult=(1,) * 4, num_res_blocks=1)
  options = {"prompt": "all_classes", "attention_maps": True, **options}
  parts = parameters.describe(lambda: Vpd(modules.setup(UNET, vae, classes=CLASSES), **options))
  return parts, {name: jnp.asarray(x) for name, x in tiny.filled(parts.shapes).items()}


def batch(height=64, width=64):
  latents = fill.normal(f"latents{height}x{width}", (2, height // 8, width // 8, 4), 0)
  return {"image": jnp.zeros((2, height, width, 3)), "latents": jnp.asarray(latents)}


@pytest.fixture(scope="module")
def plain():
  """Method, arrays and features of the default options, and what every cross-attention was given, 64 x 128 pixels."""
  parts, named = method()

  @jax.jit
  def run(named, batch):
    given, original = [], transformer.CrossAttention.__call__

    def call(self, x, context, *, keep_map=False):
      if keep_map:
        given.append((x, context, self.to_q.kernel[...], self.to_k.kernel[...]))
      return original(self, x, context, keep_map=keep_map)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(transformer.CrossAttention, "__call__", call)
      patch.setattr(layers, "traced_once", lambda module, *arrays, **options: module(*arrays, **options))
      return parts.merge(named)(batch, training=False).maps, given

  return parts, named, *run(named, batch(64, 128))


def test_maps_of_a_wide_image_are_attention_by_hand(plain):
  """Softmax of scaled products per head, mean over heads, then over the layers of that size, row by row."""
  parts, _, maps, given = plain
  assert parts.model.map_info.widths == (32, 32 + CLASSES, 32 + CLASSES, 32)
  assert [x.shape for x in maps] == [(2, 8, 16, 32), (2, 4, 8, 37), (2, 2, 4, 37), (2, 1, 2, 32)]
  sizes = {32: (4, 8), 8: (2, 4)}
  by_hand = {size: [] for size in sizes.values()}
  for x, context, to_q, to_k in (tuple(np.asarray(part, np.float64) for part in parts) for parts in given):
    split = lambda y: y.reshape(*y.shape[:2], 2, 16).swapaxes(1, 2)  # [B, heads, N, D]
    scores = split(x @ to_q) @ split(context @ to_k).swapaxes(2, 3) / np.sqrt(16)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = (exponents / exponents.sum(-1, keepdims=True)).mean(axis=1)  # [B, N, K]
    size = sizes[probabilities.shape[1]]
    by_hand[size].append(probabilities.reshape(2, *size, CLASSES))
  # One block down and two up at each size; none in the middle.
  assert [len(found) for found in by_hand.values()] == [3, 3]
  for x, found in zip(maps[1:3], by_hand.values(), strict=True):
    np.testing.assert_allclose(x[..., 32:], np.mean(found, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x[..., 32:].sum(axis=-1), 1, rtol=1e-5)


def test_the_whole_network_takes_an_image_that_is_not_square():
  exp = experiment.assemble(loader.load("configs/ade20k_seg.py:tiny"))
  image = jax.ShapeDtypeStruct((1, 64, 128, 3), jnp.float32)
  forward = lambda named, image: exp.spec.merge(named)({"image": image}, training=False)["logits"]
  assert jax.eval_shape(forward, exp.spec.shapes, image).shape == (1, 64, 128, 150)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_maps_carry_a_gradient_only_if_asked(gradient):
  join = image_input.joined_maps(SD, 150, use=True, max_size=32, gradient=gradient)
  features = tuple(jnp.ones((1, 8 >> i, 12 >> i, w)) for i, w in enumerate(SD.widths))
  maps = {(4, 6): jnp.full((1, 4, 6, 150), 2.0), (2, 3): jnp.full((1, 2, 3, 150), 3.0)}
  total = lambda features, maps: sum(jnp.square(x).sum() for x in join(UNetOutput(features, maps, None)))
  of_features, of_maps = jax.grad(total, argnums=(0, 1))(features, maps)
  assert all((x == 2).all() for x in of_features)
  for size, x in maps.items():
    np.testing.assert_array_equal(of_maps[size], 2 * x if gradient else 0 * x)
  assert method(attention_gradient=gradient)[0].model.join.gradient is gradient


@pytest.mark.parametrize("size, levels", [(64, (0, 1, 2)), (32, (1, 2)), (16, (2,))])
def test_the_largest_map_that_is_joined_is_a_choice(size, levels):
  join = image_input.joined_maps(SD, 150, use=True, max_size=size, gradient=False)
  assert set(join.levels) == set(levels)
  assert join.widths == tuple(w + 150 * (i in levels) for i, w in enumerate((320, 640, 1280, 1280)))
  # Of a wide image too, the UNet keeps the maps up to the finest that is joined.
  assert join.positions(jnp.zeros((1, 64, 96, 4))) == 64 * 96 // 4 ** min(levels)
  sides = [(8, 12), (4, 6), (2, 3), (1, 2)]
  features = tuple(jnp.full((1, *side, w), i + 1.0) for i, (side, w) in enumerate(zip(sides, SD.widths, strict=True)))
  maps = {side: jnp.full((1, *side, 150), -i - 1.0) for i, side in enumerate(sides[:3])}
  for i, x in enumerate(join(UNetOutput(features, maps, None))):
    assert x.shape == (1, *sides[i], join.widths[i])
    assert (x[..., : SD.widths[i]] == i + 1).all() and (x[..., SD.widths[i] :] == -i - 1).all()


def test_no_map_is_kept_where_none_is_joined():
  join = image_input.joined_maps(SD, 150, use=False, max_size=32, gradient=False)
  assert join.widths == SD.widths and join.positions(jnp.zeros((1, 64, 64, 4))) == 0


@pytest.mark.parametrize("size", [0, 8, 33, 128])
def test_a_size_that_no_map_has_is_refused(size):
  message = rf"^method\.attention_max_size={size} must be .* for an image of 512: one of \[16, 32, 64\]\.$"
  with pytest.raises(ValueError, match=message):
    image_input.joined_maps(SD, 150, use=True, max_size=size, gradient=False)


NAMES = ("a_bed", "cat", "a bed cat", "x")


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory):
  """transformers' CLIPTokenizer of a small vocabulary."""
  folder = tmp_path_factory.mktemp("words") / "tokenizer"
  write_tokenizer(folder)
  return lambda length: Tokenize((str(folder),), len(VOCABULARY), length)


def sentence(tokenize, label, length=32):
  """Our token ids of a label map, and a function from a sentence to those of the tokenizer."""
  table = tokenize(length)(label_sentences.sentences_of("{}", NAMES))
  tokens = label_sentences.Names(table)({"label": np.asarray(label, np.uint8)})["tokens"]
  assert tokens.dtype == np.int32 and tokens.shape == (length,)
  return tokens.tolist(), lambda text: tokenize(length)((text,))[0].tolist()


@pytest.mark.parametrize("label, text", [
  ([[1, 1], [0, 255]], "a bed cat"), ([[3, 3], [3, 2]], "a bed cat x"), ([[0, 1], [2, 3]], "a bed cat a bed cat x"),
  ([[255, 255]], ""), ([[1]], "cat"), ([[200, 1]], "cat"),
])  # fmt: skip
def test_names_in_a_label_map_are_the_tokens_of_their_sentence(tokenize, label, text):
  """In the order of their numbers; a label map without any is the empty sentence."""
  tokens, of = sentence(tokenize, label)
  assert tokens == of(text)


def test_names_of_the_smallest_areas_are_left_out_where_all_are_too_many(tokenize):
  label = [[2] * 4 + [1] * 3 + [0] * 2 + [3]]
  table = tokenize(32)(label_sentences.sentences_of("{}", NAMES))
  lengths = (table != table.max()).sum(axis=1) - 1
  for kept, text in (((2,), "a bed cat"), ((1, 2), "cat a bed cat"), ((0, 1, 2), "a bed cat a bed cat")):
    tokens, of = sentence(tokenize, label, length=2 + sum(int(lengths[k]) for k in kept))
    assert tokens == of(text)
  # One that would fit is not taken in place of a larger one that does not.
  assert lengths[3] < lengths[1]
  tokens, of = sentence(tokenize, label, length=2 + int(lengths[2] + lengths[3]))
  assert tokens == of("a bed cat")


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_padding_of_a_picture_is_exactly_zero(kind):
  whole = fill.integers("image", (2, 6, 8, 3), 256, 0).astype(np.uint8)
  image = whole if kind is np.uint8 else whole / kind(255)
  valid = np.array([[4, 8], [6, 5]], np.int32)
  padded = np.asarray(
    image_input.network_input({"image": jnp.asarray(image), "valid_size": jnp.asarray(valid)}, jnp.float32)
  )
  without = np.asarray(image_input.network_input({"image": jnp.asarray(image)}, jnp.float32))
  for i, (height, width) in enumerate(valid):
    np.testing.assert_array_equal(padded[i, :height, :width], without[i, :height, :width])
    rest = np.ones((6, 8), bool)
    rest[:height, :width] = False
    assert (padded[i][rest] == 0).all() and (without[i][rest] != 0).all()


def task(**options):
  return Segmentation(classes=4, class_names=("wall", "bed", "cot", "sky"), **options)


def test_probabilities_of_merged_classes_are_added():
  """Where neither of two kinds of bed wins, beds may."""
  scores = jnp.asarray([[0.4, 0.3, 0.3, 0.0], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]])
  assert task().decide(scores).tolist() == [0, 0, 3]
  beds = task(merge=("beds=cot+bed",))
  assert [name for name, _ in beds.merge] == ["wall", "beds", "sky"]
  assert beds.decide(scores).tolist() == [1, 0, 2] and beds.decide(scores).dtype == jnp.int32
  renamed = task(merge=("ceiling=sky",))
  assert [name for name, _ in renamed.merge] == ["wall", "bed", "cot", "ceiling"]
  assert renamed.decide(scores).tolist() == [0, 0, 3]
  both = task(merge=("indoors=sky+wall", "beds=bed+cot"))
  assert both.merge == (("indoors", (0, 3)), ("beds", (1, 2))) and both.decide(scores).tolist() == [1, 0, 0]


@pytest.mark.parametrize("merge", [("beds",), ("beds=bed+sofa",), ("=bed",), ("a=bed", "b=bed+cot"), ("a=bed+bed",)])
def test_classes_that_cannot_be_merged_are_named(merge):
  with pytest.raises(ValueError, match=r"^task\.merge has \[.*\]; write 'NEW=NAME"):
    task(merge=merge)


@pytest.mark.parametrize("ignored", [255, 200])
def test_what_lies_beyond_the_picture_does_not_count(ignored):
  label = fill.integers("label", (50, 70), 4, 0).astype(np.uint8)
  label[:9] = ignored
  scores = fill.normal("scores", (128, 128, 4), 0)
  measured = task(ignore_label=ignored).measure
  canvas = tiles.on_canvas(label, tiles.OUTSIDE_LABEL)
  assert canvas.shape == (128, 128)
  whole = measured(jnp.asarray(scores)[None], {"label": jnp.asarray(canvas)[None]})
  cut = measured(jnp.asarray(scores)[None, :50, :70], {"label": jnp.asarray(label)[None]})
  assert int(cut["predicted"].sum()) == int(cut["labeled"].sum()) == 41 * 70
  for name, value in cut.items():
    np.testing.assert_array_equal(whole[name], value, err_msg=name)
