"""Layers that behave like those of PyTorch where flax's defaults differ.

All map [B, H, W, C] or [B, N, C]; `common` are dtype, param_dtype and rngs, see layer_options.LayerOptions.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.models import initializers
from vpd_jax.models.backbones import normalization
from vpd_jax.models.backbones.cpu_convolution import convolve
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Fields


class SiLU(nnx.Module):
  """x * sigmoid(x); a module, so that list indices match those of the source checkpoint."""

  def __call__(self, x: Array) -> Array:
    return jax.nn.silu(x)


class GELU(nnx.Module):
  """The exact erf form, PyTorch's default."""

  def __call__(self, x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class ReLU(nnx.Module):
  """max(x, 0) with gradient 0 at 0."""

  def __call__(self, x: Array) -> Array:
    return jax.nn.relu(x)


class Identity(nnx.Module):
  """The identity, e.g. in place of dropout with rate 0."""

  def __call__(self, x: Array) -> Array:
    return x


def chain(layers: nnx.List, x: Array, *, training: bool = False) -> Array:
  """Applies the layers in order; passes `training` to batch normalization."""
  for layer in layers:
    x = layer(x, training=training) if isinstance(layer, normalization.BatchNorm) else layer(x)
  return x


def traced_once(module: nnx.Module, *arrays: Array, **options: Any) -> Any:
  """module(*arrays, **options), traced only once for all modules of the same structure and input shapes.

  The blocks of a UNet repeat: its sixteen transformers have four shapes. The compiled program is unchanged.

  Args:
    module: stateless; its attributes other than parameters are hashable.
    arrays: positional arguments.
    options: hashable keyword arguments.
  """
  graphdef, state = nnx.split(module)
  return _call(graphdef, tuple(options.items()), state, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(graphdef: nnx.GraphDef, options: tuple, state: nnx.State, arrays: tuple[Array, ...]) -> Any:
  return nnx.merge(graphdef, state)(*arrays, **dict(options))


def linear(
  in_width: int,
  out_width: int,
  *,
  use_bias: bool = True,
  kernel_init: initializers.Initializer = initializers.lecun_normal,
  **common: Unpack[LayerOptions],
) -> nnx.Linear:
  """A linear layer; the bias is initialized with zeros."""
  init: Fields = {"kernel_init": kernel_init, "bias_init": initializers.zeros}
  return nnx.Linear(in_width, out_width, use_bias=use_bias, **init, **common)


def embed(rows: int, width: int, **common: Unpack[LayerOptions]) -> nnx.Embed:
  """An embedding table, initialized from a normal distribution with variance 1 / width."""
  return nnx.Embed(rows, width, embedding_init=initializers.normal(width**-0.5), **common)


def conv(
  in_width: int,
  out_width: int,
  size: int,
  *,
  stride: int = 1,
  padding: int | None = None,
  use_bias: bool = True,
  kernel_init: initializers.Initializer = initializers.lecun_normal,
  **common: Unpack[LayerOptions],
) -> nnx.Conv:
  """A square convolution with PyTorch's symmetric padding, by default the one that preserves the size at stride 1."""
  pad = (size - 1) // 2 if padding is None else padding
  pads = ((pad, pad), (pad, pad))
  init: Fields = {"kernel_init": kernel_init, "bias_init": initializers.zeros}
  options = {"strides": stride, "padding": pads, "use_bias": use_bias, "conv_general_dilated": convolve}
  return nnx.Conv(in_width, out_width, (size, size), **options, **init, **common)


class ConvTranspose(nnx.Module):
  """Transposed convolution cropped by `padding`, without bias, as torch.nn.ConvTranspose2d.

  The kernel is stored as [kh, kw, in, out]: out[s * i + a - padding] += x[i] @ kernel[a].
  """

  def __init__(
    self,
    in_width: int,
    out_width: int,
    size: int,
    *,
    stride: int = 2,
    padding: int = 0,
    kernel_init: Any,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Output side: (input side - 1) * stride - 2 * padding + size."""
    self.stride, self.padding, self.dtype = stride, padding, dtype
    self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, in_width, out_width), param_dtype))

  def __call__(self, x: Array) -> Array:
    kernel = self.kernel[...].astype(self.dtype)
    pad = kernel.shape[0] - 1 - self.padding
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel[::-1, ::-1],
      (1, 1),
      ((pad, pad), (pad, pad)),
      lhs_dilation=(self.stride, self.stride),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # [B, s*H, s*W, out]


def resize(x: Array, size: Sequence[int], *, method: str = "bilinear") -> Array:
  """Resizes [B, H, W, C] like torch.nn.functional.interpolate(align_corners=False), without antialiasing.

  Args:
    x: float [B, H, W, C].
    size: (H, W) of the result.
    method: "bilinear", or "nearest" with PyTorch's floor(i * in / out).
  """
  if x.shape[1:3] == tuple(size):
    return x
  if method == "nearest":
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]  # [B, *size, C]
  shape = (x.shape[0], *size, x.shape[3])
  high = jnp.promote_types(x.dtype, jnp.float32)
  return jax.image.resize(x.astype(high), shape, "linear", antialias=False).astype(x.dtype)  # [B, *size, C]


def adaptive_avg_pool(x: Array, size: int) -> Array:
  """Means over size x size bins, which overlap if `size` does not divide the sides.

  Bin i of n over H rows covers floor(i H / n) to ceil((i + 1) H / n).

  Args:
    x: float [B, H, W, C], of any sides.
    size: bins per side.

  Returns:
    float [B, size, size, C].

  Source: torch.nn.AdaptiveAvgPool2d.
  """
  high = jnp.promote_types(x.dtype, jnp.float32)

  def bin_weights(side: int) -> Array:
    bins = np.zeros((size, side))
    for i in range(size):
      begin, end = i * side // size, -(-(i + 1) * side // size)
      bins[i, begin:end] = 1 / (end - begin)
    return jnp.asarray(bins, high)

  rows, columns = (bin_weights(side) for side in x.shape[1:3])
  means = jnp.einsum("nh,mw,bhwc->bnmc", rows, columns, x.astype(high), precision="highest")
  return means.astype(x.dtype)


def drop_channels(x: Array, rate: float, key: Array) -> Array:
  """Sets whole channels of [B, H, W, C] to zero with probability `rate`, and divides the others by 1 - rate.

  Source: torch.nn.Dropout2d.
  """
  keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[3]))
  return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def timestep_embedding(timesteps: int | Array, width: int) -> Array:
  """Sinusoidal embedding of diffusion timesteps, cosines first, always float32.

  Args:
    timesteps: an integer, or int [B].
    width: even number of channels.

  Returns:
    float32 [1, width] or [B, width].

  Source: CompVis ldm/modules/diffusionmodules/util.py timestep_embedding.
  """
  half = width // 2
  # On the host, rounded to float32 after each step: exp, cos and sin on devices differ from PyTorch by up to 1e-5.
  exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  if isinstance(timesteps, (int, np.integer)):
    angles = (np.float32(timesteps) * frequencies)[None].astype(np.float64)
    return jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32))
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
