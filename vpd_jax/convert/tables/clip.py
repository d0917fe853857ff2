"""CLIP's two towers in Hugging Face's names: tables, sizes and loading.

Our names are theirs with '/' for '.'. The text encoder is also part of Stable Diffusion files, with OpenCLIP's names in
SD 2.x.
"""

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from etils import epath

from vpd_jax.convert import fetch
from vpd_jax.convert.formats import weight_files
from vpd_jax.convert.formats.lazy_tensor import LazyTensor
from vpd_jax.convert.rules import Drop, Rule, Shaped, bare_embedding, convert, embedding, plain
from vpd_jax.errors import UserError
from vpd_jax.models.backbones.clip_text import ACTIVATIONS
from vpd_jax.types import Fields, Options

# Longest first. Diffusers folders and SD 1.x files have the prefix `text_model.`, which some files omit.
PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model.", "")
OPENCLIP = "cond_stage_model.model."  # in SD 2.x files
OPENCLIP_LAYER = {
  "ln_1": "layer_norm1",
  "attn": "self_attn",
  "ln_2": "layer_norm2",
  "mlp.c_fc": "mlp/fc1",
  "mlp.c_proj": "mlp/fc2",
}
THIRDS = ("q_proj", "k_proj", "v_proj")  # the parts of OpenCLIP's in_proj along its first axis
IMAGE_PREFIXES = ("vision_model.", "")
OTHER_PARTS = r"(vision_model|visual_projection)\..*|logit_scale"
TEXT_PARTS = r"(text_model|text_projection)\..*|logit_scale"
TEXT_FOLDER = "text_encoder"  # in a diffusers folder
EXPECTED = "the folder of a whole CLIP in Hugging Face's names, such as openai/clip-vit-large-patch14"


def text(source: Iterable[str], targets: Iterable[str] = (), *, projected: bool = False) -> list[Rule | Drop]:
  """Table of the text encoder for the naming scheme of the source.

  Args:
    source: names of the source; those of OpenCLIP after `split_in_proj`.
    targets: our names of the encoder's arrays; only read for OpenCLIP, see `openclip`.
    projected: whether to include the projection into the space shared with images.

  Raises:
    ValueError: for an unknown naming scheme or a missing projection.
  """
  names = set(source)
  if any(name.startswith(OPENCLIP) for name in names) and not projected:
    return openclip(targets)
  prefix = next((p for p in PREFIXES if f"{p}final_layer_norm.weight" in names), None)
  if prefix is None:
    raise UserError(
      "no text encoder: no name ends in 'final_layer_norm.weight'; give a CLIP or Stable Diffusion source."
    )
  if projected and "text_projection.weight" not in names:
    raise UserError(f"no 'text_projection.weight': a text encoder alone; give {EXPECTED}.")
  embeddings = [
    Rule(f"{prefix}embeddings.{table}", f"text_model/embeddings/{table}", (embedding,))
    for table in ("token_embedding", "position_embedding")
  ]
  why_not = "the vectors before the projection are used"
  return [
    *embeddings,
    Rule(f"{prefix}encoder.layers", "text_model/encoder/layers"),
    Rule(f"{prefix}final_layer_norm", "text_model/final_layer_norm"),
    Drop(rf"{re.escape(prefix)}embeddings\.position_ids", "counts from 0, stored by older versions", optional=True),
    Rule("text_projection", "text_projection") if projected else Drop(r"text_projection\..*", why_not, optional=True),
    Drop(
      r"(?!cond_stage_model\.).*" if prefix.startswith("cond_") else OTHER_PARTS, "not the text encoder", optional=True
    ),
  ]


def openclip(targets: Iterable[str]) -> list[Rule | Drop]:
  """Table of the text encoder in a file of Stable Diffusion 2.x, after `split_in_proj`; see also `join_in_proj`.

  The last layer is dropped: the context is its input, followed by the final norm. Files that were converted from a
  diffusers folder do not have this layer.

  Args:
    targets: our names of the encoder's arrays, which determine the number of layers.

  Source: Stability-AI/stablediffusion ldm/modules/encoders/modules.py FrozenOpenCLIPEmbedder, layer "penultimate".
  """
  layers = {int(match[1]) for name in targets if (match := re.match(r"text_model/encoder/layers/(\d+)/", name))}
  blocks = f"{OPENCLIP}transformer.resblocks"
  return [
    Rule(f"{OPENCLIP}token_embedding", "text_model/embeddings/token_embedding", (embedding,)),
    Rule(f"{OPENCLIP}positional_embedding", "text_model/embeddings/position_embedding", (bare_embedding,)),
    *(
      Rule(f"{blocks}.{i}.{old}", f"text_model/encoder/layers/{i}/{new}")
      for i in sorted(layers)
      for old, new in OPENCLIP_LAYER.items()
    ),
    Rule(f"{OPENCLIP}ln_final", "text_model/final_layer_norm"),
    Drop(rf"{re.escape(blocks)}\.{len(layers)}\..*", "the states before the last layer are used", optional=True),
    Drop(rf"{re.escape(OPENCLIP)}(text_projection|logit_scale)", "only compares texts with images", optional=True),
    Drop(rf"{re.escape(OPENCLIP)}attn_mask", "causal, as ours", optional=True),
    Drop(r"(?!cond_stage_model\.).*", "not the text encoder", optional=True),
  ]


