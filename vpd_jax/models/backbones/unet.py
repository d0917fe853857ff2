"""The UNet of Stable Diffusion 1.x and 2.x, with access to its features and cross-attention maps.

Block lists and parameter names are those of CompVis (`input_blocks`, `middle_block`, `output_blocks`), so that the
forward pass is two loops, conversion only renames arrays, and the feature indices of the papers are valid.

Source: Rombach et al. 2022, https://arxiv.org/abs/2112.10752; CompVis ldm/modules/diffusionmodules/openaimodel.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import attention as attention_lib
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.backbones.attention import Implementation
from vpd_jax.models.backbones.transformer import SpatialTransformer
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array

RematPolicy = Literal["full", "minimal"]


def _saves_products(primitive: Primitive, *args: object, **params: object) -> bool:
  """A policy of jax.checkpoint: keeps results of convolutions, of matrix products with weights, and of attention.

  Scores and other products of activations have batch dimensions and are recomputed, unless a fused kernel has them.
  """
  kept = ("conv_general_dilated", attention_lib.CUDNN_PRIMITIVE)
  return primitive.name in kept or _SAVED_PRODUCTS(primitive, *args, **params)


_POLICIES = jax.checkpoint_policies
_SAVED_PRODUCTS = _POLICIES.save_from_both_policies(
  _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(attention_lib.RESULT)
)
# What a block keeps for the backward pass besides its input; the rest is recomputed.
REMAT_POLICIES: dict[RematPolicy, Callable[..., bool]] = {
  "full": _POLICIES.nothing_saveable,
  "minimal": _saves_products,
}


@dataclasses.dataclass(frozen=True)
class UNetSizes:
  """Sizes of a UNet, as read from a checkpoint's config.

  Attributes:
    in_channels, out_channels: of the latents.
    model_channels: width of the finest level.
    channel_mult: width multiplier per level, finest first.
    num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
    attention_levels: levels with transformer blocks.
    num_heads, head_width: exactly one is set: 8 heads in SD 1.x, 64 channels per head in SD 2.x.
    context_dim: width of the tokens attended to.
    linear_projection: the transformers' projections are matrices (SD 2.x), not 1x1 convolutions.
  """

  in_channels: int = 4
  out_channels: int = 4
  model_channels: int = 320
  channel_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  attention_levels: tuple[int, ...] = (0, 1, 2)
  num_heads: int | None = 8
  head_width: int | None = None
  context_dim: int = 768
  linear_projection: bool = False

  def __post_init__(self):
    if (self.num_heads is None) == (self.head_width is None):
      raise UserError(f"set one of num_heads={self.num_heads} and head_width={self.head_width}, the other to None.")

  def heads(self, width: int) -> int:
    """Number of attention heads at `width` channels."""
    return self.num_heads or width // cast(int, self.head_width)

  @property
  def taps(self) -> tuple[int, ...]:
    """Indices of the output blocks that return the features: the one before each upsampling, and the last."""
    per_level = self.num_res_blocks + 1
    levels = len(self.channel_mult)
    return (*(per_level * (i + 1) - 2 for i in range(levels - 1)), per_level * levels - 1)

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of the features, finest first."""
    return tuple(self.model_channels * m for m in self.channel_mult)


class UNetOutput(NamedTuple):
  """Result of one pass.

  Attributes:
    features: float [B, h, w, C], finest first: output blocks 11, 7, 4, 1 in SD.
    maps: (h, w) -> float [B, h, w, N], cross-attention probabilities averaged over heads and layers.
    noise: float [B, h, w, out_channels], the prediction of the UNet: noise in SD 1.x and 2.1-base, v in 2.1 (768
      pixels), with the same arrays; or None if it was not requested.
  """

  features: tuple[Array, ...]
  maps: dict[tuple[int, ...], Array]
  noise: Array | None


