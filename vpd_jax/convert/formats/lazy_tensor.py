"""A tensor in a file, with known shape and dtype, that is read on demand."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from vpd_jax.errors import UserError


class NotRead(UserError):
  """Tensors of unsupported dtypes, {name: dtype}, in an intact file."""

  def __init__(self, path: pathlib.Path, dtypes: Mapping[str, str]):
    self.path, self.dtypes = path, dict(dtypes)
    super().__init__(path, dtypes)

  def __str__(self) -> str:
    dtypes = ", ".join(sorted(set(self.dtypes.values())))
    return (
      f"{self.path} holds {len(self.dtypes)} tensors of type {dtypes}, like {next(iter(self.dtypes))!r}, which is not "
      "read; save them in float32, float16 or bfloat16, in PyTorch by x.to(torch.float16) of each tensor x."
    )


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor at an offset in a file; `np.asarray(tensor)` reads it.

  Attributes:
    path: the file.
    offset: byte of the first element.
    dtype: of the elements, little endian.
    shape: of the tensor.
    strides: in elements, per axis.
  """

  path: pathlib.Path
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def extent(self) -> int:
    """Number of elements from the first to the last, inclusive."""
    if math.prod(self.shape) == 0:
      return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

  def transpose(self, axes: tuple[int, ...]) -> "LazyTensor":
    """The tensor with permuted axes, as np.transpose."""
    shape, strides = (tuple(sizes[axis] for axis in axes) for sizes in (self.shape, self.strides))
    return dataclasses.replace(self, shape=shape, strides=strides)

  def rows(self, start: int, stop: int) -> "LazyTensor":
    """The slice from `start` to `stop` along the first axis."""
    offset = self.offset + start * self.strides[0] * self.dtype.itemsize
    return dataclasses.replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

  def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
    size = self.extent * self.dtype.itemsize
    flat = np.fromfile(self.path, np.uint8, count=size, offset=self.offset)
    if flat.size != size:
      raise UserError(f"{self.path} has become shorter while it was read; start again with the whole file.")
    strides = [stride * self.dtype.itemsize for stride in self.strides]
    array = np.ndarray(self.shape, self.dtype, flat.data, strides=strides)
    return array if dtype is None else array.astype(dtype, copy=False)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Strides, in elements, of a row-major array."""
  return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
