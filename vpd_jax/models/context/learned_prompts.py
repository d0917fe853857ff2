"""MetaPrompts' learned prompts.

Source: Wan et al. 2023, https://arxiv.org/abs/2312.14733; MetaPrompts depth/models_depth/model.py.
"""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.context.adapters import TextAdapter
from vpd_jax.models.context.context import Context
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Batch


class LearnedPrompts(Context):
  """Learned tokens, the same for all images: one set per pass of the UNet, or one set for all passes."""

  def __init__(self, prompts: int, width: int, steps: int, *, share: bool, adapt: bool, **common: Unpack[LayerOptions]):
    """Initializes the prompts.

    Args:
      prompts: N.
      width: D, of the UNet's context.
      steps: passes of the UNet.
      share: one set of prompts for all passes.
      adapt: apply a TextAdapter without residual, one per pass.
      **common: dtype, param_dtype and rngs.

    Raises:
      ValueError: no prompts.
    """
    if prompts < 1:
      raise UserError(f"method.prompts={prompts} must be at least 1.")
    draw = lambda: initializers.normal(1.0)(common["rngs"].params(), (prompts, width), common["param_dtype"])
    self.tokens, self.dtype = (prompts, width), common["dtype"]
    self.meta_prompts = nnx.List([nnx.Param(draw()) for _ in range(1 if share else steps)])
    self.text_adapter = nnx.List([TextAdapter(width, **common) for _ in range(steps if adapt else 0)])

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, N, D]."""
    prompts = self.meta_prompts[min(step, len(self.meta_prompts) - 1)][...].astype(self.dtype)
    if self.text_adapter:
      prompts = self.text_adapter[step](prompts)
    return jnp.broadcast_to(prompts, (batch["image"].shape[0], *prompts.shape))
