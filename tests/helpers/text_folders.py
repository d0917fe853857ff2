"""A small text encoder and its tokenizer, in files as diffusers and transformers have them."""

import json

import jax.numpy as jnp
import numpy as np

from vpd_jax.convert import rules
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import clip
from vpd_jax.models.backbones.clip_text import ClipText, TextSizes
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.parameters import describe

MERGES = ("o f</w>", "t h", "th e</w>", "p h", "o t", "ph ot", "phot o</w>", "r o", "ro o", "roo m</w>")
CHARACTERS = [chr(code) for code in range(33, 127)]
WORDS = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), *(m.replace(" ", "") for m in MERGES)]
VOCABULARY = {word: i for i, word in enumerate([*WORDS, "<|startoftext|>", "<|endoftext|>"])}
SIZES = TextSizes(vocab_size=len(VOCABULARY), width=16, layers=2, heads=2, mlp_width=32, positions=32)


def text_config(sizes):
  """As Stable Diffusion 1.x has it."""
  return {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": sizes.vocab_size,
    "hidden_size": sizes.width, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
    "intermediate_size": sizes.mlp_width, "max_position_embeddings": sizes.positions, "projection_dim": sizes.width,
    "hidden_act": sizes.activation, "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
  }  # fmt: skip


def random_weights(sizes):
  """Our names, large enough that every word counts."""
  kinds, rng = {"dtype": jnp.float32, "param_dtype": jnp.float32}, np.random.default_rng(0)
  parts = describe(lambda: ClipText(sizes, **kinds, rngs=InitKeys(0)))
  return {name: (0.3 * rng.normal(size=x.shape)).astype(np.float32) for name, x in parts.shapes.items()}


def write_tokenizer(folder, vocabulary=VOCABULARY):
  folder.mkdir(parents=True)
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
  special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
  special |= {"pad_token": "<|endoftext|>", "do_lower_case": True, "model_max_length": 77}
  (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))


def write_diffusers(folder, sizes=SIZES, vocabulary=VOCABULARY):
  """The half of a diffusers folder that encodes text."""
  table = clip.text(["text_model.final_layer_norm.weight"])
  write.write(folder / "text_encoder" / "model.safetensors", rules.to_source(random_weights(sizes), table))
  (folder / "text_encoder" / "config.json").write_text(json.dumps(text_config(sizes)))
  write_tokenizer(folder / "tokenizer", vocabulary)
  return folder
