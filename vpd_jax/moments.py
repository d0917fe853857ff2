"""Adam's two moments in reduced precision: bfloat16, or int8 in blocks that share a scale.

The stored form of an array x, with u uniform in [0, 1) for random rounding and u = 1/2 otherwise:

  float32   x, in the dtype of the parameter
  bfloat16  x, rounded to the nearest (first moment) or at random (second moment)
  int8      blocks with the largest magnitude s as scale; the first moment is s sign(q) (q / 127)^2 with q from -127 to
            127, the second one s (q / 255)^4 with q from 0 to 255, so that its root is spaced as the first moment is

Random rounding takes the larger of the two neighbors a < |x| < b if u < (|x| - a) / (b - a), so that the mean is x.
With rounding to the nearest, the second moment, which changes by a thousandth per step, would never change. A nonzero
second moment is stored as at least s (2 / 255)^4: its root, by which an update is divided, never falls below the
smallest step of the first moment's map.

Sources: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (blocks and their scales, a map that is
finer near 0, small arrays unchanged; its map is a table, the ones here are powers); Gupta et al. 2015, Deep Learning
with Limited Numerical Precision (random rounding).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vpd_jax.types import Array

FORMATS = ("float32", "bfloat16", "int8")
BLOCK = 256  # largest number of elements that share a scale
SMALLEST = 4096  # elements of the smallest array that is stored in blocks
SHORTEST = 32  # elements of the shortest block; below it, the scales would take too much memory


class Blocks(NamedTuple):
  """A moment in int8.

  Attributes:
    codes: of the array's shape; int8 for a first moment, uint8 for a second one.
    scales: float32 [blocks, size of `axis`].
  """

  codes: Array
  scales: Array


Stored = Array | Blocks


def axis(shape: Sequence[int]) -> int:
  """The axis that no block extends along: the largest one (the last of equals), which is the one that sharding splits.

  A block contains elements at one index of this axis, consecutive along the other axes flattened.
  """
  return max(range(len(shape)), key=lambda i: (shape[i], i))


def layout(shape: Sequence[int]) -> tuple[int, int]:
  """(number of blocks, elements per block) for each index of `axis`; (0, 0) for arrays that are not split into blocks.

  n = ceil(rest / BLOCK) and ceil(rest / n), with rest = elements / size of `axis`.
  """
  size = math.prod(shape)
  rest = size // shape[axis(shape)] if size >= SMALLEST else 0
  if rest < SHORTEST:
    return 0, 0
  blocks = math.ceil(rest / BLOCK)
  return blocks, math.ceil(rest / blocks)


def zeros(x: Array, kind: str, *, second: bool) -> Stored:
  """The initial moment of an array.

  Args:
    x: the parameter.
    kind: one of FORMATS.
    second: whether it is the second moment.
  """
  blocks, _ = layout(x.shape)
  if kind == "int8" and blocks:
    codes = jnp.zeros(x.shape, jnp.uint8 if second else jnp.int8)
    return Blocks(codes, jnp.zeros((blocks, x.shape[axis(x.shape)]), jnp.float32))
  return jnp.zeros(x.shape, jnp.bfloat16 if kind == "bfloat16" else x.dtype)


def dequantize(stored: Stored, dtype: DTypeLike) -> Array:
  """Dequantizes a moment to the given dtype."""
  if not isinstance(stored, Blocks):
    return stored.astype(dtype)
  codes = stored.codes.astype(jnp.float32)
  share = (codes / 255) ** 4 if stored.codes.dtype == jnp.uint8 else jnp.sign(codes) * (codes / 127) ** 2
  return (_spread(stored.scales, codes.shape) * share).astype(dtype)


def quantize(x: Array, like: Stored, *, second: bool, noise: Array | None = None) -> Stored:
  """Quantizes a moment.

  Args:
    x: its value, any shape; nonnegative if it is a second moment.
    like: the previously stored moment, which determines the format.
    second: whether it is the second moment.
    noise: uint32 of the same shape, below 2^16, for random rounding; None rounds to the nearest.
  """
  if isinstance(like, Blocks):
    return _in_blocks(x.astype(jnp.float32), second, noise)
  if like.dtype != jnp.bfloat16 or noise is None or not second:
    return x.astype(like.dtype)
  x = x.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def convert(moment: Stored, kind: str, dtype: DTypeLike, *, second: bool) -> Stored:
  """Converts a stored moment of any format to the format `kind`, rounded to the nearest.

  Args:
    moment: as stored.
    kind: one of FORMATS.
    dtype: of the parameter.
    second: whether it is the second moment.
  """
  x = dequantize(moment, dtype)
  return quantize(x, zeros(x, kind, second=second), second=second)


def noise(step_bits: Array, array_bits: Array, shape: Sequence[int]) -> tuple[Array, Array]:
  """Two uint32 arrays, below 2^16, for the random rounding of an array's two moments.

  Each value is a hash of its position in the array, independent of the sharding. The quality of jax.random is not
  needed for rounding, and its program would be larger for each of hundreds of arrays.

  Args:
    step_bits: uint32 [2], random bits of the step.
    array_bits: uint32 [2], identifies the array. XLA would embed a scalar in the code of kernels, and compile one
      kernel per array instead of one per shape.
    shape: of the array.

  Source of the hash: C. Wellons, hash-prospector, lowbias32.
  """
  position = jnp.zeros(shape, jnp.uint32)
  for i in range(len(shape)):
    stride = np.uint32(math.prod(shape[i + 1 :]) % 2**32)
    position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, i) * stride
  seeds = _hash(step_bits ^ array_bits)
  bits = _hash(_hash(position ^ seeds[0]) + seeds[1])
  return bits >> 16, bits & 0xFFFF


def _hash(x: Array) -> Array:
  """Mixes the bits of uint32 numbers."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _in_blocks(x: Array, second: bool, noise: Array | None) -> Blocks:
  """Scales and codes. NaN has no code: the step that produces one makes the parameter NaN too, where it is detected."""
  split = jnp.moveaxis(x, axis(x.shape), -1).reshape(-1, x.shape[axis(x.shape)])  # [rest, L]
  blocks, size = layout(x.shape)
  split = jnp.pad(split, ((0, blocks * size - split.shape[0]), (0, 0)))
  scales = jnp.abs(split).reshape(blocks, size, -1).max(1)  # [blocks, L]
  spread = _spread(scales, x.shape)
  share = jnp.where(spread > 0, jnp.abs(x) / jnp.where(spread > 0, spread, 1), 0)
  most, power, least = (255, 4, 2) if second else (127, 2, 0)
  root = jnp.sqrt(jnp.sqrt(share)) if second else jnp.sqrt(share)
  low = jnp.clip(jnp.floor(most * root), 0, most)
  part = (share * float(most**power) - low**power) / ((low + 1) ** power - low**power)
  draw = 0.5 if noise is None else noise.astype(jnp.float32) / 2**16
  codes = jnp.minimum(low + (draw < part), most)
  codes = jnp.where(x != 0, jnp.maximum(codes, least), 0)
  return Blocks(codes.astype(jnp.uint8) if second else (jnp.sign(x) * codes).astype(jnp.int8), scales)


def _spread(scales: Array, shape: Sequence[int]) -> Array:
  """The scale of each element of an array of the given shape."""
  along, (blocks, size) = axis(shape), layout(shape)
  rest = [n for i, n in enumerate(shape) if i != along]
  repeated = jnp.broadcast_to(scales[:, None], (blocks, size, shape[along])).reshape(blocks * size, -1)
  return jnp.moveaxis(repeated[: math.prod(rest)].reshape(*rest, shape[along]), -1, along)
