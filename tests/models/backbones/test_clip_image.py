"""CLIP's image encoder against the authors' code, its input against Pillow, and what makes a tower untrainable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import fill, oracle
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import clip_image, clip_text
from vpd_jax.models.initializers import InitKeys

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}
TINY = clip_image.ImageSizes(width=64, layers=3, heads=4, mlp_width=256, image_size=56, projection=48)


def described(**options):
  return params_lib.describe(lambda: clip_image.ClipImage(TINY, **(KINDS | options), rngs=InitKeys(0)))


def test_clip_vision_gives_the_authors_states_and_vectors():
  parts, named = described(projected=True), oracle.plain_names(oracle.weights("clip_vision"))
  assert {n: v.shape for n, v in named.items()} == {n: s.shape for n, s in parts.shapes.items()}
  arrays = oracle.golden("clip_vision.tiny.npz")
  image = jnp.asarray(arrays["input/pixel_values"].transpose(0, 2, 3, 1))
  states = jax.jit(lambda a, x: parts.merge(a)(x))(named, image)
  oracle.compare(states.last, arrays, "output/last_hidden_state", 1e-5)
  oracle.compare(states.embeds, arrays, "output/image_embeds", 1e-5)
  assert len(states.hidden) == TINY.layers + 1
  for i, hidden in enumerate(states.hidden):
    oracle.compare(hidden, arrays, f"tap/hidden_states.{i}", 1e-5)


def test_full_size_has_the_authors_arrays():
  sizes = clip_image.ImageSizes()
  parts = params_lib.describe(lambda: clip_image.ClipImage(sizes, projected=True, **KINDS, rngs=InitKeys(0)))
  entries = [e["shape"] for e in oracle.manifest("clip_vision", "full")]
  assert sorted(map(np.prod, entries)) == sorted(np.prod(s.shape) for s in parts.shapes.values())
  assert sum(map(np.prod, entries)) == 303_966_208 and sizes.tokens == 257


def test_without_projection_the_arrays_behind_the_states_are_left_out():
  whole, bare = described(projected=True), described(projected=False)
  assert {n.rsplit("/", 1)[0] for n in whole.shapes.keys() - bare.shapes.keys()} == {
    "vision_model/post_layernorm",
    "visual_projection",
  }


def by_pillow(image, size, resample):
  """[H, W, 3] in [0, 1] resized channel by channel, in float."""
  channels = [np.asarray(Image.fromarray(c).resize((size, size), resample)) for c in np.moveaxis(image, -1, 0)]
  return np.stack(channels, axis=-1)


@pytest.mark.parametrize(("word", "resample"), [("bicubic", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
@pytest.mark.parametrize("height", [30, 97])
def test_pixels_are_those_of_pillow(word, resample, height):
  image = fill.integers("pixels", (1, height, 80, 3), 256, 0).astype(np.uint8)
  image[0, :, 20:40], image[0, :, 40:60] = 255, 0  # an edge, at which the cubic overshoots
  expected = by_pillow(image[0] / np.float32(255), 56, resample)
  assert word == "bilinear" or (expected.max() > 1.001 and expected.min() < -0.001)
  expected = (np.clip(expected, 0, 1) - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
  for given in (image, image / np.float32(255)):
    found = clip_image.pixels(jnp.asarray(given), 56, dtype=jnp.float32, resize=word)
    assert found.shape == (1, 56, 56, 3) and found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-5)  # a level of 8 bits is 1.5e-2


def test_a_tower_that_is_never_trained_has_buffers_only_and_gives_the_same():
  sizes = clip_text.TextSizes(vocab_size=20, width=16, layers=1, heads=2, mlp_width=32, positions=8)
  make = lambda: clip_text.ClipText(sizes, projection=8, **KINDS, rngs=InitKeys(0))
  trained, kept = params_lib.describe(make), params_lib.describe(lambda: clip_text.as_buffers(make()))
  assert not kept.params and not kept.stats and kept.buffers == trained.params
  named = {n: fill.weight(n, s.shape, 0) for n, s in trained.shapes.items()}
  tokens = jnp.asarray([[18, 3, 5, 19, 19]])
  found, expected = (jax.jit(lambda a, x, p=p: p.merge(a)(x).embeds)(named, tokens) for p in (kept, trained))
  assert found.shape == (1, 8)
  np.testing.assert_array_equal(found, expected)
