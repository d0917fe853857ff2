"""A method for tests: two branches, ready latents, a host transform of its own, nothing else."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.models.backbones import layers
from vpd_jax.types import Branch, Features, MapInfo


class TwoBranches(nnx.Module):
  """A method that learns from the latents and, at half the weight, from their negative, and evaluates the first."""

  needs = prepare_outputs = frozenset({"latents"})
  prepare_inputs = frozenset()
  map_info = MapInfo((16, 16, 16, 16), (8, 16, 32, 64), tokens=(1, 16))
  sentence_tokens, attends_to_classes, notes, training_only, text_options = None, False, (), (), ()
  class_predictor, sentence_summary, samples_latents = None, None, False

  def __init__(self, setup):
    self.mix = nnx.List([layers.conv(4, 16, 1, **setup.common.layer) for _ in range(4)])

  @staticmethod
  def prepare(example):
    """Latents made on the host: means of the image's squares of 8 by 8, and a column of ones."""
    height, width = (side // 8 for side in example["image"].shape[:2])
    means = example["image"].reshape(height, 8, width, 8, 3).mean((1, 3)) / 255
    return example | {"latents": np.concatenate([means, np.ones((height, width, 1))], axis=-1).astype(np.float32)}

  def branches(self, training):
    return (Branch("plain", 1.0), Branch("negative", 0.5))[: 2 if training else 1]

  def __call__(self, batch, *, training, key=None):
    x = batch["latents"].astype(self.mix[0].dtype)
    x = jnp.concatenate([x, -x]) if training else x
    maps = tuple(mix(x[:, :: 2**i, :: 2**i]) for i, mix in enumerate(self.mix))
    return Features(maps, x[:, 0], tuple(batch["image"].shape[1:3]))
