"""The authors' fine-tuned checkpoints: Stable Diffusion's table under a prefix, plus adapter, neck and head."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vpd_jax.convert import stable_diffusion
from vpd_jax.convert.rules import BATCH_NORM, COUNTER, Drop, Rule, bias, conv, deconv, drop, norm, plain, to_source


def vpd_depth() -> list[Rule | Drop]:
  """VPD on NYU Depth v2. Source: VPD depth/models_depth/model.py, class VPDDepth."""
  return [
    Rule("encoder.gamma", "method/gamma", (plain,)),
    Rule("encoder.class_embeddings", "method/class_vectors", (plain,)),
    Rule("encoder.layer1", "neck/layer1"),
    Rule("encoder.layer2", "neck/layer2"),
    Rule("encoder.out_layer", "neck/out_layer"),
    *stable_diffusion.first_stage("encoder.encoder_vq"),
    *stable_diffusion.unet("encoder.unet.unet.diffusion_model", out=False),
    Rule("encoder.text_adapter", "method/text_adapter"),
    Rule("decoder.deconv_layers", "head/deconv_layers", (deconv, norm, bias, *BATCH_NORM)),
    Rule("decoder.conv_layers", "head/conv_layers", (conv, norm, bias, *BATCH_NORM)),
    Rule("last_layer_depth", "head/last_layer_depth"),
    drop(rf".*\.{COUNTER}", "our state counts the steps once"),
  ]


TABLES = {"vpd_depth": vpd_depth}
# A prefix that only this release has.
SIGNS = {"vpd_depth": "encoder.unet.unet.diffusion_model."}

# The order in which the authors' modules register their children, one list for all modules: no two of them disagree.
_ORDER = (
  "encoder decoder last_layer_depth "
  "gamma class_embeddings layer1 layer2 out_layer encoder_vq unet text_adapter "
  "conv_in down mid norm_out conv_out quant_conv post_quant_conv "
  "block attn downsample block_1 attn_1 block_2 "
  "time_embed input_blocks middle_block output_blocks out "
  "in_layers emb_layers out_layers skip_connection "
  "norm q k v proj_in transformer_blocks proj_out "
  "attn1 ff attn2 norm1 conv1 norm2 conv2 norm3 nin_shortcut to_q to_k to_v to_out "
  "deconv_layers conv_layers "
  "weight bias running_mean running_var num_batches_tracked "
)
_RANK = {word: rank for rank, word in enumerate(_ORDER.split())}


def manifest(shapes: Mapping[str, Any], rules: list[Rule | Drop]) -> list[dict[str, Any]]:
  """Entries {name, shape, dtype} of the authors' state dict, in its order, for a model of these shapes.

  Args:
    shapes: all arrays of the model by our names; anything with `.shape`.
    rules: the table.
  """
  phantoms = {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in shapes.items()}
  entries = {name: ("float32", list(array.shape)) for name, array in to_source(phantoms, rules).items()}
  for name in [name for name in entries if name.endswith(".running_var")]:
    entries[f"{name.removesuffix('running_var')}{COUNTER}"] = ("int64", [])
  ordered = sorted(entries, key=_place)
  return [{"name": name, "shape": entries[name][1], "dtype": entries[name][0]} for name in ordered]


def _place(name: str) -> list[tuple[int, int]]:
  """Sort key of a name: numbers by value, words by the order above, unlisted ones as they come."""
  return [(0, int(part)) if part.isdigit() else (1, _RANK.get(part, len(_RANK))) for part in name.split(".")]
