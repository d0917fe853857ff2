"""Small trained networks between frozen text and the UNet."""

from typing import Unpack

from flax import nnx

from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.models.parameters import Inlined
from vpd_jax.types import Array


class TextAdapter(nnx.Module):
  """Two linear layers around an exact GELU."""

  def __init__(self, width: int, **common: Unpack[LayerOptions]):
    linear = lambda: layers.linear(width, width, kernel_init=initializers.torch_default, **common)
    self.fc = nnx.List([linear(), layers.GELU(), linear()])

  def __call__(self, text: Array) -> Array:
    return layers.chain(self.fc, text)


class ResidualAdapter(Inlined):
  """text + gamma * adapter(text), float [B, N, D].

  Source: VPD depth/models_depth/model.py VPDDepthEncoder.
  """

  def __init__(self, width: int, scale: float, **common: Unpack[LayerOptions]):
    """`scale`: initial gamma."""
    self.dtype = common["dtype"]
    self.gamma = nnx.Param(initializers.constant(scale)(common["rngs"].params(), (width,), common["param_dtype"]))
    self.text_adapter = TextAdapter(width, **common)

  def __call__(self, text: Array) -> Array:
    return text + self.gamma[...].astype(self.dtype)[None, None] * self.text_adapter(text)


Adapter = ResidualAdapter | layers.Identity
