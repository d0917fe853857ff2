"""The transformer blocks of Stable Diffusion's UNet.

Source: CompVis ldm/modules/attention.py.
"""

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx

from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.backbones.attention import Implementation, attention, attention_with_map
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array


class CrossAttention(nnx.Module):
  """Multi-head attention from x to `context`, or to x itself."""

  def __init__(
    self, width: int, context_width: int, heads: int, implementation: Implementation, **common: Unpack[LayerOptions]
  ):
    self.heads = heads
    self.implementation: Implementation = implementation
    self.to_q = layers.linear(width, width, use_bias=False, **common)
    self.to_k = layers.linear(context_width, width, use_bias=False, **common)
    self.to_v = layers.linear(context_width, width, use_bias=False, **common)
    self.to_out = nnx.List([layers.linear(width, width, **common)])

  def __call__(self, x: Array, context: Array, *, keep_map: bool = False) -> tuple[Array, Array | None]:
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # [B, N, heads, D]
    query, key, value = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
    probabilities = None
    if keep_map:
      out, probabilities = attention_with_map(query, key, value)
    else:
      out = attention(query, key, value, implementation=self.implementation)
    return self.to_out[0](out.reshape(x.shape)), probabilities


class GEGLU(nnx.Module):
  """The first half of a projection times the exact GELU of the second."""

  def __init__(self, width: int, out_width: int, **common: Unpack[LayerOptions]):
    self.proj = layers.linear(width, 2 * out_width, **common)

  def __call__(self, x: Array) -> Array:
    value, gate = jnp.split(self.proj(x), 2, axis=-1)
    return value * layers.GELU()(gate)


class FeedForward(nnx.Module):
  """GEGLU to four times the width, and back."""

  def __init__(self, width: int, **common: Unpack[LayerOptions]):
    self.net = nnx.List(
      [GEGLU(width, 4 * width, **common), layers.Identity(), layers.linear(4 * width, width, **common)]
    )

  def __call__(self, x: Array) -> Array:
    return layers.chain(self.net, x)


class TransformerBlock(nnx.Module):
  """Self-attention, cross-attention and feed-forward, each with LayerNorm before and a skip around it."""

  def __init__(
    self, width: int, context_width: int, heads: int, implementation: Implementation, **common: Unpack[LayerOptions]
  ):
    self.attn1 = CrossAttention(width, width, heads, implementation, **common)
    self.ff = FeedForward(width, **common)
    self.attn2 = CrossAttention(width, context_width, heads, "xla", **common)
    self.norm1, self.norm2, self.norm3 = (normalization.LayerNorm(width, **common) for _ in range(3))

  def __call__(self, x: Array, context: Array, *, keep_map: bool) -> tuple[Array, Array | None]:
    y = self.norm1(x)
    x = self.attn1(y, y)[0] + x
    y, probabilities = self.attn2(self.norm2(x), context, keep_map=keep_map)
    x = y + x
    return self.ff(self.norm3(x)) + x, probabilities


class SpatialTransformer(nnx.Module):
  """The transformer block over the positions of a feature map."""

  def __init__(
    self,
    width: int,
    context_width: int,
    heads: int,
    *,
    linear: bool,
    implementation: Implementation,
    **common: Unpack[LayerOptions],
  ):
    """`linear`: the projections are matrices (SD 2.x), not 1x1 convolutions."""

    def project(**more: Any) -> nnx.Module:
      return layers.linear(width, width, **more) if linear else layers.conv(width, width, 1, **more)

    self.norm = normalization.GroupNorm(width, epsilon=1e-6, **common)
    self.proj_in = project(**common)
    self.transformer_blocks = nnx.List([TransformerBlock(width, context_width, heads, implementation, **common)])
    self.proj_out = project(kernel_init=initializers.zeros, **common)

  def __call__(self, x: Array, context: Array, *, keep_map: bool) -> tuple[Array, Array | None]:
    # A 1x1 convolution and a linear layer over the last axis are equivalent, so that the same reshapes work for both.
    h = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])  # [B, N, C]
    h, probabilities = self.transformer_blocks[0](h, context, keep_map=keep_map)
    h = self.proj_out(h.reshape(x.shape))  # [B, h, w, C]
    if probabilities is not None:
      probabilities = probabilities.reshape(*x.shape[:3], -1)  # [B, h, w, N]
    return h + x, probabilities
