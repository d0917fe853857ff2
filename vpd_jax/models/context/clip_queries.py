"""IEDP's implicit text embeddings: learned queries that attend to CLIP's tokens of an image.

Source: Wang et al. 2024, https://arxiv.org/abs/2404.07600, with the assumptions in presets.iedp_assumptions().
"""

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.backbones.attention import Implementation, attention
from vpd_jax.models.backbones.clip_image import ClipImage, ImageSizes, pixels
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.models.context.context import Context
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Batch


class Attention(nnx.Module):
  """Multi-head attention with biases, from queries to a memory."""

  def __init__(self, width: int, heads: int, *, attention: Implementation, **common: Unpack[LayerOptions]):
    self.heads = heads
    self.attention: Implementation = attention
    self.q_proj, self.k_proj, self.v_proj, self.out_proj = (layers.linear(width, width, **common) for _ in range(4))

  def __call__(self, x: Array, memory: Array) -> Array:
    """Attends from x [B, N, D] to memory [B, M, D]: [B, N, D]."""
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # [B, N, heads, D / heads]
    query, key, value = split(self.q_proj(x)), split(self.k_proj(memory)), split(self.v_proj(memory))
    return self.out_proj(attention(query, key, value, implementation=self.attention).reshape(x.shape))


class QueryBlock(nnx.Module):
  """Pre-norm block: self-attention, cross-attention to the visual features, MLP."""

  def __init__(
    self, width: int, heads: int, ffn_ratio: int, *, attention: Implementation, **common: Unpack[LayerOptions]
  ):
    self.norm1, self.norm2, self.norm_visual, self.norm3 = (normalization.LayerNorm(width, **common) for _ in range(4))
    self.self_attn = Attention(width, heads, attention=attention, **common)
    self.cross_attn = Attention(width, heads, attention=attention, **common)
    hidden = ffn_ratio * width
    self.ffn = nnx.List([layers.linear(width, hidden, **common), layers.GELU(), layers.linear(hidden, width, **common)])

  def __call__(self, queries: Array, visual: Array) -> Array:
    """[B, N, D] and [B, L, D] to [B, N, D]."""
    normed = self.norm1(queries)
    queries = queries + self.self_attn(normed, normed)
    queries = queries + self.cross_attn(self.norm2(queries), self.norm_visual(visual))
    return queries + layers.chain(self.ffn, self.norm3(queries))


class ImplicitText(nnx.Module):
  """CLIP's tokens of an image to implicit text embeddings: projector, learned queries, blocks."""

  def __init__(
    self,
    in_width: int,
    width: int,
    *,
    num_queries: int,
    query_init: float,
    num_blocks: int,
    num_heads: int,
    ffn_ratio: int,
    output_norm: str,
    attention: Implementation,
    **common: Unpack[LayerOptions],
  ):
    rngs, param_dtype, self.dtype = common["rngs"], common["param_dtype"], common["dtype"]
    self.projector = nnx.List(
      [layers.linear(in_width, width, **common), layers.GELU(), layers.linear(width, width, **common)]
    )
    initial = initializers.normal(query_init)(rngs.params(), (num_queries, width), param_dtype)
    self.queries = nnx.Param(initial)
    self.blocks = nnx.List(
      [QueryBlock(width, num_heads, ffn_ratio, attention=attention, **common) for _ in range(num_blocks)]
    )
    self.output_norm = normalization.LayerNorm(width, **common) if output_norm == "ln" else layers.Identity()

  def __call__(self, features: Array) -> Array:
    """[B, L, Dv] to [B, N, D]."""
    visual = layers.chain(self.projector, features)
    queries = self.queries[...].astype(self.dtype)
    x = jnp.broadcast_to(queries, (features.shape[0], *queries.shape))
    for block in self.blocks:
      x = block(x, visual)
    return self.output_norm(x)


class ClipQueries(Context):
  """Learned queries that attend to the tokens of CLIP's frozen image encoder."""

  def __init__(
    self,
    sizes: ImageSizes,
    width: int,
    *,
    resize: str,
    features: str,
    tower_dtype: DTypeLike,
    num_queries: int,
    **block: Any,
  ):
    """Builds encoder and queries.

    Args:
      sizes: of the image encoder.
      width: D, of the UNet's context.
      resize: interpolation of CLIP's input, "bicubic" or "bilinear".
      features: "last", the tokens after the last layer, or "penultimate".
      tower_dtype: storage dtype of the encoder; it computes in `dtype`.
      num_queries: N.
      **block: further arguments of ImplicitText.
    """
    common = {name: block[name] for name in ("dtype", "rngs")}
    self.tokens, self.dtype = (num_queries, width), common["dtype"]
    self.clip_resize, self.layer = resize, {"last": -1, "penultimate": -2}[features]
    self.image_encoder = as_buffers(ClipImage(sizes, projected=False, **common, param_dtype=tower_dtype))
    self.implicit = ImplicitText(sizes.width, width, num_queries=num_queries, **block)

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Implicit text embeddings of "image", uint8 [B, H, W, 3] or float in [0, 1]: float [B, N, D]."""
    size = self.image_encoder.image_size
    image = pixels(batch["image"], size, dtype=self.dtype, resize=self.clip_resize)
    return self.implicit(self.image_encoder(image).hidden[self.layer])
