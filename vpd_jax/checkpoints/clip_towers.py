"""Weights of a model's CLIP encoders: from Stable Diffusion, from `init.clip`, or random for smoke tests.

Each function takes the shapes of the missing arrays by the names of CLIP's modules, and returns the arrays and a line
that states their source.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vpd_jax.checkpoints.class_name_encoding import random_class_vectors, random_seed
from vpd_jax.convert import tokenizer
from vpd_jax.convert.rules import Shaped
from vpd_jax.convert.tables import clip
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones.clip_text import ClipText, TextSizes
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, ParamDict

OPTION = "init.clip"
CHOICES = f"set config.init.clip to {clip.EXPECTED}, or to random:SEED for smoke tests"
LoadedArrays = tuple[dict[str, np.ndarray], str]  # arrays by name, and a line that states their source


def text_encoder(shapes: Mapping[str, Shaped], *, pretrained: str, source: str) -> LoadedArrays:
  """The text encoder: from a Stable Diffusion source that contains one, else from `init.clip`.

  Args:
    shapes: shape and dtype by name.
    pretrained: `init.pretrained`, or empty.
    source: `init.clip`: a folder or file with CLIP, or random:SEED.

  Raises:
    ValueError: neither contains one, or its arrays have other shapes.
  """
  if pretrained and clip.holds_text(pretrained):
    return clip.load_text(pretrained, shapes), f"CLIP text encoder: {pretrained}"
  arrays, origin = _tower(shapes, source, "text", projected=False)
  return arrays, f"CLIP text encoder: {origin}"


def image_encoder(shapes: Mapping[str, Shaped], *, source: str) -> LoadedArrays:
  """The image encoder without its projection; as `text_encoder`."""
  arrays, origin = _tower(shapes, source, "image", projected=False)
  return arrays, f"CLIP image encoder: {origin}"


def class_predictor(
  shapes: Mapping[str, Shaped],
  *,
  source: str,
  classes: Sequence[str],
  templates: Sequence[str],
  tokenizer_folder: str,
  sizes: TextSizes,
) -> LoadedArrays:
  """The image encoder with its projection, and the normalized text vectors of the class names.

  Args:
    shapes: shape and dtype by name: `names` and those below `image_encoder/`.
    source: as above; a complete CLIP with both encoders.
    classes: class names.
    templates: with {} for the name.
    tokenizer_folder: folder of the tokenizer; empty: that of the source.
    sizes: of the text encoder of a single file; a folder states its own.
  """
  prefix = "image_encoder/"
  encoder_shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
  arrays, origin = _tower(encoder_shapes, source, "image", projected=True)
  count, width = shapes["names"].shape
  seed = random_seed(source, OPTION)
  if seed is not None:
    vectors = random_class_vectors(count, width, seed)
  else:
    stated = clip.sizes(source).get("text")
    sizes = TextSizes(**stated) if stated else sizes
    loaded = tokenizer.load(tokenizer_folder or source)
    vectors = name_vectors(source, classes[:count], templates, text_tokenizer=loaded, sizes=sizes, projection=width)
    vectors = sharding.of_first_process(vectors)
  named = {prefix + name: value for name, value in arrays.items()} | {"names": vectors.astype(shapes["names"].dtype)}
  return named, f"classes predicted by CLIP: {origin}"


def _tower(shapes: Mapping[str, Shaped], source: str, which: str, *, projected: bool) -> LoadedArrays:
  """The arrays of one of CLIP's encoders by its own names, and their source."""
  if not source:
    raise UserError(f"there is no CLIP {which} encoder: config.init.clip is empty; {CHOICES}.")
  seed = random_seed(source, OPTION)
  if seed is not None:
    return random_tower(shapes, seed), f"random (seed {seed}), for smoke tests only"
  reader = {"text": clip.load_text, "image": clip.load_image}[which]
  return reader(source, shapes, projected=projected), source


def random_tower(targets: Mapping[str, Shaped], seed: int) -> dict[str, np.ndarray]:
  """Random arrays of an encoder for smoke tests: variance-preserving kernels, identity norms, small embeddings."""
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
  text_tokenizer: tokenizer.Tokenizer,
  sizes: TextSizes,
  projection: int,
) -> np.ndarray:
  """Text vectors for zero-shot classification: one unit vector per name, float32 [K, P].

  Each template's sentence is encoded, projected and normalized; the mean over templates is normalized again.

  Args:
    path: of a complete CLIP, folder or file.
    names: '_' stands for ' '.
    templates: with {} for the name.
    text_tokenizer: its tokenizer, from tokenizer.load.
    sizes: of its text encoder.
    projection: P.

  Raises:
    ValueError: no text encoder with projection; a tokenizer of another model.

  Source: Radford et al. 2021, section 3.1.4; openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb.
  """
  options = Common(jnp.float32, jnp.float32, InitKeys(0)).layer
  spec = params_lib.describe(lambda: ClipText(sizes, projection=projection, **options))
  weights = clip.load_text(path, spec.shapes, projected=True)
  sentences = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
  tokens = tokenizer.tokenize(sentences, text_tokenizer, vocabulary=sizes.vocab_size, length=sizes.positions)
  # Tokens after the end of a text have no effect: truncate to the longest text.
  tokens = tokens[:, : int(tokens.argmax(axis=1).max()) + 1].reshape(len(names), len(templates), -1)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  @jax.jit
  def mean_direction(weights: ParamDict, tokens: Array) -> Array:
    return unit(unit(spec.merge(weights)(tokens).embeds).mean(axis=0))

  on_device = {name: jnp.asarray(value) for name, value in weights.items()}
  with jax.default_matmul_precision("highest"):  # Accelerators use lower precision by default.
    return np.stack([np.asarray(mean_direction(on_device, jnp.asarray(part))) for part in tokens])
