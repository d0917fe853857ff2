"""Initial values of parameters, sampled with numpy on the host: each array from the seed and its name.

A program that samples hundreds of arrays would take longer to compile than a training step. Instead, modules only
record the distribution of each array while they are described (`recording`); values are sampled later, for arrays that
are not loaded. The values of an array do not depend on the other arrays.

The distributions are those of jax.nn.initializers under the same names.
"""

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vpd_jax.types import Array

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal distribution truncated at -2 and 2

Sampler = Callable[[np.random.Generator, Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class HostKey:
  """Replaces a JAX key for an Initializer: the array is sampled later on the host from this seed."""

  seed: int


@dataclasses.dataclass(frozen=True)
class InitKeys:
  """Replaces nnx.Rngs in constructors of modules: every `rngs.params()` is the HostKey of the seed."""

  seed: int

  def params(self) -> HostKey:
    """The key of an array."""
    return HostKey(self.seed)


@dataclasses.dataclass(frozen=True)
class Draw:
  """The distribution of an array.

  Attributes:
    sample: the distribution.
    seed: of the model.
    shape, dtype: of the array.
  """

  sample: Sampler
  seed: int
  shape: tuple[int, ...]
  dtype: DTypeLike

  def __call__(self, name: str) -> np.ndarray:
    """The values of the array with this full name; deterministic."""
    generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(name.encode())]))
    return np.asarray(self.sample(generator, self.shape), self.dtype)


@dataclasses.dataclass(frozen=True)
class Initializer:
  """Like the initializers of jax.nn: (key, shape, dtype) to an array.

  With a JAX key, calls `reference`. With a HostKey, which is only valid inside `recording`, returns a placeholder of
  zeros and records a Draw.
  """

  reference: Callable[..., Array]
  sample: Sampler

  def __call__(self, key: object, shape: Sequence[int], dtype: DTypeLike, **options: object) -> Array:
    if not isinstance(key, HostKey):
      return self.reference(key, shape, dtype, **options)
    if not _RECORDS:
      raise RuntimeError("a model with InitKeys is only described, see params.describe; give nnx.Rngs to build it.")
    placeholder = jax.lax.full(tuple(shape), 0, dtype)
    _RECORDS[-1].append((placeholder, Draw(self.sample, key.seed, tuple(shape), dtype)))
    return placeholder


_RECORDS: list[list[tuple[Array, Draw]]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Array, Draw]]]:
  """Collects (placeholder, Draw) of every Initializer called with a HostKey; for use under tracing."""
  _RECORDS.append([])
  try:
    yield _RECORDS[-1]
  finally:
    _RECORDS.pop()


def constant(value: float) -> Initializer:
  """A constant value."""
  return Initializer(
    lambda key, shape, dtype, **options: jnp.full(shape, value, dtype), lambda generator, shape: np.full(shape, value)
  )


def normal(stddev: float) -> Initializer:
  """Normally distributed with mean 0."""
  return Initializer(
    jax.nn.initializers.normal(stddev),
    lambda generator, shape: generator.standard_normal(shape, np.float32) * np.float32(stddev),
  )


def truncated_normal(stddev: float) -> Initializer:
  """A normal distribution of `stddev`, truncated at two standard deviations without correcting its variance."""
  return Initializer(
    jax.nn.initializers.truncated_normal(stddev), lambda generator, shape: _truncated(generator, shape, stddev)
  )


def variance_scaling(
  scale: float,
  mode: Literal["fan_in", "fan_out", "fan_avg"],
  distribution: Literal["truncated_normal", "normal", "uniform"],
) -> Initializer:
  """Variance scale / n for a kernel [..., in, out], where n is determined by `mode`.

  Args:
    scale: of the variance.
    mode: "fan_in", "fan_out" or "fan_avg".
    distribution: "uniform", "normal" or "truncated_normal".
  """

  def sample(generator: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    fans = {"fan_in": shape[-2], "fan_out": shape[-1], "fan_avg": (shape[-2] + shape[-1]) / 2}
    fan = math.prod(shape[:-2]) * fans[mode]
    stddev = math.sqrt(scale / fan)
    if distribution == "uniform":
      limit = math.sqrt(3) * stddev
      return (2 * generator.random(shape, np.float32) - 1) * np.float32(limit)
    if distribution == "normal":
      return generator.standard_normal(shape, np.float32) * np.float32(stddev)
    return _truncated(generator, shape, stddev / _TRUNCATED_STD)

  return Initializer(jax.nn.initializers.variance_scaling(scale, mode, distribution), sample)


def nearest(initializer: Initializer) -> Initializer:
  """One matrix of `initializer` for all taps of a kernel [s, s, in, out].

  A transposed convolution of stride s with it upsamples to the nearest neighbor: no tap differs from the others, which
  would be seen as a checkerboard.
  """
  one = lambda shape: (1, 1, *shape[2:])
  return Initializer(
    lambda key, shape, dtype, **options: jnp.tile(
      initializer.reference(key, one(shape), dtype, **options), (*shape[:2], 1, 1)
    ),
    lambda generator, shape: np.tile(initializer.sample(generator, one(shape)), (*shape[:2], 1, 1)),
  )


def _truncated(generator: np.random.Generator, shape: Sequence[int], stddev: float) -> np.ndarray:
  """float32; values beyond two standard deviations are sampled again."""
  values = generator.standard_normal(shape, np.float32)
  flat = values.reshape(-1)
  outside = np.flatnonzero(np.abs(flat) > 2)
  while outside.size:
    flat[outside] = generator.standard_normal(outside.size, np.float32)
    outside = outside[np.abs(flat[outside]) > 2]
  return values * np.float32(stddev)


zeros, ones = constant(0.0), constant(1.0)
lecun_normal = variance_scaling(1.0, "fan_in", "truncated_normal")
he_normal = variance_scaling(2.0, "fan_in", "truncated_normal")
torch_default = variance_scaling(1 / 3, "fan_in", "uniform")  # of torch.nn.Linear and Conv2d
