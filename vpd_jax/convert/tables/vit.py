"""The ImageNet classifier in Hugging Face's names: table, sizes, loading. Our names are theirs with '/' for '.'."""

from collections.abc import Mapping

import numpy as np
from etils import epath

from vpd_jax.convert import fetch
from vpd_jax.convert.formats import weight_files
from vpd_jax.convert.rules import Rule, Shaped, convert, plain, to_source
from vpd_jax.errors import UserError
from vpd_jax.models.backbones.vit import EPSILON
from vpd_jax.types import Fields

EXPECTED = "the folder or file of a classifier in Hugging Face's names, such as google/vit-base-patch16-224"
_SIZES = {  # (key in config.json, default of transformers)
  "width": ("hidden_size", 768),
  "layers": ("num_hidden_layers", 12),
  "heads": ("num_attention_heads", 12),
  "mlp_width": ("intermediate_size", 3072),
  "image_size": ("image_size", 224),
  "patch": ("patch_size", 16),
}
_KNOWN = {"hidden_act": "gelu", "layer_norm_eps": EPSILON, "qkv_bias": True}  # supported values, which are the defaults


def classifier(source: str = "", target: str = "") -> list[Rule]:
  """Table of the classifier, below optional prefixes such as "encoder." and "method/"."""
  tokens = ("embeddings.cls_token", "embeddings.position_embeddings")
  parts = ("vit.embeddings.patch_embeddings", "vit.encoder", "vit.layernorm", "classifier")
  ours = lambda name: target + name.replace(".", "/")
  return [
    *(Rule(f"{source}vit.{name}", ours(f"vit.{name}"), (plain,)) for name in tokens),
    *(Rule(f"{source}{name}", ours(name)) for name in parts),
  ]


def load(path: str | epath.PathLike, targets: Mapping[str, Shaped]) -> dict[str, np.ndarray]:
  """Loads the classifier from a folder or a single file, on the host.

  Args:
    path: a folder with model.safetensors or pytorch_model.bin, or a file.
    targets: shape and dtype by name of every array of the classifier.

  Raises:
    ValueError: for a source that cannot be read, has no classifier or has other sizes; one line.
  """
  file = fetch.local(path, ("",))
  if not file.exists():
    raise UserError(f"{str(path)!r} does not exist; give {EXPECTED}.")
  tensors = (weight_files.open_folder(file, ("",)) if file.is_dir() else weight_files.open_file(file)).tensors
  if missing := [name for name in ("vit.layernorm.weight", "classifier.weight") if name not in tensors]:
    raise UserError(f"{path}: no classifier of pictures: it has no {missing[0]!r}; give {EXPECTED}.")
  shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
  phantoms = {name: np.broadcast_to(np.float32(0), tuple(x.shape)) for name, x in targets.items()}
  needed = {name: list(array.shape) for name, array in to_source(phantoms, classifier()).items()}
  if wrong := sorted(name for name in shapes.keys() | needed.keys() if shapes.get(name) != needed.get(name)):
    example = (
      f"{wrong[0]} is {shapes.get(wrong[0], 'not there')}, config.backbone.vit needs {needed.get(wrong[0], 'none')}"
    )
    raise UserError(
      f"{path} holds a classifier of another size: {len(wrong)} of its tensors differ, such as {example}; give "
      f"{EXPECTED}, or a folder with its config.json."
    )
  return convert(tensors, classifier(), targets, table=f"classifier of {path}")[0]


def sizes(path: str | epath.PathLike) -> Fields:
  """Keyword arguments of VitSizes by the config.json of a folder; empty if there is none.

  Raises:
    ValueError: for a config that cannot be read or describes an unsupported network; one line.
  """
  path = fetch.local(path)
  if not (path / "config.json").is_file():
    return {}
  config = weight_files.read_config(path)
  if unsupported := [f"{name}={config[name]}" for name, value in _KNOWN.items() if config.get(name, value) != value]:
    raise UserError(f"{path / 'config.json'} asks for {', '.join(unsupported)}; known are {_KNOWN}.")
  stated = {name: config.get(key, default) for name, (key, default) in _SIZES.items()}
  if stated["image_size"] % stated["patch"]:
    raise UserError(
      f"{path / 'config.json'} asks for patches of {stated['patch']} in {stated['image_size']} pixels, which do not "
      "divide them."
    )
  return stated | {"labels": len(config.get("id2label", {})) or 2}
