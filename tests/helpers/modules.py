"""What the constructors of models are given besides their own options, for tests."""

import dataclasses

import jax.numpy as jnp

from vpd_jax.models.backbones.unet import UNetSizes
from vpd_jax.models.backbones.vae import VaeSizes
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.layer_options import Common
from vpd_jax.models.methods.diffusion import MethodSetup

COMMON = Common(jnp.float32, jnp.float32, InitKeys(0))


def grouped(size: int) -> Common:
  """Batch normalization over groups of so many images."""
  return dataclasses.replace(COMMON, norm_group=size)


def setup(unet: UNetSizes, vae: VaeSizes, *, classes: int = 0, common: Common = COMMON, **more) -> MethodSetup:
  """Of a method with so many classes."""
  return MethodSetup(unet, vae, common, class_names=tuple(f"class {i}" for i in range(classes)), **more)
