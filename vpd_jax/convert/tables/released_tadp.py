"""The authors' checkpoints of TADP: on NYU Depth v2, and on ADE20K.

Both hold Stable Diffusion whole, as "sd_model": the frozen text encoder, and the constants of its noise schedule, which
no computation uses: they are left out on reading and written anew on export. In the file for depth VAE and UNet stand
there a second time.

Source: TADP TADP/tadp_depth.py, TADP/tadp_seg_mm.py.
"""

import re

import numpy as np

from vpd_jax.convert.rules import BATCH_NORM, DROP_COUNTERS, LAYER, Drop, Rule, drop, embedding
from vpd_jax.convert.tables import released_segmentation, stable_diffusion
from vpd_jax.types import Fields, Options

_TEXT = "cond_stage_model.transformer.text_model"
_DEPTH = "encoder.sd_model"
_SEGMENTATION = "sd_model"
# Prefixes that no other release has.
SIGNATURES = {"tadp_depth": f"{_DEPTH}.cond_stage_model.", "tadp_segmentation": f"{_SEGMENTATION}.cond_stage_model."}
# In the file for depth: what repeats, and what is repeated.
REPEATED = {
  f"{_DEPTH}.model.diffusion_model": "encoder.unet.unet.diffusion_model",
  f"{_DEPTH}.first_stage_model": "encoder.encoder_vq",
}
# The order in which Stable Diffusion and the text encoder register their children, behind that of "sd_model".
ORDER = (
  "model first_stage_model cond_stage_model token_embedding position_embedding self_attn k_proj v_proj q_proj out_proj "
  "layer_norm1 mlp fc1 fc2 layer_norm2 final_layer_norm"
)


def stable_diffusion_whole(source: str) -> list[Rule | Drop]:
  """What both files hold below `source` but for VAE and UNet."""
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
    drop(rf"{re.escape(f'{source}.{_TEXT}')}\.embeddings\.position_ids", "counts from 0", optional=True),
    drop(rf"{re.escape(source)}\.({stable_diffusion.SCHEDULE})", "constants of the noise schedule", optional=True),
  ]


def depth_alone() -> list[Rule | Drop]:
  """What the file for depth holds and VPD's does not."""
  return [
    *stable_diffusion_whole(_DEPTH),
    *(
      Drop(rf"{re.escape(repeated)}\.(.+)", f"repeated of {name}", optional=True, repeats=name)
      for repeated, name in REPEATED.items()
    ),
    drop(r"encoder\.(gamma|class_embeddings)", "a context of class vectors, which captions replace", optional=True),
  ]


def tadp_segmentation() -> list[Rule | Drop]:
  """TADP on ADE20K. The UNet's last block is in the files and used by nothing."""
  return [
    *stable_diffusion.unet("unet.unet.diffusion_model", out=True),
    *stable_diffusion.first_stage(f"{_SEGMENTATION}.first_stage_model"),
    *stable_diffusion_whole(_SEGMENTATION),
    Rule("neck", "neck"),
    Rule("decode_head", "head/decode_head", (*LAYER, *BATCH_NORM)),
    DROP_COUNTERS,
  ]


def repeated(entries: Options) -> dict[str, Fields]:
  """Entries of the release for depth that stand for no array of ours: repeated ones, and the constants.

  Args:
    entries: {shape, dtype} by name of all that do; of any release, there are none for the others.
  """
  if not any(name.startswith(SIGNATURES["tadp_depth"]) for name in entries):
    return {}
  found = {name: {"shape": list(value.shape), "dtype": value.dtype.name} for name, value in constants().items()}
  for prefix, original in REPEATED.items():
    for name in [name for name in entries if name.startswith(f"{original}.")]:
      found[prefix + name.removeprefix(original)] = entries[name] | {"alias_of": name}
  return found


def resolved(entry: Options) -> Options:
  """An entry of a list of names, shapes and dtypes, told of which array of ours it is, whatever the list says."""
  for prefix, original in REPEATED.items():
    if entry["name"].startswith(f"{prefix}."):
      return {**entry, "alias_of": original + entry["name"].removeprefix(prefix)}
  return entry


def constants() -> dict[str, np.ndarray]:
  """Those of Stable Diffusion's noise schedule, by the names in the file for depth; see released_segmentation."""
  return {f"encoder.{name}": value for name, value in released_segmentation.constants().items()}
