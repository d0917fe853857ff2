"""The authors' checkpoints of TADP: on NYU Depth v2, and on ADE20K.

Both contain the complete Stable Diffusion as "sd_model", including the frozen text encoder and the unused constants of
the noise schedule, which are dropped on loading and recomputed on export. The file for depth contains VAE and UNet
twice.

Source: TADP TADP/tadp_depth.py, TADP/tadp_seg_mm.py.
"""

import re

import numpy as np

from vpd_jax.convert.rules import BATCH_NORM, DROP_COUNTERS, LAYER, Drop, Rule, embedding
from vpd_jax.convert.tables import released_segmentation, stable_diffusion
from vpd_jax.types import Fields, Options

_TEXT = "cond_stage_model.transformer.text_model"
_DEPTH = "encoder.sd_model"
_SEGMENTATION = "sd_model"
# Prefixes that no other release has.
SIGNATURES = {"tadp_depth": f"{_DEPTH}.cond_stage_model.", "tadp_segmentation": f"{_SEGMENTATION}.cond_stage_model."}
# In the file for depth: {repeated prefix: original prefix}.
REPEATED = {
  f"{_DEPTH}.model.diffusion_model": "encoder.unet.unet.diffusion_model",
  f"{_DEPTH}.first_stage_model": "encoder.encoder_vq",
}
# The registration order of the children of Stable Diffusion and the text encoder, after that of "sd_model".
ORDER = (
  "model first_stage_model cond_stage_model token_embedding position_embedding self_attn k_proj v_proj q_proj out_proj "
  "layer_norm1 mlp fc1 fc2 layer_norm2 final_layer_norm"
)


def _sd_model(source: str) -> list[Rule | Drop]:
  """What both files contain below `source`, except for VAE and UNet."""
  target = "method/text_encoder/text_model"
  return [
    *(
      Rule(f"{source}.{_TEXT}.embeddings.{table}", f"{target}/embeddings/{table}", (embedding,))
      for table in ("token_embedding", "position_embedding")
    ),
    *(
      Rule(f"{source}.{_TEXT}.{part.replace('/', '.')}", f"{target}/{part}")
      for part in ("encoder/layers", "final_layer_norm")
    ),
    Drop(rf"{re.escape(f'{source}.{_TEXT}')}\.embeddings\.position_ids", "counts from 0", optional=True),
    Drop(rf"{re.escape(source)}\.({stable_diffusion.SCHEDULE})", "constants of the noise schedule", optional=True),
  ]


def depth_alone() -> list[Rule | Drop]:
  """What the file for depth contains in addition to VPD's."""
  return [
    *_sd_model(_DEPTH),
    *(
      Drop(rf"{re.escape(repeated)}\.(.+)", f"repeated of {name}", optional=True, repeats=name)
      for repeated, name in REPEATED.items()
    ),
    Drop(r"encoder\.(gamma|class_embeddings)", "a context of class vectors, which captions replace", optional=True),
  ]


def tadp_segmentation() -> list[Rule | Drop]:
  """TADP on ADE20K. The UNet's last block is in the files, but unused."""
  return [
    *stable_diffusion.unet("unet.unet.diffusion_model", out=True),
    *stable_diffusion.first_stage(f"{_SEGMENTATION}.first_stage_model"),
    *_sd_model(_SEGMENTATION),
    Rule("neck", "neck"),
    Rule("decode_head", "head/decode_head", (*LAYER, *BATCH_NORM)),
    DROP_COUNTERS,
  ]


def repeated(entries: Options) -> dict[str, Fields]:
  """Entries of the depth release that correspond to no array of ours: repeated tensors and constants.

  Args:
    entries: {shape, dtype} by name of the other entries; the result is empty for other releases.
  """
  if not any(name.startswith(SIGNATURES["tadp_depth"]) for name in entries):
    return {}
  result = {name: {"shape": list(value.shape), "dtype": value.dtype.name} for name, value in constants().items()}
  for prefix, original in REPEATED.items():
    for name in [name for name in entries if name.startswith(f"{original}.")]:
      result[prefix + name.removeprefix(original)] = entries[name] | {"alias_of": name}
  return result


def resolved(entry: Options) -> Options:
  """An entry {name, shape, dtype} with the correct "alias_of", independent of the one in the list."""
  for prefix, original in REPEATED.items():
    if entry["name"].startswith(f"{prefix}."):
      return {**entry, "alias_of": original + entry["name"].removeprefix(prefix)}
  return entry


def constants() -> dict[str, np.ndarray]:
  """The noise schedule of Stable Diffusion by the names in the file for depth; see released_segmentation."""
  return {f"encoder.{name}": value for name, value in released_segmentation.constants().items()}
