"""A whole method in one file: the UNet attends to the same zeros for every image."""

import jax.numpy as jnp

from vpd_jax.models.context.context import Context
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod
from vpd_jax.models.methods.image_input import PaddedInput


class Zeros(Context):
  """One token of zeros."""

  def __init__(self, width, dtype):
    self.tokens, self.dtype = (1, width), dtype

  def __call__(self, batch, step=0):
    return jnp.zeros((batch["image"].shape[0], *self.tokens), self.dtype)


class Constant(DiffusionMethod):
  """The UNet's features without any text."""

  def __init__(self, setup, *, pad_multiple: int = 64):
    context = Zeros(setup.unet.context_dim, setup.common.dtype)
    super().__init__(setup, fit=PaddedInput(pad_multiple, 0.0), context=context, time=ConstantTime(1), latent_scale=1.0)
