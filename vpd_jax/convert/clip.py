"""CLIP's text encoder in Hugging Face's names, from its own folder or from inside a Stable Diffusion file."""

import re
from collections.abc import Iterable

from vpd_jax.convert.rules import Drop, Rule, drop, embedding

# Longest first. In a diffusers folder and in SD 1.x files the names go on with `text_model.`; some files leave it out.
PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model.", "")
OTHER_PARTS = r"(vision_model|visual_projection)\..*|logit_scale"


def text(source: Iterable[str]) -> list[Rule | Drop]:
  """Table for the spelling that the source's names are in.

  Raises:
    ValueError: names of no known spelling; OpenCLIP's own, inside SD 2.x files, are named.
  """
  names = set(source)
  if any(name.startswith("cond_stage_model.model.") for name in names):
    raise ValueError("this file holds a text encoder in OpenCLIP's own names; give the diffusers folder of the model.")
  prefix = next((p for p in PREFIXES if f"{p}final_layer_norm.weight" in names), None)
  if prefix is None:
    raise ValueError(
      "no text encoder: no name ends in 'final_layer_norm.weight'; give a CLIP or Stable Diffusion source."
    )
  embeddings = [
    Rule(f"{prefix}embeddings.{table}", f"text_model/embeddings/{table}", (embedding,))
    for table in ("token_embedding", "position_embedding")
  ]
  return [
    *embeddings,
    Rule(f"{prefix}encoder.layers", "text_model/encoder/layers"),
    Rule(f"{prefix}final_layer_norm", "text_model/final_layer_norm"),
    drop(rf"{re.escape(prefix)}embeddings\.position_ids", "counts from 0, stored by older versions", optional=True),
    drop(r"text_projection\..*", "the vectors before the projection are used", optional=True),
    drop(
      r"(?!cond_stage_model\.).*" if prefix.startswith("cond_") else OTHER_PARTS, "not the text encoder", optional=True
    ),
  ]