def split_in_proj(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Splits OpenCLIP's stacked projections of query, key and value into q_proj.weight, q_proj.bias, .."""
  result = {}
  for name, tensor in tensors.items():
    match = re.fullmatch(rf"({re.escape(OPENCLIP)}.*)\.in_proj_(weight|bias)", name)
    if not match or not tensor.ndim or tensor.shape[0] % len(THIRDS):
      result[name] = tensor
      continue
    size = tensor.shape[0] // len(THIRDS)
    for i, part in enumerate(THIRDS):
      result[f"{match[1]}.{part}.{match[2]}"] = tensor.rows(i * size, (i + 1) * size)
  return result


def join_in_proj(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `split_in_proj`, for the arrays of rules.to_source."""
  first = re.compile(rf"({re.escape(OPENCLIP)}.*)\.{THIRDS[0]}\.(weight|bias)")
  starts = [match for name in named if (match := first.fullmatch(name))]
  parts = {f"{m[1]}.in_proj_{m[2]}": [f"{m[1]}.{part}.{m[2]}" for part in THIRDS] for m in starts}
  split_names = {name for names in parts.values() for name in names}
  joined = {name: np.concatenate([named[part] for part in names]) for name, names in parts.items()}
  return {name: x for name, x in named.items() if name not in split_names} | joined


def image(source: Iterable[str], *, projected: bool) -> list[Rule | Drop]:
  """Table of the image encoder, from a complete CLIP or a vision model alone.

  Args:
    source: names of the source.
    projected: whether to include the last norm and the projection into the space shared with texts.

  Raises:
    ValueError: for an unknown naming scheme or a missing projection.
  """
  names = set(source)
  prefix = next((p for p in IMAGE_PREFIXES if f"{p}embeddings.patch_embedding.weight" in names), None)
  if prefix is None:
    raise UserError(f"no image encoder: no name ends in 'embeddings.patch_embedding.weight'; give {EXPECTED}.")
  if projected and "visual_projection.weight" not in names:
    raise UserError(f"no 'visual_projection.weight': an image encoder alone; give {EXPECTED}.")
  start, why_not = f"{prefix}embeddings", "the states before it are used"
  last = rf"{re.escape(prefix)}post_layernorm\..*|visual_projection\..*"
  return [
    Rule(f"{start}.class_embedding", "vision_model/embeddings/class_embedding", (plain,)),
    Rule(f"{start}.patch_embedding", "vision_model/embeddings/patch_embedding"),
    Rule(f"{start}.position_embedding", "vision_model/embeddings/position_embedding", (embedding,)),
    Rule(f"{prefix}pre_layrnorm", "vision_model/pre_layrnorm"),
    Rule(f"{prefix}encoder.layers", "vision_model/encoder/layers"),
    Drop(rf"{re.escape(start)}\.position_ids", "counts from 0, stored by older versions", optional=True),
    Drop(TEXT_PARTS, "not the image encoder", optional=True),
    *(
      [
        Rule(f"{prefix}post_layernorm", "vision_model/post_layernorm"),
        Rule("visual_projection", "visual_projection"),
      ]
      if projected
      else [Drop(last, why_not, optional=True)]
    ),
  ]


def load_image(path: str | epath.PathLike, targets: Mapping[str, Shaped], *, projected: bool) -> dict[str, np.ndarray]:
  """Loads the image encoder from a CLIP folder or a single file, on the host.

  Args:
    path: a folder with model.safetensors or pytorch_model.bin, or a file.
    targets: shape and dtype by name of every array of the encoder.
    projected: as in `image`.

  Raises:
    ValueError: for a source that cannot be read, has no encoder or does not fit; lists all problems.
  """
  return _load(path, fetch.local(path, ("",)), lambda names: image(names, projected=projected), targets, which="image")


def load_text(
  path: str | epath.PathLike, targets: Mapping[str, Shaped], *, projected: bool = False
) -> dict[str, np.ndarray]:
  """Loads the text encoder from a CLIP folder or a single file, as `load_image`.

  Without the projection, also from a CompVis file or a diffusers folder, which remote folders are assumed to be.
  """
  local_path = fetch.local(path, ("",) if projected else (TEXT_FOLDER,))
  subfolder = local_path / TEXT_FOLDER
  table = lambda names: text(names, targets, projected=projected)
  return _load(path, subfolder if subfolder.is_dir() else local_path, table, targets, which="text")


def _load(
  path: str | epath.PathLike,
  local_path: pathlib.Path,
  table: Callable[[Iterable[str]], list[Rule | Drop]],
  targets: Mapping[str, Shaped],
  *,
  which: str,
) -> dict[str, np.ndarray]:
  """Loads one of the encoders from `local_path`; `path` is for messages."""
  if not local_path.exists():
    raise UserError(f"{str(path)!r} does not exist; give {EXPECTED}.")
  weights = weight_files.open_folder(local_path, ("",)) if local_path.is_dir() else weight_files.open_file(local_path)
  try:
    tensors = split_in_proj(weights.tensors)
    rules = table(tensors)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  suffixes = ("token_embedding.weight", "token_embedding/embedding")
  widths = lambda named: {x.shape[-1] for n, x in named.items() if n.endswith(suffixes) and len(x.shape) == 2}
  given, needed = widths(tensors), widths(targets)
  if given and needed and given != needed:
    raise UserError(
      f"the text encoder of {path} is {min(given)} wide, that of config.backbone.text {min(needed)}; give "
      "the one that belongs to the UNet, in Stable Diffusion 2.x that of its own folder or file."
    )
  return convert(tensors, rules, targets, table=f"CLIP {which} encoder of {path}")[0]


def holds_text(path: str | epath.PathLike) -> bool:
  """Whether a Stable Diffusion source, a diffusers folder or a single file, contains a text encoder."""
  path = fetch.local(path)
  if path.is_dir():
    return (path / TEXT_FOLDER).is_dir()
  names = weight_files.open_file(path).tensors
  return any(
    name in names for name in (*(f"{p}final_layer_norm.weight" for p in PREFIXES), f"{OPENCLIP}ln_final.weight")
  )


def sizes(path: str | epath.PathLike) -> dict[str, Fields]:
  """Sizes of the towers by the config.json of a folder; empty if there is none.

  Returns:
    {"image": ..., "text": ...}: keyword arguments of ImageSizes and TextSizes, for the towers in the config.

  Raises:
    ValueError: for a config that cannot be read or describes an unsupported network; one line.
  """
  path = fetch.local(path)
  if not (path / "config.json").is_file():
    return {}
  config = weight_files.read_config(path)
  model = str(config.get("model_type", "clip"))
  vision = config.get("vision_config") if model == "clip" else config if model == "clip_vision_model" else None
  language = config.get("text_config") if model == "clip" else config if model == "clip_text_model" else None
  result = {}
  if vision is not None:
    result["image"] = _image_sizes(path, vision, config)
  if language is not None:
    result["text"] = _text_sizes(path, language)
  return result


def _image_sizes(path: pathlib.Path, vision: Options, config: Options) -> Fields:
  """Missing fields have the defaults of transformers, those of ViT-B/32."""
  side, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
  if side % patch:
    raise UserError(f"{path / 'config.json'} asks for patches of {patch} in {side} pixels, which do not divide them.")
  return {
    **_transformer(path, vision, (768, 12, 12, 3072)),
    "image_size": side,
    "patch": patch,
    "projection": config.get("projection_dim", vision.get("projection_dim", 512)),
  }


def _text_sizes(path: pathlib.Path, config: Options) -> Fields:
  return {
    **_transformer(path, config, (512, 12, 8, 2048)),
    "vocab_size": config.get("vocab_size", 49408),
    "positions": config.get("max_position_embeddings", 77),
  }


def _transformer(path: pathlib.Path, part: Options, defaults: tuple[int, ...]) -> Fields:
  keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
  ours = ("width", "layers", "heads", "mlp_width")
  values = {name: part.get(key, default) for name, key, default in zip(ours, keys, defaults, strict=True)}
  activation, epsilon = part.get("hidden_act", "quick_gelu"), part.get("layer_norm_eps", 1e-5)
  if activation not in ACTIVATIONS or epsilon != 1e-5:
    raise UserError(
      f"{path / 'config.json'} asks for hidden_act={activation!r}, layer_norm_eps={epsilon}; known are "
      f"{sorted(ACTIVATIONS)} and 1e-05."
    )
  return {**values, "activation": activation}
