"""Convolutions: those of XLA, replaced by matrix products on CPU where XLA is slow.

For few positions with many channels, XLA on CPU spends its time on moving the kernel, three times per training step;
and it computes the gradient of the kernel for many positions on a single core.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vpd_jax.models.backbones.platform import platform
from vpd_jax.types import Array, Fields

FEW, MANY = 256, 4096  # positions, 16 x 16 and 64 x 64
LARGE, WIDE = 512 * 512, 128 * 128  # weights of one tap of a kernel


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any) -> Array:
  """jax.lax.conv_general_dilated for nnx.Conv.

  Args:
    x: float [B, H, W, C].
    kernel: float [h, w, C, D].
    strides, padding, options: see jax.lax.conv_general_dilated.
  """
  if platform() == "cpu" and _is_plain(kernel, strides, padding, options):
    positions, weights = x.shape[1] * x.shape[2], kernel.shape[2] * kernel.shape[3]
    if positions <= FEW and weights >= LARGE:
      return as_product(x, kernel)
    if positions >= MANY and weights >= WIDE:
      return with_product_gradient(x, kernel)
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _is_plain(kernel: Array, strides: Sequence[int], padding: Any, options: Fields) -> bool:
  """Whether it is a 3x3 convolution that preserves the size, without dilation and groups."""
  dilated = {*(options.get("lhs_dilation") or (1,)), *(options.get("rhs_dilation") or (1,))} != {1}
  same = kernel.shape[:2] == (3, 3) and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
  return same and set(strides) == {1} and not dilated and options.get("feature_group_count", 1) == 1


def as_product(x: Array, kernel: Array) -> Array:
  """A 3x3 convolution of [B, H, W, C] that preserves the size, as a matrix product of patches and kernel."""
  patches = jnp.stack(_shifted(x), axis=3).reshape(math.prod(x.shape[:3]), -1)  # [B H W, 9 C]
  return (patches @ kernel.reshape(-1, kernel.shape[3])).reshape(*x.shape[:3], -1)


@jax.custom_vjp
def with_product_gradient(x: Array, kernel: Array) -> Array:
  """A 3x3 convolution of [B, H, W, C] that preserves the size; computes the kernel gradient tap by tap."""
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return with_product_gradient(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, kernel = residuals
  transposed = kernel[::-1, ::-1].swapaxes(2, 3)
  taps = [jnp.einsum("bhwi,bhwo->io", part, gradient) for part in _shifted(x)]
  return with_product_gradient(gradient, transposed), jnp.stack(taps).reshape(kernel.shape)


with_product_gradient.defvjp(_forward, _backward)


def _shifted(x: Array) -> list[Array]:
  """The input [B, H, W, C] shifted for each of the nine taps, padded with zeros."""
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
