"""Class vectors: one text vector per class name, read from a file or encoded from the names.

VPD's recipe for its 27 scenes: '_' becomes ' ', the name is inserted into each of 80 templates, CLIP's text encoder
computes one vector per sentence, and the class vector is their mean.

Source: Zhao et al. 2023, https://arxiv.org/abs/2303.02153; VPD depth/dump_nyu_text_embeddings.py.
"""

import importlib.resources
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from vpd_jax.convert import fetch
from vpd_jax.convert.formats import pickles, weight_files
from vpd_jax.convert.formats.lazy_tensor import LazyTensor
from vpd_jax.convert.tables import clip, stable_diffusion
from vpd_jax.convert.tokenizer import Tokenizer, tokenize
from vpd_jax.convert.tokenizer import load as load_tokenizer
from vpd_jax.errors import UserError, first_items
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones.clip_text import ClipText, TextSizes
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.layer_options import Common
from vpd_jax.monitoring import progress
from vpd_jax.types import Array, ParamDict

IN_NPZ = "class_vectors"
IN_PTH = ("class_embeddings", "encoder.class_embeddings")
RANDOM = "random:"
CHOICES = (
  "give init.pretrained a diffusers folder with text_encoder/ and tokenizer/, set method.class_vectors=FILE (.npy, "
  ".npz or .pth; scripts/embed_class_names.py writes one), or method.class_vectors=random:SEED for smoke tests"
)


class TextEncoder(NamedTuple):
  """CLIP's text encoder: its specification and arrays."""

  spec: params_lib.ModelSpec
  weights: ParamDict


def read(path: str | epath.PathLike) -> np.ndarray:
  """Reads class vectors from a file: float32 [K, D].

  Args:
    path: .npy; .npz with a single array or one named class_vectors; .pth with a tensor, or with one named
      class_embeddings or encoder.class_embeddings, as in the authors' checkpoints. Local or in a bucket.

  Raises:
    ValueError: in one line, for a missing, unknown or damaged file, or if it does not contain K x D finite numbers.
  """
  readers = {".npy": _read_numpy, ".npz": _read_numpy, ".pth": _read_pth}
  suffix = pathlib.PurePath(path).suffix.lower()
  if suffix not in readers:
    raise UserError(f"class vectors {str(path)!r} must end in one of {sorted(readers)}.")
  path = fetch.local(path)
  if not path.is_file():
    raise UserError(f"class vectors {str(path)!r} are not a file; {CHOICES}.")
  array = readers[suffix](path)
  if array.ndim != 2 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
    raise UserError(f"{path} holds {array.dtype} {list(array.shape)}; class vectors are floats [classes, width].")
  vectors = array.astype(np.float32)
  if not np.isfinite(vectors).all():
    raise UserError(f"{path} holds {np.sum(~np.isfinite(vectors))} values that are not finite; create it again.")
  return vectors


def _read_numpy(path: pathlib.Path) -> np.ndarray:
  try:
    with path.open("rb") as file:
      content = np.load(file, allow_pickle=False)
      if isinstance(content, np.ndarray):
        return content
      names = content.files
      name = IN_NPZ if IN_NPZ in names else names[0] if len(names) == 1 else None
      array = None if name is None else content[name]
  except (OSError, MemoryError) as error:
    raise UserError(f"{path} cannot be read ({error or type(error).__name__}); fix that and try again.") from error
  except Exception as error:  # Damaged archives raise errors of any type.
    raise UserError(f"{path} is damaged or not a numpy file ({error}); create it again.") from error
  if array is None:
    raise UserError(f"{path} holds the arrays {first_items(names)}; it must hold one, or one named {IN_NPZ!r}.")
  return array


def _read_pth(path: pathlib.Path) -> np.ndarray:
  content = pickles.read(path)
  if isinstance(content, LazyTensor):
    return np.asarray(content)
  tensors = weight_files.open_file(path).tensors
  names = [name for name in IN_PTH if name in tensors]
  if len(names) != 1:
    raise UserError(f"{path} holds {list(tensors)[:5]}; it must hold a tensor alone, or one of {list(IN_PTH)}.")
  return np.asarray(tensors[names[0]])


def random_seed(setting: str, option: str) -> int | None:
  """The seed in "random:SEED"; None for any other setting.

  Raises:
    ValueError: "random:" without an integer; the message names `option`.
  """
  if not setting.startswith(RANDOM):
    return None
  seed = setting.removeprefix(RANDOM)
  if not (seed.isascii() and seed.isdigit()):
    raise UserError(f"{option}={setting!r} needs a whole number after {RANDOM!r}, as in 'random:0'.")
  return int(seed)


def random_class_vectors(classes: int, width: int, seed: int) -> np.ndarray:
  """Random class vectors, float32 [classes, width]: standard normal, determined by the seed."""
  return np.random.default_rng(seed).standard_normal((classes, width), dtype=np.float32)


def read_templates(choice: str) -> tuple[str, ...]:
  """The templates of a set in prompt_templates.json, or the given template itself, with {} for the name.

  Raises:
    ValueError: neither a set nor a template.
  """
  sets = json.loads(
    (importlib.resources.files("vpd_jax") / "data/assets/prompt_templates.json").read_text(encoding="utf-8")
  )
  if choice in sets:
    return tuple(sets[choice])
  if choice.count("{}") != 1:
    raise UserError(f"templates={choice!r} is unknown; choose one of {sorted(sets)}, or a text with one {{}} in it.")
  return (choice,)


