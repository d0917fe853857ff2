"""One tensor of a file, known by name, shape and dtype, read only when asked for."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from vpd_jax.errors import UserError


class NotRead(UserError):
  """Tensors of number types that are not read, {name: type}: the file is whole all the same."""

  def __init__(self, path: pathlib.Path, kinds: Mapping[str, str]):
    self.path, self.kinds = path, dict(kinds)
    super().__init__(path, kinds)

  def __str__(self) -> str:
    kinds = ", ".join(sorted(set(self.kinds.values())))
    return (
      f"{self.path} holds {len(self.kinds)} tensors of type {kinds}, like {next(iter(self.kinds))!r}, which is not "
      "read; save them in float32, float16 or bfloat16, in PyTorch by x.to(torch.float16) of each tensor x."
    )


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """Numbers at a place in a file; `np.asarray(tensor)` reads them.

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
    """Elements from the first to the last, both included."""
    if math.prod(self.shape) == 0:
      return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

  def transpose(self, axes: tuple[int, ...]) -> "LazyTensor":
    """The same numbers with the axes in another order, as numpy does it."""
    shape, strides = (tuple(sizes[axis] for axis in axes) for sizes in (self.shape, self.strides))
    return dataclasses.replace(self, shape=shape, strides=strides)

  def rows(self, start: int, stop: int) -> "LazyTensor":
    """The numbers from `start` to `stop` along the first axis."""
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