class ResBlock(nnx.Module):
  """GN-SiLU-conv, + Linear(SiLU(time embedding)), GN-SiLU-conv, + skip."""

  def __init__(self, in_width: int, out_width: int, embedding_width: int, **common: Unpack[LayerOptions]):
    norm = lambda width: normalization.GroupNorm(width, epsilon=1e-5, **common)
    self.in_layers = nnx.List([norm(in_width), layers.SiLU(), layers.conv(in_width, out_width, 3, **common)])
    self.emb_layers = nnx.List([layers.SiLU(), layers.linear(embedding_width, out_width, **common)])
    last = layers.conv(out_width, out_width, 3, kernel_init=initializers.zeros, **common)
    self.out_layers = nnx.List([norm(out_width), layers.SiLU(), layers.Identity(), last])
    self.skip_connection = layers.Identity() if in_width == out_width else layers.conv(in_width, out_width, 1, **common)

  def __call__(self, x: Array, embedding: Array) -> Array:
    h = layers.chain(self.in_layers, x)
    h = h + layers.chain(self.emb_layers, embedding)[:, None, None, :]
    return self.skip_connection(x) + layers.chain(self.out_layers, h)


class Downsample(nnx.Module):
  """A 3x3 convolution of stride 2, padded on all sides."""

  def __init__(self, width: int, **common: Unpack[LayerOptions]):
    self.op = layers.conv(width, width, 3, stride=2, **common)

  def __call__(self, x: Array) -> Array:
    return self.op(x)


class Upsample(nnx.Module):
  """Nearest by two, then a 3x3 convolution."""

  def __init__(self, width: int, **common: Unpack[LayerOptions]):
    self.conv = layers.conv(width, width, 3, **common)

  def __call__(self, x: Array) -> Array:
    return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))  # [B, 2h, 2w, C]