def load_text_encoder(path: str | epath.PathLike, *, dtype: DTypeLike, sizes: TextSizes | None = None) -> TextEncoder:
  """Loads the text encoder of a diffusers folder, which states its sizes, or of a single file with the given sizes.

  Raises:
    ValueError: no text encoder, or one of other sizes.
  """
  stated = stable_diffusion.sizes(path)
  if stated is not None and "text" not in stated:
    raise UserError(f"{path} is a folder without text_encoder/; give a diffusers folder that has it.")
  sizes = sizes if stated is None else TextSizes(**stated["text"])
  if sizes is None:
    raise UserError(f"{path} is not a folder with text_encoder/, and the sizes of its text encoder are not known.")
  spec = params_lib.describe(lambda: ClipText(sizes, **Common(dtype, dtype, InitKeys(0)).layer))
  named = clip.load_text(path, spec.shapes)
  return TextEncoder(spec, {name: jnp.asarray(value) for name, value in named.items()})


def encode(
  names: Sequence[str], *, tokenizer: Tokenizer, text: TextEncoder, templates: Sequence[str], max_length: int = 20
) -> np.ndarray:
  """Encodes class names by VPD's recipe: float32 [K, D].

  The pooled output is the state after the final norm at the end-of-text token, neither projected nor normalized.

  Args:
    names: '_' stands for ' '.
    tokenizer: transformers' CLIPTokenizer.
    text: the encoder.
    templates: with {} for the name; their vectors are averaged.
    max_length: number of tokens to which a sentence is padded or truncated. Release: 20.

  Raises:
    ValueError: no names or templates; a length that the encoder, or a tokenizer that its vocabulary, does not support.
  """
  if not names or not templates:
    raise UserError(f"there are {len(names)} names and {len(templates)} templates to encode; give at least one each.")
  positions, _ = text.spec.shapes["text_model/embeddings/position_embedding/embedding"].shape
  if not 2 <= max_length <= positions:
    raise UserError(f"max_length={max_length} must be between 2 and the {positions} positions of the text encoder.")

  vocabulary, _ = text.spec.shapes["text_model/embeddings/token_embedding/embedding"].shape

  @jax.jit
  def mean_vector(weights: ParamDict, tokens: Array) -> Array:
    pooled = text.spec.merge(weights)(tokens).pooled  # [templates, D]
    return pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32)).mean(axis=0)

  vectors = []
  with (
    jax.default_matmul_precision("highest"),  # Accelerators use lower precision by default.
    progress.phase("class names", len(names), "names") as encoded,
  ):
    for name in names:
      sentences = [template.replace("{}", name.replace("_", " ")) for template in templates]
      tokens = tokenize(sentences, tokenizer, vocabulary=vocabulary, length=max_length)
      vectors.append(np.asarray(mean_vector(text.weights, tokens), np.float32))
      encoded.advance()
  return np.stack(vectors)


def resolve(
  *,
  setting: str,
  classes: Sequence[str],
  width: int,
  pretrained: str,
  dtype: DTypeLike,
  sizes: TextSizes | None = None,
  tokenizer: str = "",
  templates: str = "imagenet_80",
) -> tuple[np.ndarray, str]:
  """Class vectors for a model whose weights do not contain them.

  Args:
    setting: `method.class_vectors`: a file; random:SEED; or empty to encode the names.
    classes: names by class id.
    width: of a vector, as required by the model's context.
    pretrained: `init.pretrained`, whose text encoder encodes the names.
    dtype: of the text encoder; the dtype of the parameters.
    sizes: of the text encoder of a single file; a folder states its own.
    tokenizer: folder of the tokenizer, if `pretrained` has none.
    templates: for the names, see `read_templates`.

  Returns:
    float32 [len(classes), width], and a line that states their source.

  Raises:
    ValueError: in one line, if there is no source, or the vectors have another shape.
  """
  seed = random_seed(setting, "method.class_vectors")
  if seed is not None:
    vectors = random_class_vectors(len(classes), width, seed)
    return vectors, f"class vectors: random (seed {seed}), for smoke tests only; they carry no class meaning"
  if setting:
    vectors, origin = read(setting), setting
  else:
    vectors, origin = _encode_from(pretrained, classes, width, dtype, sizes, tokenizer, templates)
  if vectors.shape != (len(classes), width):
    raise UserError(
      f"class vectors from {origin} are {list(vectors.shape)}, the model needs {[len(classes), width]}: {len(classes)} "
      f"classes, width {width}; {CHOICES}."
    )
  return vectors, f"class vectors: {len(classes)} x {width} from {origin}"


def _encode_from(
  pretrained: str,
  classes: Sequence[str],
  width: int,
  dtype: DTypeLike,
  sizes: TextSizes | None,
  tokenizer: str,
  templates: str,
) -> tuple[np.ndarray, str]:
  """(vectors, their source), encoded by the text encoder of `pretrained`."""
  if not pretrained:
    raise UserError(f"there are no class vectors: method.class_vectors and init.pretrained are empty; {CHOICES}.")
  if not tokenizer and not fetch.local(pretrained).is_dir():
    raise UserError(f"there are no class vectors: init.pretrained={pretrained!r} brings no tokenizer; {CHOICES}.")
  try:
    loaded = load_tokenizer(tokenizer or pretrained)
    text = load_text_encoder(pretrained, dtype=dtype, sizes=sizes)
  except UserError as error:
    raise UserError(f"there are no class vectors: {error} Or else: {CHOICES}.") from error
  encoder_width = text.weights["text_model/final_layer_norm/scale"].shape[0]
  if encoder_width != width:
    raise UserError(
      f"the text encoder of {pretrained} is {encoder_width} wide, the model's context needs {width}; {CHOICES}."
    )
  vectors = encode(classes, tokenizer=loaded, text=text, templates=read_templates(templates))
  return vectors, f"the names, templates {templates}, text encoder of {pretrained}"
