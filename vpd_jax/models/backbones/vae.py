"""The encoder of Stable Diffusion's autoencoder.

Source: Rombach et al. 2022, https://arxiv.org/abs/2112.10752; CompVis ldm/modules/diffusionmodules/model.py.
"""

import dataclasses
from typing import NamedTuple, Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.backbones.attention import Implementation, attention
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Buffer


@dataclasses.dataclass(frozen=True)
class VaeSizes:
  """Sizes of the encoder.

  Attributes:
    channels: width of the finest level.
    channel_mult: width multiplier per level, finest first.
    num_res_blocks: residual blocks per level.
    z_channels: channels of the latents.
    latent_scale: scaling factor of the latents on which the UNet was trained; 0.18215 in SD 1.x and 2.x. The encoder
      does not apply it.
  """

  channels: int = 128
  channel_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  z_channels: int = 4
  latent_scale: float = 0.18215

  @property
  def stride(self) -> int:
    """Pixels of the image along a side of one latent: 8 in SD."""
    return 2 ** (len(self.channel_mult) - 1)


class Posterior(NamedTuple):
  """Gaussian over latents: `mean` (its mode) and `log_variance`, each float [B, H/8, W/8, z_channels], not scaled."""

  mean: Array
  log_variance: Array

  def sample(self, noise: Array) -> Array:
    """Samples latents from standard normal noise, float [B, H/8, W/8, z_channels]."""
    return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class ResBlock(nnx.Module):
  """GN-SiLU-conv twice, + skip."""

  def __init__(self, in_width: int, out_width: int, **common: Unpack[LayerOptions]):
    self.norm1 = normalization.GroupNorm(in_width, epsilon=1e-6, **common)
    self.conv1 = layers.conv(in_width, out_width, 3, **common)
    self.norm2 = normalization.GroupNorm(out_width, epsilon=1e-6, **common)
    self.conv2 = layers.conv(out_width, out_width, 3, **common)
    self.nin_shortcut = layers.conv(in_width, out_width, 1, **common) if in_width != out_width else None

  def __call__(self, x: Array) -> Array:
    h = self.conv1(nnx.silu(self.norm1(x)))
    h = self.conv2(nnx.silu(self.norm2(h)))
    return (self.nin_shortcut(x) if self.nin_shortcut else x) + h


class AttentionBlock(nnx.Module):
  """Self-attention with one head over all positions, + skip."""

  def __init__(self, width: int, implementation: Implementation, **common: Unpack[LayerOptions]):
    self.implementation: Implementation = implementation
    self.norm = normalization.GroupNorm(width, epsilon=1e-6, **common)
    self.q, self.k, self.v, self.proj_out = (layers.conv(width, width, 1, **common) for _ in range(4))

  def __call__(self, x: Array) -> Array:
    h = self.norm(x)
    one_head = lambda y: y.reshape(x.shape[0], -1, 1, x.shape[-1])  # [B, N, 1, C]
    h = attention(one_head(self.q(h)), one_head(self.k(h)), one_head(self.v(h)), implementation=self.implementation)
    return x + self.proj_out(h.reshape(x.shape))  # [B, h, w, C]


class Downsample(nnx.Module):
  """A 3x3 convolution of stride 2 over an input padded by one at the right and bottom only."""

  def __init__(self, width: int, **common: Unpack[LayerOptions]):
    self.conv = layers.conv(width, width, 3, stride=2, padding=0, **common)

  def __call__(self, x: Array) -> Array:
    return self.conv(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))  # [B, floor(h/2), floor(w/2), C]


class Level(nnx.Module):
  """The residual blocks of one resolution, and downsampling."""

  def __init__(self, in_width: int, out_width: int, blocks: int, last: bool, **common: Unpack[LayerOptions]):
    self.block = nnx.List([ResBlock(in_width if i == 0 else out_width, out_width, **common) for i in range(blocks)])
    self.downsample = None if last else Downsample(out_width, **common)

  def __call__(self, x: Array) -> Array:
    for block in self.block:
      x = layers.traced_once(block, x)
    return self.downsample(x) if self.downsample else x


class Middle(nnx.Module):
  """Residual block, attention, residual block."""

  def __init__(self, width: int, implementation: Implementation, **common: Unpack[LayerOptions]):
    self.block_1 = ResBlock(width, width, **common)
    self.attn_1 = AttentionBlock(width, implementation, **common)
    self.block_2 = ResBlock(width, width, **common)

  def __call__(self, x: Array) -> Array:
    x = self.attn_1(layers.traced_once(self.block_1, x))
    return layers.traced_once(self.block_2, x)


class Encoder(nnx.Module):
  """Image to the moments of the latents."""

  def __init__(self, sizes: VaeSizes, implementation: Implementation, **common: Unpack[LayerOptions]):
    widths = [sizes.channels * m for m in sizes.channel_mult]
    inputs = [sizes.channels, *widths[:-1]]
    self.conv_in = layers.conv(3, sizes.channels, 3, **common)
    self.down = nnx.List(
      [
        Level(i, o, sizes.num_res_blocks, last=level == len(widths) - 1, **common)
        for level, (i, o) in enumerate(zip(inputs, widths, strict=True))
      ]
    )
    self.mid = Middle(widths[-1], implementation, **common)
    self.norm_out = normalization.GroupNorm(widths[-1], epsilon=1e-6, **common)
    self.conv_out = layers.conv(widths[-1], 2 * sizes.z_channels, 3, **common)

  def __call__(self, x: Array) -> Array:
    h = self.mid(layers.chain(self.down, self.conv_in(x)))
    return self.conv_out(nnx.silu(self.norm_out(h)))


class UnusedConv(nnx.Module):
  """An unused 1x1 convolution, kept so that complete checkpoints can be exported."""

  def __init__(self, width: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs, dtype: DTypeLike):
    del dtype
    self.kernel = Buffer(initializers.lecun_normal(rngs.params(), (1, 1, width, width), param_dtype))
    self.bias = Buffer(initializers.zeros(rngs.params(), (width,), param_dtype))


class VaeEncoder(nnx.Module):
  """Image to the posterior over latents, eight times smaller."""

  def __init__(self, sizes: VaeSizes, *, attention: Implementation = "auto", **common: Unpack[LayerOptions]):
    """`attention`: implementation of the single attention layer, over all H/8 x W/8 positions."""
    self.dtype = common["dtype"]
    self.encoder = Encoder(sizes, attention, **common)
    self.quant_conv = layers.conv(2 * sizes.z_channels, 2 * sizes.z_channels, 1, **common)
    self.post_quant_conv = UnusedConv(sizes.z_channels, **common)

  def __call__(self, image: Array) -> Posterior:
    """Encodes float [B, H, W, 3] in [-1, 1], sides multiples of 8."""
    moments = self.quant_conv(self.encoder(image.astype(self.dtype)))
    mean, log_variance = jnp.split(moments, 2, axis=-1)  # [B, H/8, W/8, z_channels] each
    return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))