class UNet(nnx.Module):
  """Stable Diffusion's UNet, which returns features and attention maps for perception."""

  def __init__(
    self,
    sizes: UNetSizes,
    *,
    with_time_embed: bool = True,
    with_out: bool = True,
    attention: Implementation = "auto",
    remat: RematPolicy | None = None,
    **common: Unpack[LayerOptions],
  ):
    """Builds the blocks.

    Args:
      sizes: see UNetSizes.
      with_time_embed: include the two layers that embed the timestep; MetaPrompts depth removes them.
      with_out: include the last convolution, which predicts the noise; VPD depth removes it.
      attention: implementation of the self-attentions.
      remat: activations of a block that are recomputed in the backward pass: "full" all, "minimal" all but the results
        of convolutions, of matrix products with weights, and of attention; None: none.
      dtype, param_dtype: of computation and of parameters.
      rngs: for the initial parameters.
    """
    self.sizes, self.dtype = sizes, common["dtype"]
    self.remat: RematPolicy | None = remat
    width, levels = sizes.model_channels, len(sizes.channel_mult)
    embedding_width = 4 * width
    res = lambda i, o: ResBlock(i, o, embedding_width, **common)
    transformer = lambda w: SpatialTransformer(
      w, sizes.context_dim, sizes.heads(w), linear=sizes.linear_projection, implementation=attention, **common
    )
    if with_time_embed:
      self.time_embed = nnx.List(
        [
          layers.linear(width, embedding_width, **common),
          layers.SiLU(),
          layers.linear(embedding_width, embedding_width, **common),
        ]
      )
    blocks: list[list[nnx.Module]] = [[layers.conv(sizes.in_channels, width, 3, **common)]]
    skips = [width]
    for level, multiplier in enumerate(sizes.channel_mult):
      for _ in range(sizes.num_res_blocks):
        block: list[nnx.Module] = [res(width, multiplier * sizes.model_channels)]
        width = multiplier * sizes.model_channels
        blocks.append([*block, transformer(width)] if level in sizes.attention_levels else block)
        skips.append(width)
      if level < levels - 1:
        blocks.append([Downsample(width, **common)])
        skips.append(width)
    self.input_blocks = nnx.List([nnx.List(block) for block in blocks])
    self.middle_block = nnx.List([res(width, width), transformer(width), res(width, width)])
    blocks = []
    for level, multiplier in reversed(list(enumerate(sizes.channel_mult))):
      for i in range(sizes.num_res_blocks + 1):
        block = [res(width + skips.pop(), multiplier * sizes.model_channels)]
        width = multiplier * sizes.model_channels
        block += [transformer(width)] if level in sizes.attention_levels else []
        block += [Upsample(width, **common)] if level and i == sizes.num_res_blocks else []
        blocks.append(block)
    self.output_blocks = nnx.List([nnx.List(block) for block in blocks])
    if with_out:
      last = layers.conv(width, sizes.out_channels, 3, kernel_init=initializers.zeros, **common)
      self.out = nnx.List([normalization.GroupNorm(width, epsilon=1e-5, **common), layers.SiLU(), last])

  def embed_time(self, timesteps: int | Array) -> Array:
    """The time embedding of diffusion timesteps: float [1, 4C] for an integer, [B, 4C] for int [B]."""
    return layers.chain(
      self.time_embed, layers.timestep_embedding(timesteps, self.sizes.model_channels).astype(self.dtype)
    )

  def __call__(
    self,
    latents: Array,
    context: Array,
    *,
    timesteps: int | Array | None = None,
    time_embedding: Array | None = None,
    map_max_positions: int = 0,
    predict_noise: bool = False,
  ) -> UNetOutput:
    """Runs the network.

    Args:
      latents: float [B, h, w, in_channels], h and w multiples of 8 (others work: a skip is then resized).
      context: float [B, N, context_dim].
      timesteps: an integer for all images, or int [B]; None if `time_embedding` is given.
      time_embedding: float [1 or B, 4C], replaces the embedded timesteps.
      map_max_positions: return cross-attention maps with at most this number of positions; 0 returns none.
      predict_noise: also run the last convolution, see UNetOutput.

    Raises:
      ValueError: neither or both of `timesteps` and `time_embedding`.

    Source: VPD vpd/models.py register_hier_output, register_attention_control, UNetWrapper.
    """
    if timesteps is not None and time_embedding is None:
      embedding = self.embed_time(timesteps)
    elif timesteps is None and time_embedding is not None:
      embedding = time_embedding.astype(self.dtype)
    else:
      raise UserError("give either timesteps or time_embedding.")
    h, context = latents.astype(self.dtype), context.astype(self.dtype)
    skips, features, maps_by_size = [], [], {}

    def run(block: nnx.List, x: Array, path: str) -> Array:
      x, maps = self._run(block, x, embedding, context, map_max_positions if path != "middle" else 0)
      for m in maps:
        maps_by_size.setdefault(m.shape[1:3], []).append(m)
      return x

    for block in self.input_blocks:
      h = run(block, h, "down")
      skips.append(h)
    h = run(self.middle_block, h, "middle")
    for i, block in enumerate(self.output_blocks):
      skip = layers.resize(skips.pop(), h.shape[1:3])
      h = run(block, jnp.concatenate([h, skip], axis=-1), "up")
      if i in self.sizes.taps:
        features.append(h)
    maps = {size: cast(Array, sum(layer_maps)) / len(layer_maps) for size, layer_maps in maps_by_size.items()}
    return UNetOutput(tuple(features[::-1]), maps, layers.chain(self.out, h) if predict_noise else None)

  def _run(self, block: nnx.List, x: Array, embedding: Array, context: Array, max_positions: int) -> tuple[Array, list]:
    """Applies the modules of one block; with `remat`, recomputes a part of its activations in the backward pass."""

    def call(block: nnx.List, x: Array, embedding: Array, context: Array) -> tuple[Array, list]:
      maps = []
      for module in block:
        if isinstance(module, SpatialTransformer):
          keep_map = x.shape[1] * x.shape[2] <= max_positions
          x, probabilities = layers.traced_once(module, x, context, keep_map=keep_map)
          maps += [] if probabilities is None else [probabilities]
        else:
          x = layers.traced_once(module, x, embedding) if isinstance(module, ResBlock) else module(x)
      return x, maps

    run = nnx.remat(call, policy=REMAT_POLICIES[self.remat]) if self.remat else call
    return run(block, x, embedding, context)
