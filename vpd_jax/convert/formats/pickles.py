"""Reads PyTorch's pickled files (.pth, .ckpt, .bin) without PyTorch and without executing code from the file.

Published checkpoints contain training objects besides the weights. The unpickler supports dicts, tensors and storages;
every other class or function becomes an inert placeholder, which accepts all calls and stores nothing.

Source of both layouts: PyTorch, torch/serialization.py (the zip archive since 1.6, the sequence of pickles before).
"""

import functools
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from vpd_jax.convert.formats.lazy_tensor import LazyTensor
from vpd_jax.errors import UserError

Content = Any  # any content of a pickle
STORAGES = {
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "DoubleStorage": np.float64,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "UntypedStorage": np.uint8,
}
# Item sizes of unsupported storages, in bytes.
ITEM_SIZES = {
  "ComplexFloat": 8,
  "ComplexDouble": 16,
  "QInt8": 1,
  "QUInt8": 1,
  "QInt32": 4,
  "QUInt4x2": 1,
  "QUInt2x4": 1,
}
# Dtypes that only the newer tensor format uses, with an untyped storage.
DTYPES = {"uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Inert:
  """Placeholder for any class or function that is not a dict or a tensor: all calls succeed, nothing is stored."""

  def __new__(cls, *args: object, **kwargs: object) -> "Inert":
    return object.__new__(cls)

  def __init__(self, *args: object, **kwargs: object) -> None:
    pass

  def __call__(self, *args: object, **kwargs: object) -> "Inert":
    return self

  def ignore(self, *args: object) -> None:
    pass

  __setstate__ = __setitem__ = append = extend = add = ignore


class StorageType(NamedTuple):
  """PyTorch's FloatStorage and the like."""

  dtype: np.dtype


class NumberType(NamedTuple):
  """PyTorch's float8_e4m3fn and the like."""

  name: str


class Unsupported(NamedTuple):
  """A tensor of an unsupported dtype."""

  dtype: str


class Storage(NamedTuple):
  """`count` contiguous elements in the file; a tensor is a view of a storage."""

  key: str
  dtype: np.dtype
  count: int


class View(NamedTuple):
  """A pickled tensor, before the offset of its storage is known."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
  """Builds only the types of this module; one instance per file."""

  def __init__(self, file: IO[bytes]):
    super().__init__(file, encoding="utf-8", errors="replace")
    self.storages: list[Storage] = []
    self.sizes: dict[str, int] = {}  # item size of each storage, in bytes

  def find_class(self, module: str, name: str) -> object:
    if module in ("torch", "torch.storage") and name in STORAGES:
      return StorageType(np.dtype(STORAGES[name]))
    if module in ("torch", "torch.storage") and name.endswith("Storage"):
      return Unsupported(name.removesuffix("Storage"))
    if module == "torch" and re.fullmatch(r"(q?u?int|b?float|complex|bits)\d+.*", name):
      return NumberType(name)
    known: dict[str, Callable[..., Content]] = {
      "collections.OrderedDict": functools.partial(_ordered_dict),
      "torch.Size": functools.partial(_size),
      "torch._utils._rebuild_tensor": functools.partial(_view),
      "torch._utils._rebuild_tensor_v2": functools.partial(_view),
      "torch._utils._rebuild_tensor_v3": functools.partial(_typed_view),
      "torch._utils._rebuild_qtensor": functools.partial(_quantized),
      "torch._utils._rebuild_parameter": functools.partial(_first),
      "torch._utils._rebuild_parameter_with_state": functools.partial(_first),
      "torch._tensor._rebuild_from_type_v2": functools.partial(_from_type),
    }
    return known.get(f"{module}.{name}") or type(name, (Inert,), {"__module__": module})

  def persistent_load(self, pid: Content) -> Storage | Unsupported:
    tag, storage_type, key, _, count, *view = pid
    if isinstance(storage_type, Unsupported):
      self.sizes[str(key)] = ITEM_SIZES.get(storage_type.dtype, 1)
      return storage_type
    if tag != "storage" or not isinstance(storage_type, StorageType) or count < 0 or view not in ([], [None]):
      raise pickle.UnpicklingError("it refers to something that is not a plain storage")
    self.storages.append(Storage(str(key), storage_type.dtype, int(count)))
    self.sizes[str(key)] = storage_type.dtype.itemsize
    return self.storages[-1]


def _ordered_dict(*args: object) -> dict[object, object]:
  return _Dict(*args)


class _Dict(dict):
  """An ordered dict that ignores the attributes that PyTorch attaches to it."""

  def __setstate__(self, state: object) -> None:
    pass


def _size(values: Content = ()) -> tuple[int, ...]:
  return tuple(values)


def _first(value: object, *_: object) -> object:
  return value


def _from_type(rebuild: Content, _: Content, args: tuple[object, ...], __: Content = None) -> object:
  return rebuild(*args)


def _typed_view(
  storage: Content,
  offset: int,
  shape: Content,
  strides: Content,
  grad: Content,
  hooks: Content,
  number_type: Content,
  *_: Content,
) -> object:
  """A tensor of a dtype without a typed storage, in an untyped one."""
  name = number_type.name if isinstance(number_type, NumberType) else "unknown"
  if name not in DTYPES:
    return Unsupported(name)
  dtype = np.dtype(DTYPES[name])
  return _view(Storage(storage.key, dtype, storage.count // dtype.itemsize), offset, shape, strides)


def _quantized(storage: object, *_: object) -> object:
  return storage if isinstance(storage, Unsupported) else Unsupported("quantized numbers")


def _view(storage: Content, offset: int, shape: Content, strides: Content, *_: Content) -> object:
  """Checks that a tensor lies inside its storage."""
  if isinstance(storage, Unsupported):
    return storage
  shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
  view = View(storage, int(offset), shape, strides)
  extent = LazyTensor(pathlib.Path(), 0, storage.dtype, shape, strides).extent
  if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides) or offset + extent > storage.count:
    raise pickle.UnpicklingError(f"a tensor of shape {list(shape)} reaches outside its storage")
  return view


def read(path: pathlib.Path) -> object:
  """The content of the file: dicts, lists and numbers, a LazyTensor for each tensor, Inert objects for anything else.

  Raises:
    ValueError: for another type of file or a truncated one; states the remedy.
  """
  try:
    with path.open("rb") as file:
      is_zip = file.read(2) == b"PK"
    return _read_zip(path) if is_zip else _read_legacy(path)
  except (_Refused, OSError):
    raise
  except MemoryError as error:
    raise UserError(
      f"{path} asks for more memory than there is: make room, or fetch it again where it is damaged."
    ) from error
  except zipfile.BadZipFile as error:
    raise UserError(
      f"{path} is damaged: its end, where the table of contents lies, is missing; fetch it again."
    ) from error
  except Exception as error:  # A damaged pickle can raise any error.
    raise UserError(f"{path} is damaged or not a PyTorch checkpoint ({error}); fetch it again.") from error


class _Refused(UserError):
  """An intact file that is not supported."""


def _read_zip(path: pathlib.Path) -> object:
  with zipfile.ZipFile(path) as archive, path.open("rb") as file:
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in entries:
      raise _Refused(f"{path} is a zip archive without a PyTorch checkpoint (no data.pkl); give the checkpoint itself.")
    if "byteorder" in entries and archive.read(entries["byteorder"]).strip() != b"little":
      raise _Refused(f"{path} was written on a big-endian machine; save it again on a little-endian one.")
    with archive.open(entries["data.pkl"]) as pickled:
      unpickler = _Unpickler(pickled)
      content = unpickler.load()
    places = {s.key: _place(file, entries[f"data/{s.key}"], s) for s in unpickler.storages}
  return _locate(content, path, places)


def _place(file: BinaryIO, info: zipfile.ZipInfo, storage: Storage) -> int:
  """The offset of an uncompressed entry, after its local header, whose length only the header states."""
  if info.compress_type != zipfile.ZIP_STORED or info.file_size < storage.count * storage.dtype.itemsize:
    raise UserError(f"storage {storage.key} is compressed or too short")
  file.seek(info.header_offset)
  signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
  if signature != b"PK\x03\x04":
    raise UserError(f"storage {storage.key} is not where the directory says")
  return info.header_offset + 30 + name + extra


def _read_legacy(path: pathlib.Path) -> object:
  """Three header pickles, the content, the storage keys, then each storage as a count and its bytes."""
  with path.open("rb") as file:
    if _Unpickler(file).load() != LEGACY_MAGIC:
      raise _Refused(f"{path} is a pickle, but not one of PyTorch; save the weights with torch.save.")
    for _ in ("version", "platform"):
      _Unpickler(file).load()
    unpickler = _Unpickler(file)
    content = unpickler.load()
    keys = _Unpickler(file).load()
    places, position, end = {}, file.tell(), path.stat().st_size
    for key in keys:
      file.seek(position)
      places[key] = position + 8
      position += 8 + struct.unpack("<q", file.read(8))[0] * unpickler.sizes[key]
    if position > end:
      raise UserError(f"{position - end} bytes are missing at its end")
  return _locate(content, path, places)


def _locate(value: object, path: pathlib.Path, places: dict[str, int], depth: int = 2) -> object:
  """Replaces each View by a LazyTensor, down to a state dict inside its wrapper."""
  if isinstance(value, View):
    start = places[value.storage.key] + value.offset * value.storage.dtype.itemsize
    return LazyTensor(path, start, value.storage.dtype, value.shape, value.strides)
  if isinstance(value, dict) and depth:
    return {key: _locate(item, path, places, depth - 1) for key, item in value.items()}
  return value
