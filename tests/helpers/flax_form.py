"""Weights in PyTorch's names as Flax has them: a restatement of diffusers' renaming, for what the tests use."""

import re

import numpy as np
from flax import serialization, traverse_util

LISTS = r"\b(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out)\.(\d+)"


def tree(state):
  """Nested dict of arrays."""
  flat = {}
  for name, value in state.items():
    *parts, last = re.sub(LISTS, r"\1_\2", name).split(".")
    if last == "weight" and value.ndim == 4:
      last, value = "kernel", value.transpose(2, 3, 1, 0)
    elif last == "weight" and value.ndim == 2:
      last, value = ("embedding", value) if parts[-1].endswith("_embedding") else ("kernel", value.T)
    flat[(*parts, "scale" if last == "weight" else last)] = np.ascontiguousarray(value)
  return traverse_util.unflatten_dict(flat)


def write(path, state):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(serialization.msgpack_serialize(tree(state)))
  return path
