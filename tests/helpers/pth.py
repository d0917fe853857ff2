"""Files as torch.save writes them, made without torch: in both layouts, with any foreign objects beside the tensors."""

import pathlib
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

from vpd_jax.convert.formats import lazy_tensor

TYPES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def foreign(module: str, name: str) -> type:
  """A class that pickles as `module.name`, whether that can be imported or not."""
  return type(name, (), {"__module__": module})


class Call:
  """Pickles as the result of a call of `module.name`."""

  def __init__(self, module: str, name: str, *args: Any):
    self.function, self.args = foreign(module, name), args

  def __reduce__(self):
    return self.function, self.args


class Storage:
  """Numbers that several tensors may share."""

  def __init__(self, array: np.ndarray):
    self.array = np.ascontiguousarray(array)


def tensor(array: Any, *, shape=None, strides=None, offset: int = 0) -> Call:
  """A tensor of its own storage, or a view of a given one."""
  storage = array if isinstance(array, Storage) else Storage(array)
  shape = np.shape(array) if shape is None else shape
  strides = lazy_tensor.contiguous(shape) if strides is None else strides
  hooks = Call("collections", "OrderedDict")
  return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, tuple(shape), tuple(strides), False, hooks)


class _Pickler(pickle._Pickler):
  """Writes names of classes without importing them, and storages by key."""

  def __init__(self, file: Any, *, legacy: bool):
    super().__init__(file, 2)
    self.storages, self.legacy = [], legacy

  def persistent_id(self, obj: Any) -> Any:
    if not isinstance(obj, Storage):
      return None
    if obj not in self.storages:
      self.storages.append(obj)
    key, kind = str(self.storages.index(obj)), foreign("torch", TYPES[obj.array.dtype.name])
    return ("storage", kind, key, "cpu", obj.array.size, *((None,) if self.legacy else ()))

  def save_global(self, obj: Any, name: str | None = None) -> None:
    self.write(f"c{obj.__module__}\n{name or obj.__qualname__}\n".encode())
    self.memoize(obj)


def write_zip(path: pathlib.Path, content: Any) -> pathlib.Path:
  """The layout of torch 1.6 and newer."""
  with zipfile.ZipFile(path, "w") as archive:
    with archive.open(f"{path.stem}/data.pkl", "w") as file:
      pickler = _Pickler(file, legacy=False)
      pickler.dump(content)
    for i, storage in enumerate(pickler.storages):
      archive.writestr(f"{path.stem}/data/{i}", storage.array.tobytes())
    archive.writestr(f"{path.stem}/version", "3\n")
  return path


def write_legacy(path: pathlib.Path, content: Any) -> pathlib.Path:
  """The layout before torch 1.6."""
  with path.open("wb") as file:
    for mark in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
      pickle.dump(mark, file, 2)
    pickler = _Pickler(file, legacy=True)
    pickler.dump(content)
    pickle.dump([str(i) for i in range(len(pickler.storages))], file, 2)
    for storage in pickler.storages:
      file.write(struct.pack("<q", storage.array.size) + storage.array.tobytes())
  return path
