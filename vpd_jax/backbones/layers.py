"""Layers that behave as PyTorch's do where flax's defaults differ, one home for each.

All take and return [B, H, W, C] or [B, N, C]. `kinds` stands for the keyword arguments dtype, param_dtype and rngs
that every constructor takes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.backbones import initializers
from vpd_jax.backbones.convolution import convolve
from vpd_jax.types import Array


class SiLU(nnx.Module):
  """x * sigmoid(x); stands in lists so that positions keep the source checkpoint's numbers."""

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
  """Place of a layer that does nothing here, such as a dropout of rate 0."""

  def __call__(self, x: Array) -> Array:
    return x


def chain(layers: nnx.List, x: Array, *, training: bool = False) -> Array:
  """Applies the layers in order; batch normalisation is told whether this is training."""
  for layer in layers:
    x = layer(x, training=training) if isinstance(layer, BatchNorm) else layer(x)
  return x


def traced_once(module: nnx.Module, *arrays: Array, **options: Any) -> Any:
  """module(*arrays, **options), traced a single time for all modules of one build and one shape of inputs.

  The blocks of a UNet repeat: its sixteen transformers have four shapes. The compiled program is the same.

  Args:
    module: keeps no state; its attributes beside the parameters can be hashed.
    arrays: what it is called with.
    options: hashable keywords.
  """
  graphdef, state = nnx.split(module)
  return _call(graphdef, tuple(options.items()), state, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(graphdef: nnx.GraphDef, options: tuple, state: nnx.State, arrays: tuple[Array, ...]) -> Any:
  return nnx.merge(graphdef, state)(*arrays, **dict(options))


def linear(in_width: int, out_width: int, **kinds: Any) -> nnx.Linear:
  """A linear layer; kernel from LeCun's initializer, bias from zeros, where nothing else is given."""
  return nnx.Linear(in_width, out_width, **(_INITS | kinds))


def embed(rows: int, width: int, **kinds: Any) -> nnx.Embed:
  """A table of vectors, normal with variance 1 / width."""
  return nnx.Embed(rows, width, embedding_init=initializers.normal(width**-0.5), **kinds)


def conv(
  in_width: int, out_width: int, size: int, *, stride: int = 1, padding: int | None = None, **kinds: Any
) -> nnx.Conv:
  """A square convolution with PyTorch's symmetric padding, by default the one that keeps the size at stride 1."""
  pad = (size - 1) // 2 if padding is None else padding
  pads = ((pad, pad), (pad, pad))
  return nnx.Conv(
    in_width,
    out_width,
    (size, size),
    strides=stride,
    padding=pads,
    conv_general_dilated=convolve,
    **(_INITS | kinds),
  )


_INITS = {"kernel_init": initializers.lecun_normal, "bias_init": initializers.zeros}


class GroupNorm(nnx.Module):
  """Normalises groups of channels over all positions, statistics in float32 or wider whatever the dtype.

  As SD's GroupNorm32. Sums run over positions first, channel by channel, and only then over the channels of a group:
  on CPU the gradient takes a third to a half of the time of a reduction over [H, W, G, C / G] at once.
  """

  def __init__(self, width: int, *, groups: int = 32, epsilon: float, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
    """`groups` divides `width`."""
    self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
    self.scale = nnx.Param(initializers.ones(rngs.params(), (width,), param_dtype))
    self.bias = nnx.Param(initializers.zeros(rngs.params(), (width,), param_dtype))

  def __call__(self, x: Array) -> Array:
    """Normalises [B, H, W, C]."""
    high = jnp.promote_types(self.dtype, jnp.float32)
    scale, bias = self.scale[...].astype(high), self.bias[...].astype(high)
    return _group_normalized(x, scale, bias, self.groups, self.epsilon).astype(self.dtype)


class LayerNorm(nnx.Module):
  """Normalises the last axis with PyTorch's epsilon of 1e-5, statistics in float32 or wider whatever the dtype."""

  def __init__(self, width: int, *, epsilon: float = 1e-5, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
    self.epsilon, self.dtype = epsilon, dtype
    self.scale = nnx.Param(initializers.ones(rngs.params(), (width,), param_dtype))
    self.bias = nnx.Param(initializers.zeros(rngs.params(), (width,), param_dtype))

  def __call__(self, x: Array) -> Array:
    """Normalises [..., C]."""
    high = jnp.promote_types(self.dtype, jnp.float32)
    scale, bias = self.scale[...].astype(high), self.bias[...].astype(high)
    return _layer_normalized(x, scale, bias, self.epsilon).astype(self.dtype)


# Both gradients are written out: what JAX derives from the formulas has three times the operations, which were two
# thirds of all operations of a training step, and each of them is traced, compiled and, on CPU, run. With g the gradient
# of y = z scale + bias, z = (x - mean) / std, and means over what shares a mean and a std:
#   dx = (g scale - mean(g scale) - z mean(g scale z)) / std


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _group_normalized(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> Array:
  """[B, H, W, C] in the dtype of `scale`, [C]."""
  return _group_forward(x, scale, bias, groups, epsilon)[0]


def _group_forward(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> tuple[Array, tuple]:
  centered = x.astype(scale.dtype)
  mean = _of_group(centered.mean(axis=(1, 2)), groups)  # [B, C]
  centered = centered - mean[:, None, None]
  inverse = jax.lax.rsqrt(_of_group(jnp.square(centered).mean(axis=(1, 2)), groups) + epsilon)  # [B, C]
  y = centered * (inverse * scale[None])[:, None, None] + bias[None, None, None]
  return y, (x, mean, inverse, scale)


def _group_backward(groups: int, epsilon: float, kept: tuple, g: Array) -> tuple[Array, Array, Array]:
  del epsilon
  x, mean, inverse, scale = kept
  normal = (x.astype(scale.dtype) - mean[:, None, None]) * inverse[:, None, None]
  sums, products = g.sum(axis=(1, 2)), (g * normal).sum(axis=(1, 2))  # [B, C]
  factor = scale[None] / math.prod(x.shape[1:3])
  first, second = _of_group(sums * factor, groups), _of_group(products * factor, groups)
  dx = (g * scale[None, None, None] - first[:, None, None] - normal * second[:, None, None]) * inverse[:, None, None]
  return dx.astype(x.dtype), products.sum(axis=0), sums.sum(axis=0)


def _of_group(x: Array, groups: int) -> Array:
  """The mean over the channels of each group, for every channel: [B, C] to [B, C]."""
  repeats = x.shape[1] // groups
  means = x.reshape(x.shape[0], groups, repeats).mean(axis=-1, keepdims=True)
  return jnp.broadcast_to(means, (x.shape[0], groups, repeats)).reshape(x.shape)


_group_normalized.defvjp(_group_forward, _group_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_normalized(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
  """[..., C] in the dtype of `scale`, [C]."""
  return _layer_forward(x, scale, bias, epsilon)[0]


def _layer_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple]:
  centered = x.astype(scale.dtype)
  mean = centered.mean(axis=-1, keepdims=True)
  centered = centered - mean
  inverse = jax.lax.rsqrt(jnp.square(centered).mean(axis=-1, keepdims=True) + epsilon)
  row = (1,) * (x.ndim - 1) + (-1,)
  return centered * inverse * scale.reshape(row) + bias.reshape(row), (x, mean, inverse, scale)


def _layer_backward(epsilon: float, kept: tuple, g: Array) -> tuple[Array, Array, Array]:
  del epsilon
  x, mean, inverse, scale = kept
  normal = (x.astype(scale.dtype) - mean) * inverse
  product, others = g * normal, tuple(range(x.ndim - 1))
  row = scale.reshape((1,) * (x.ndim - 1) + (-1,)) / x.shape[-1]
  first, second = (g * row).sum(axis=-1, keepdims=True), (product * row).sum(axis=-1, keepdims=True)
  dx = (g * (row * x.shape[-1]) - first - normal * second) * inverse
  return dx.astype(x.dtype), product.sum(axis=others), g.sum(axis=others)


_layer_normalized.defvjp(_layer_forward, _layer_backward)


class BatchNorm(nnx.Module):
  """Batch normalisation over consecutive groups of images, with PyTorch's running statistics.

  The released depth code keeps statistics per GPU, over the 3 images it holds; `group` is that number, whatever the
  number of devices here. The running mean and variance move towards the mean over all groups of the group's mean and
  unbiased variance. (The release keeps those of its first GPU only.)

  Source: torch.nn.BatchNorm2d; VPD depth/train.py (DistributedDataParallel without SyncBatchNorm).
  """

  def __init__(
    self,
    width: int,
    *,
    group: int = 0,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """`group`: images per group, 0 for the whole batch; `momentum`: weight of the new statistics."""
    self.group, self.momentum, self.epsilon, self.dtype = group, momentum, epsilon, dtype
    self.scale = nnx.Param(initializers.ones(rngs.params(), (width,), param_dtype))
    self.bias = nnx.Param(initializers.zeros(rngs.params(), (width,), param_dtype))
    self.mean = nnx.BatchStat(initializers.zeros(rngs.params(), (width,), param_dtype))
    self.var = nnx.BatchStat(initializers.ones(rngs.params(), (width,), param_dtype))

  def __call__(self, x: Array, *, training: bool) -> Array:
    """Normalises [B, H, W, C]: with the statistics of each group in training, which also moves the running ones."""
    high = jnp.promote_types(self.dtype, jnp.float32)
    x = x.astype(high)
    if not training:
      mean, var = (s[...].astype(high)[None, None, None] for s in (self.mean, self.var))
      return self._scaled(x, mean, var)
    group = self.group or x.shape[0]
    if x.shape[0] % group:
      raise ValueError(f"{x.shape[0]} images cannot be split into groups of {group} for batch normalisation.")
    y = x.reshape(-1, group, *x.shape[1:])  # [G, B / G, H, W, C]
    mean = y.mean(axis=(1, 2, 3), keepdims=True)
    var = jnp.square(y - mean).mean(axis=(1, 2, 3), keepdims=True)
    count = math.prod(y.shape[1:4])
    self._move(self.mean, mean.mean(axis=(0, 1, 2, 3)))
    self._move(self.var, var.mean(axis=(0, 1, 2, 3)) * (count / max(count - 1, 1)))
    return self._scaled(y, mean, var).reshape(x.shape)  # [B, H, W, C]

  def _move(self, stat: nnx.BatchStat, new: Array) -> None:
    old = stat[...]
    stat[...] = (old + self.momentum * (jax.lax.stop_gradient(new) - old)).astype(old.dtype)

  def _scaled(self, x: Array, mean: Array, var: Array) -> Array:
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale, bias = (p[...].astype(x.dtype).reshape(shape) for p in (self.scale, self.bias))
    return ((x - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias).astype(self.dtype)


class ConvTranspose(nnx.Module):
  """Transposed convolution cropped by `padding`, without bias, as torch.nn.ConvTranspose2d.

  The kernel is kept [kh, kw, in, out]: out[s * i + a - padding] += x[i] @ kernel[a].
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
    dtype: Any,
    param_dtype: Any,
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


def resize(x: Array, size: tuple[int, int], *, method: str = "bilinear") -> Array:
  """Resizes [B, H, W, C] as torch.nn.functional.interpolate(align_corners=False) does: without antialiasing.

  Args:
    x: float [B, H, W, C].
    size: (H, W) of the result.
    method: "bilinear", or "nearest" with PyTorch's floor(i * in / out).
  """
  if x.shape[1:3] == size:
    return x
  if method == "nearest":
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]  # [B, *size, C]
  shape = (x.shape[0], *size, x.shape[3])
  high = jnp.promote_types(x.dtype, jnp.float32)
  return jax.image.resize(x.astype(high), shape, "linear", antialias=False).astype(x.dtype)  # [B, *size, C]


def adaptive_avg_pool(x: Array, size: int) -> Array:
  """Means over size x size bins that share rows and columns where `size` does not divide the sides.

  Bin i of n over H rows covers floor(i H / n) to ceil((i + 1) H / n).

  Args:
    x: float [B, H, W, C], of any sides.
    size: bins per side.

  Returns:
    float [B, size, size, C].

  Source: torch.nn.AdaptiveAvgPool2d.
  """
  high = jnp.promote_types(x.dtype, jnp.float32)

  def shares(side: int) -> Array:
    bins = np.zeros((size, side))
    for i in range(size):
      begin, end = i * side // size, -(-(i + 1) * side // size)
      bins[i, begin:end] = 1 / (end - begin)
    return jnp.asarray(bins, high)

  rows, columns = (shares(side) for side in x.shape[1:3])
  means = jnp.einsum("nh,mw,bhwc->bnmc", rows, columns, x.astype(high), precision="highest")
  return means.astype(x.dtype)


def drop_channels(x: Array, rate: float, key: Array) -> Array:
  """Sets whole channels of [B, H, W, C] to zero with probability `rate`, and divides the others by 1 - rate.

  Source: torch.nn.Dropout2d.
  """
  kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[3]))
  return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def timestep_embedding(timesteps: int | Array, width: int) -> Array:
  """Sinusoidal embedding of diffusion timesteps, cosines first, always float32.

  Args:
    timesteps: one whole number, or int [B].
    width: even number of channels.

  Returns:
    float32 [1, width] or [B, width].

  Source: CompVis ldm/modules/diffusionmodules/util.py timestep_embedding.
  """
  half = width // 2
  # On the host, each stage rounded once to float32: the device's exp, cos and sin differ from PyTorch's by up to 1e-5.
  exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  if isinstance(timesteps, (int, np.integer)):
    angles = (np.float32(timesteps) * frequencies)[None].astype(np.float64)
    return jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32))
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
