"""Initial values of parameters, drawn by numpy on the host: each array from the seed and its own name.

A program that draws hundreds of arrays takes XLA longer to compile than a first training step should take, and half of
it again to trace. Here modules only note how an array is drawn while they are described (`recording`); values are made
later, for the arrays that no weights fill. An array keeps its values when others are added beside it.

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

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal distribution cut off at -2 and 2

Sampler = Callable[[np.random.Generator, Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class HostKey:
  """Given to an Initializer in place of a JAX key: the array is drawn on the host, later, from this seed."""

  seed: int


class InitKeys:
  """In place of nnx.Rngs for the constructors of modules: every `rngs.params()` is the HostKey of the seed."""

  def __init__(self, seed: int):
    self._key = HostKey(seed)

  def params(self) -> HostKey:
    """The key of one more array."""
    return self._key


@dataclasses.dataclass(frozen=True)
class Draw:
  """How one array is drawn.

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
    """The values of the array of this full name: the same ones wherever they are drawn."""
    generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(name.encode())]))
    return np.asarray(self.sample(generator, self.shape), self.dtype)


@dataclasses.dataclass(frozen=True)
class Initializer:
  """As the initializers of jax.nn: (key, shape, dtype) to an array.

  With a JAX key, `reference` makes it. With a HostKey, allowed below `recording` only, zeros stand in its place and the
  Draw is noted.
  """

  reference: Callable[..., Array]
  sample: Sampler

  def __call__(self, key: object, shape: Sequence[int], dtype: DTypeLike, **rest: object) -> Array:
    if not isinstance(key, HostKey):
      return self.reference(key, shape, dtype, **rest)
    if not _RECORDS:
      raise RuntimeError("a model with InitKeys is only described, see params.describe; give nnx.Rngs to build it.")
    placeholder = jax.lax.full(tuple(shape), 0, dtype)
    _RECORDS[-1].append((placeholder, Draw(self.sample, key.seed, tuple(shape), dtype)))
    return placeholder


_RECORDS: list[list[tuple[Array, Draw]]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Array, Draw]]]:
  """Collects (placeholder, Draw) of every Initializer that is given a HostKey inside; to be used under tracing."""
  _RECORDS.append([])
  try:
    yield _RECORDS[-1]
  finally:
    _RECORDS.pop()


def constant(value: float) -> Initializer:
  """All numbers the same."""
  return Initializer(
    lambda key, shape, dtype, **rest: jnp.full(shape, value, dtype), lambda generator, shape: np.full(shape, value)
  )


def normal(stddev: float) -> Initializer:
  """Normally distributed with mean 0."""
  return Initializer(
    jax.nn.initializers.normal(stddev),
    lambda generator, shape: generator.standard_normal(shape, np.float32) * np.float32(stddev),
  )


def truncated_normal(stddev: float) -> Initializer:
  """A normal distribution of `stddev` cut off at two of them, which makes its own standard deviation smaller."""
  return Initializer(
    jax.nn.initializers.truncated_normal(stddev), lambda generator, shape: _truncated(generator, shape, stddev)
  )


def variance_scaling(
  scale: float,
  mode: Literal["fan_in", "fan_out", "fan_avg"],
  distribution: Literal["truncated_normal", "normal", "uniform"],
) -> Initializer:
  """Variance scale / n with n by `mode` ("fan_in", "fan_out" or "fan_avg") of a kernel [..., in, out].

  Args:
    scale: of the variance.
    mode: see above.
    distribution: "uniform", "normal" or "truncated_normal".
  """

  def sample(generator: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    ends = {"fan_in": shape[-2], "fan_out": shape[-1], "fan_avg": (shape[-2] + shape[-1]) / 2}
    fan = math.prod(shape[:-2]) * ends[mode]
    stddev = math.sqrt(scale / fan)
    if distribution == "uniform":
      limit = math.sqrt(3) * stddev
      return (2 * generator.random(shape, np.float32) - 1) * np.float32(limit)
    if distribution == "normal":
      return generator.standard_normal(shape, np.float32) * np.float32(stddev)
    return _truncated(generator, shape, stddev / _TRUNCATED_STD)

  return Initializer(jax.nn.initializers.variance_scaling(scale, mode, distribution), sample)


def _truncated(generator: np.random.Generator, shape: Sequence[int], stddev: float) -> np.ndarray:
  """float32; what lies beyond two standard deviations is drawn again."""
  values = generator.standard_normal(shape, np.float32)
  flat = values.reshape(-1)
  far = np.flatnonzero(np.abs(flat) > 2)
  while far.size:
    flat[far] = generator.standard_normal(far.size, np.float32)
    far = far[np.abs(flat[far]) > 2]
  return values * np.float32(stddev)


zeros, ones = constant(0.0), constant(1.0)
lecun_normal = variance_scaling(1.0, "fan_in", "truncated_normal")
he_normal = variance_scaling(2.0, "fan_in", "truncated_normal")
torch_default = variance_scaling(1 / 3, "fan_in", "uniform")  # of torch.nn.Linear and Conv2d
