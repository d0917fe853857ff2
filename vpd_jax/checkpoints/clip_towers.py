"""CLIP's towers inside a model: from Stable Diffusion's text encoder, from `init.clip`, or random, for smoke tests.

Each function takes what is missing by the names of CLIP's own modules, and says in a line where it came from.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from vpd_jax.checkpoints.class_name_encoding import random_class_vectors, random_seed
from vpd_jax.convert import tokenizer
from vpd_jax.convert.rules import Shaped
from vpd_jax.convert.tables import clip
from vpd_jax.errors import UserError
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones.clip_text import ClipText, TextSizes
from vpd_jax.types import Array, ParamDict

OPTION = "init.clip"
CHOICES = f"set config.init.clip to {clip.EXPECTED}, or to random:SEED for smoke tests"
Found = tuple[dict[str, np.ndarray], str]  # arrays by name, and a line that says where from


def text_encoder(wanted: Mapping[str, Shaped], *, pretrained: str, source: str) -> Found:
  """The text encoder: that of a Stable Diffusion source which holds one, else that of `init.clip`.

  Args:
    wanted: shape and dtype by name.
    pretrained: `init.pretrained`, or empty.
    source: `init.clip`: a folder or file of CLIP, or random:SEED.

  Raises:
    ValueError: neither holds one, or one that does not fit.
  """
  if pretrained and clip.holds_text(pretrained):
    return clip.load_text(pretrained, wanted), f"CLIP text encoder: {pretrained}"
  arrays, origin = _tower(wanted, source, "text", projected=False)
  return arrays, f"CLIP text encoder: {origin}"


def image_encoder(wanted: Mapping[str, Shaped], *, source: str) -> Found:
  """The image encoder without its projection; as `text_encoder`."""
  arrays, origin = _tower(wanted, source, "image", projected=False)
  return arrays, f"CLIP image encoder: {origin}"


def class_predictor(
  wanted: Mapping[str, Shaped],
  *,
  source: str,
  classes: Sequence[str],
  templates: Sequence[str],
  words: str,
  sizes: TextSizes,
) -> Found:
  """The image encoder with its projection, and the directions of the classes' names.

  Args:
    wanted: shape and dtype by name: `names` and those below `image_encoder/`.
    source: as above; a whole CLIP.
    classes: their names.
    templates: with {} for the name.
    words: folder of the tokenizer; empty: that of the source.
    sizes: of the text encoder of a single file; a folder states its own.
  """
  tower = "image_encoder/"
  below = {name.removeprefix(tower): shape for name, shape in wanted.items() if name.startswith(tower)}
  arrays, origin = _tower(below, source, "image", projected=True)
  count, width = wanted["names"].shape
  seed = random_seed(source, OPTION)
  if seed is not None:
    vectors = random_class_vectors(count, width, seed)
  else:
    stated = clip.sizes(source).get("text")
    sizes = TextSizes(**stated) if stated else sizes
    reader = tokenizer.load(words or source)
    vectors = name_vectors(source, classes[:count], templates, words=reader, sizes=sizes, projection=width)
  named = {tower + name: value for name, value in arrays.items()} | {"names": vectors.astype(wanted["names"].dtype)}
  return named, f"classes predicted by CLIP: {origin}"


def _tower(wanted: Mapping[str, Shaped], source: str, which: str, *, projected: bool) -> Found:
  """One of CLIP's towers by its own names, and where from."""
  if not source:
    raise UserError(f"there is no CLIP {which} encoder: config.init.clip is empty; {CHOICES}.")
  seed = random_seed(source, OPTION)
  if seed is not None:
    return random_tower(wanted, seed), f"random (seed {seed}), for smoke tests only"
  reader = {"text": clip.load_text, "image": clip.load_image}[which]
  return reader(source, wanted, projected=projected), source


def random_tower(targets: Mapping[str, Shaped], seed: int) -> dict[str, np.ndarray]:
  """Stand-ins for a tower, for smoke tests: kernels that keep the scale, norms that do nothing, small embeddings."""
  rng, named = np.random.default_rng(seed), {}
  for name in sorted(targets):
    shape, last = tuple(targets[name].shape), name.rpartition("/")[2]
    if last in ("scale", "bias"):
      values = np.full(shape, 1.0 if last == "scale" else 0.0, np.float32)
    else:
      deviation = math.prod(shape[:-1]) ** -0.5 if last == "kernel" else 0.02
      values = deviation * rng.standard_normal(shape, np.float32)
    named[name] = values.astype(targets[name].dtype)
  return named


def name_vectors(
  path: str | epath.PathLike,
  names: Sequence[str],
  templates: Sequence[str],
  *,
  words: tokenizer.Tokenizer,
  sizes: TextSizes,
  projection: int,
) -> np.ndarray:
  """What an image is compared with to tell its class: one unit vector per name, float32 [K, P].

  Each template's sentence is encoded and projected, brought to length 1, and their mean to length 1 again.

  Args:
    path: of a whole CLIP, folder or file.
    names: '_' stands for ' '.
    templates: with {} for the name.
    words: its tokenizer, of tokenizer.load.
    sizes: of its text encoder.
    projection: P.

  Raises:
    ValueError: no text encoder with its projection there; another model's tokenizer.

  Source: Radford et al. 2021, section 3.1.4; openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb.
  """
  kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
  parts = params_lib.describe(lambda: ClipText(sizes, projection=projection, **kinds, rngs=nnx.Rngs(0)))
  weights = clip.load_text(path, parts.shapes, projected=True)
  sentences = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
  tokens = tokenizer.tokenize(sentences, words, vocabulary=sizes.vocab_size, length=sizes.positions)
  # What follows the end of a text does not count: cut to the longest.
  tokens = tokens[:, : int(tokens.argmax(axis=1).max()) + 1].reshape(len(names), len(templates), -1)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  @jax.jit
  def mean_direction(weights: ParamDict, tokens: Array) -> Array:
    return unit(unit(parts.merge(weights)(tokens).embeds).mean(axis=0))

  on_device = {name: jnp.asarray(value) for name, value in weights.items()}
  with jax.default_matmul_precision("highest"):  # Made once, and accelerators would round.
    return np.stack([np.asarray(mean_direction(on_device, jnp.asarray(part))) for part in tokens])
