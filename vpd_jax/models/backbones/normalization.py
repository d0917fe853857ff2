"""Normalization layers that behave like those of PyTorch, with custom gradients."""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.types import Array


class GroupNorm(nnx.Module):
  """Normalizes groups of channels over all positions, with statistics in float32 or wider for all dtypes.

  As SD's GroupNorm32. Sums first over positions, then over the channels of a group: on CPU the gradient takes a third
  to a half of the time of a joint reduction over [H, W, G, C / G].
  """

  def __init__(
    self, width: int, *, groups: int = 32, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
  ):
    """`groups` divides `width`."""
    self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
    self.scale = nnx.Param(initializers.ones(rngs.params(), (width,), param_dtype))
    self.bias = nnx.Param(initializers.zeros(rngs.params(), (width,), param_dtype))

  def __call__(self, x: Array) -> Array:
    """Normalizes [B, H, W, C]."""
    high = jnp.promote_types(self.dtype, jnp.float32)
    scale, bias = self.scale[...].astype(high), self.bias[...].astype(high)
    y = cast(Array, _group_normalized(x, scale, bias, self.groups, self.epsilon))
    return y.astype(self.dtype)


class LayerNorm(nnx.Module):
  """Normalizes the last axis with PyTorch's epsilon of 1e-5, and statistics in float32 or wider for all dtypes."""

  def __init__(self, width: int, *, epsilon: float = 1e-5, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    self.epsilon, self.dtype = epsilon, dtype
    self.scale = nnx.Param(initializers.ones(rngs.params(), (width,), param_dtype))
    self.bias = nnx.Param(initializers.zeros(rngs.params(), (width,), param_dtype))

  def __call__(self, x: Array) -> Array:
    """Normalizes [..., C]."""
    high = jnp.promote_types(self.dtype, jnp.float32)
    scale, bias = self.scale[...].astype(high), self.bias[...].astype(high)
    return cast(Array, _layer_normalized(x, scale, bias, self.epsilon)).astype(self.dtype)


# Both gradients are custom: those that JAX derives have three times the operations, which were two thirds of all
# operations of a training step to trace, compile and, on CPU, run. With g the gradient of y = z scale + bias,
# z = (x - mean) / std, and means over the elements that share mean and std:
#   dx = (g scale - mean(g scale) - z mean(g scale z)) / std


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _group_normalized(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> Array:
  """[B, H, W, C] in the dtype of `scale`, [C]."""
  return _group_forward(x, scale, bias, groups, epsilon)[0]


def _group_forward(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> tuple[Array, tuple]:
  centered = x.astype(scale.dtype)
  mean = _group_mean(centered.mean(axis=(1, 2)), groups)  # [B, C]
  centered = centered - mean[:, None, None]
  inverse = jax.lax.rsqrt(_group_mean(jnp.square(centered).mean(axis=(1, 2)), groups) + epsilon)  # [B, C]
  y = centered * (inverse * scale[None])[:, None, None] + bias[None, None, None]
  return y, (x, mean, inverse, scale)


def _group_backward(groups: int, epsilon: float, residuals: tuple, g: Array) -> tuple[Array, Array, Array]:
  del epsilon
  x, mean, inverse, scale = residuals
  z = (x.astype(scale.dtype) - mean[:, None, None]) * inverse[:, None, None]
  sums, products = g.sum(axis=(1, 2)), (g * z).sum(axis=(1, 2))  # [B, C]
  factor = scale[None] / math.prod(x.shape[1:3])
  first, second = _group_mean(sums * factor, groups), _group_mean(products * factor, groups)
  dx = (g * scale[None, None, None] - first[:, None, None] - z * second[:, None, None]) * inverse[:, None, None]
  return dx.astype(x.dtype), products.sum(axis=0), sums.sum(axis=0)


def _group_mean(x: Array, groups: int) -> Array:
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
  return centered * (inverse * scale.reshape(row)) + bias.reshape(row), (x, mean, inverse, scale)


def _layer_backward(epsilon: float, residuals: tuple, g: Array) -> tuple[Array, Array, Array]:
  del epsilon
  x, mean, inverse, scale = residuals
  z = (x.astype(scale.dtype) - mean) * inverse
  product, others = g * z, tuple(range(x.ndim - 1))
  row = scale.reshape((1,) * (x.ndim - 1) + (-1,)) / x.shape[-1]
  first, second = (g * row).sum(axis=-1, keepdims=True), (product * row).sum(axis=-1, keepdims=True)
  dx = (g * (row * x.shape[-1]) - first - z * second) * inverse
  return dx.astype(x.dtype), product.sum(axis=others), g.sum(axis=others)


_layer_normalized.defvjp(_layer_forward, _layer_backward)


class BatchNorm(nnx.Module):
  """Batch normalization over consecutive groups of images, with PyTorch's running statistics.

  The released depth code computes statistics per GPU, over its 3 images; `group` is that number, independent of the
  number of devices. The running mean and variance are updated with the average over all groups of the group's mean and
  unbiased variance. (The release stores those of its first GPU only.)

  Source: torch.nn.BatchNorm2d; VPD depth/train.py (DistributedDataParallel without SyncBatchNorm).
  """

  def __init__(
    self,
    width: int,
    *,
    group: int = 0,
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """`group`: images per group, 0 for the whole batch; `momentum`: weight of the new statistics."""
    self.group, self.momentum, self.epsilon, self.dtype = group, momentum, epsilon, dtype
    self.scale = nnx.Param(initializers.ones(rngs.params(), (width,), param_dtype))
    self.bias = nnx.Param(initializers.zeros(rngs.params(), (width,), param_dtype))
    self.mean = nnx.BatchStat(initializers.zeros(rngs.params(), (width,), param_dtype))
    self.var = nnx.BatchStat(initializers.ones(rngs.params(), (width,), param_dtype))

  def __call__(self, x: Array, *, training: bool) -> Array:
    """Normalizes [B, H, W, C]; in training with the statistics of each group, and updates the running statistics."""
    high = jnp.promote_types(self.dtype, jnp.float32)
    x = x.astype(high)
    if not training:
      mean, var = (s[...].astype(high)[None, None, None] for s in (self.mean, self.var))
      return self._scaled(x, mean, var)
    group = self.group or x.shape[0]
    if x.shape[0] % group:
      raise UserError(f"{x.shape[0]} images cannot be split into groups of {group} for batch normalization.")
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
