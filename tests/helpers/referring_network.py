"""The authors' tiny network of referring segmentation: parts, weights, inputs."""

import jax.numpy as jnp
import numpy as np

from tests.helpers import fill, modules, oracle
from vpd_jax.config.presets import referring
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released_referring
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones.unet import UNetSizes
from vpd_jax.models.backbones.vae import VaeSizes
from vpd_jax.models.context.class_vectors import AllClasses
from vpd_jax.models.heads.lavt import Lavt
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.layer_options import Common
from vpd_jax.models.methods.vpd import Vpd
from vpd_jax.models.perception_model import PerceptionModel

RECIPE = referring.referring_optimizer(num_steps=40_000)
AS_RUN, DECAY = RECIPE["lr_groups"], RECIPE["decay_groups"]
CLASS_VECTORS = "method/class_vectors"


class OfSentences(AllClasses):
  """Ready states of a sentence in place of the vectors."""

  def __call__(self, batch, step=0):
    return self.adapt(batch["text_states"].astype(self.dtype))


class NoNeck:
  """Hands on what it gets."""

  def __call__(self, features, *, training):
    return features


def describe(tokens, dtype=jnp.float32, unet_sizes=None, vae_sizes=None, width=64):
  """The parts of the authors' network, the tiny one by default."""
  unet_sizes = unet_sizes or UNetSizes(model_channels=32, context_dim=64)
  vae_sizes = vae_sizes or VaeSizes(channels=32)

  def build():
    kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": InitKeys(0)}
    setup = modules.setup(unet_sizes, vae_sizes, classes=tokens, common=Common(**kinds))
    method = Vpd(setup, prompt="all_classes", attention_maps=True, keep_unused=True)
    method.context = OfSentences(tokens, unet_sizes.context_dim, method.context.adapt, **kinds)
    return PerceptionModel(method, NoNeck(), Lavt(method.map_info, setup.common, width=width))

  return params_lib.describe(build)


def weights(parts, tokens, dtype=np.float32):
  """The authors' rebuilt weights under our names."""
  shapes = {name: s for name, s in parts.shapes.items() if name != CLASS_VECTORS}
  named, _ = rules.convert(oracle.weights(f"vpd_refer_{tokens}"), released_referring.vpd_refer(), shapes)
  unused = {CLASS_VECTORS: np.zeros(parts.shapes[CLASS_VECTORS].shape, dtype)}
  return {name: jnp.asarray(x, dtype) for name, x in (named | unused).items()}


def batch_of(tokens, dtype=jnp.float32):
  image = fill.uniform("input/image", (2, 3, 128, 128), 0, -1, 1).transpose(0, 2, 3, 1).astype(dtype)
  return {
    "image": jnp.asarray((image + 1) / 2),
    "text_states": jnp.asarray(fill.normal("input/text", (2, tokens, 64), 0), dtype),
    "mask": jnp.asarray(fill.integers("input/target", (2, 128, 128), 2, 0), jnp.uint8),
  }
