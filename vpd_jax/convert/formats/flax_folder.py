"""Flax's msgpack files of diffusers and transformers, as tensors in PyTorch's names and axes.

Only the names are read eagerly; a transposed tensor has the same bytes with other strides. Therefore the tables for
PyTorch's names work for both formats and give bitwise equal results.

Sources: flax/serialization.py (_msgpack_ext_pack); https://github.com/msgpack/msgpack/blob/master/spec.md; diffusers
0.39.0 models/modeling_flax_pytorch_utils.py, whose renaming this module inverts.
"""

import math
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from vpd_jax.convert.formats.lazy_tensor import LazyTensor, NotRead, contiguous
from vpd_jax.errors import UserError

# First bytes of a file that holds a map that is not empty.
STARTS = (*range(0x81, 0x90), 0xDE, 0xDF)
SHORT = {0x80: ("map", 16), 0x90: ("array", 16), 0xA0: ("text", 32)}  # The first byte includes the length.
COUNTED = {
  0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"), 0xC7: ("typed", ">B"), 0xC8: ("typed", ">H"),
  0xC9: ("typed", ">I"), 0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"), 0xDC: ("array", ">H"),
  0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
ARRAY = 1  # Flax's extension type of an array.
DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in (*"?bhilqBHILQefd", ml_dtypes.bfloat16)}
# Lists of modules: in PyTorch, the index is a name part of its own.
LIST_MODULE = re.compile(
  r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|net|to_out)_(\d+)"
)
AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # HWIO -> OIHW, IO -> OI


class Place(NamedTuple):
  """A range of bytes in a file that was not read."""

  offset: int
  count: int


def read(path: pathlib.Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
  """Reads diffusion_flax_model.msgpack or flax_model.msgpack: (tensors by PyTorch's names, types of other entries).

  Raises:
    ValueError: for a damaged file; one line.
  """
  try:
    with path.open("rb") as file:
      content = _item(file, path)
      end, size = file.tell(), path.stat().st_size
    if end != size:
      raise UserError(f"it goes on after its end, {size - end} bytes")
  except NotRead:
    raise
  except (ValueError, TypeError, struct.error, RecursionError) as error:
    raise UserError(f"{path} is damaged or not a file of Flax ({error}); fetch it again.") from error
  tensors, others = {}, {}
  for parts, value in _leaves(content):
    if isinstance(value, LazyTensor):
      name, tensor = in_pytorch(parts, value)
      tensors[name] = tensor
    else:
      others[".".join(parts)] = "bytes" if isinstance(value, Place) else type(value).__name__
  if not tensors:
    raise UserError(f"{path} holds no weights, but {list(others)[:5]}; give the weights of a Flax model.")
  return tensors, others


def in_pytorch(parts: tuple[str, ...], tensor: LazyTensor) -> tuple[str, LazyTensor]:
  """A Flax parameter with PyTorch's name and axes: down_blocks_0/conv/kernel -> down_blocks.0.conv.weight."""
  *modules, last = (LIST_MODULE.sub(r"\1.\2", part) if LIST_MODULE.fullmatch(part) else part for part in parts)
  if last == "kernel":
    tensor = tensor.transpose(AXES.get(tensor.ndim, tuple(range(tensor.ndim))))
  return ".".join([*modules, "weight" if last in ("kernel", "scale", "embedding") else last]), tensor


def _leaves(value: object, parts: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  """(path, leaf) of a nested dict."""
  if not isinstance(value, dict):
    yield parts, value
    return
  for key, item in value.items():
    yield from _leaves(item, (*parts, *str(key).split("/")))  # Sharded files have complete paths as keys.


def _item(file: BinaryIO, path: pathlib.Path) -> Any:
  """The next item; a Flax array as a LazyTensor, other bytes as a Place."""
  tag, value = _head(file)
  if tag == "map":
    return {_item(file, path): _item(file, path) for _ in range(value)}
  if tag == "array":
    return [_item(file, path) for _ in range(value)]
  if tag == "text":
    return _take(file, value).decode()
  if tag == "typed":
    end = file.tell() + 1 + value
    if _take(file, 1)[0] == ARRAY:
      return _array(file, path, end)
    return _skip(file, path, end - file.tell())
  return _skip(file, path, value) if tag == "bytes" else value


def _array(file: BinaryIO, path: pathlib.Path, end: int) -> LazyTensor:
  """A Flax array: its shape, the name of its dtype and its bytes."""
  shape, name, place = _item(file, path)
  if name not in DTYPES:
    if str(name) in vars(ml_dtypes) or str(name).startswith("complex"):
      raise NotRead(path, {f"the array at byte {place.offset}": name})
    raise UserError(f"it holds an array of {name}")
  tensor = LazyTensor(path, place.offset, DTYPES[name], tuple(shape), contiguous(shape))
  if min(shape, default=0) < 0 or place.count != math.prod(shape) * tensor.dtype.itemsize or file.tell() != end:
    raise UserError(f"shape {shape} does not fit the {place.count} bytes at {place.offset}")
  return tensor


def _head(file: BinaryIO) -> tuple[str, Any]:
  """(tag, length or value) of the next item."""
  byte = _take(file, 1)[0]
  if byte < 0x80 or byte >= 0xE0:
    return "value", byte if byte < 0x80 else byte - 256
  for first, (tag, count) in SHORT.items():
    if first <= byte < first + count:
      return tag, byte - first
  if 0xD4 <= byte <= 0xD8:
    return "typed", 1 << (byte - 0xD4)
  if byte in CONSTANTS:
    return "value", CONSTANTS[byte]
  if byte not in COUNTED and byte not in NUMBERS:
    raise UserError(f"byte {byte:#x} begins nothing")
  tag, form = COUNTED[byte] if byte in COUNTED else ("value", NUMBERS[byte])
  return tag, struct.unpack(form, _take(file, struct.calcsize(form)))[0]


def _take(file: BinaryIO, count: int) -> bytes:
  data = file.read(count)
  if len(data) < count:
    raise UserError("its end is missing")
  return data


def _skip(file: BinaryIO, path: pathlib.Path, count: int) -> Place:
  place = Place(file.tell(), count)
  missing = file.seek(count, 1) - path.stat().st_size
  if missing > 0:
    raise UserError(f"{missing} bytes are missing at its end")
  return place
