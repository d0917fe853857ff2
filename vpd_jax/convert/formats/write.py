"""Writes a state dict without PyTorch, as a .pth, tensor by tensor and in order, or as .safetensors."""

import functools
import pathlib
import pickle
import zipfile
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from vpd_jax.convert.formats.lazy_tensor import contiguous
from vpd_jax.convert.formats.pickles import STORAGES
from vpd_jax.convert.formats.weight_files import SAFETENSORS
from vpd_jax.errors import UserError
from vpd_jax.files import atomic, paths

ENDINGS = (".pth", ".safetensors")


def write(path: str | pathlib.Path, state: Mapping[str, np.ndarray], *, wrapper: str = "model") -> None:
  """Writes a state dict atomically.

  Args:
    path: ends in .pth or .safetensors; the latter sorts the tensors.
    state: arrays in PyTorch's names and layouts.
    wrapper: key of the state dict in a .pth, as the authors save: "model", or mmsegmentation's "state_dict".

  Raises:
    ValueError: for another suffix, or a dtype that the format does not support.
  """
  check_name(path)
  path = paths.local(path, "output")
  writers = {".pth": functools.partial(_write_pth, wrapper=wrapper), ".safetensors": _write_safetensors}
  atomic.write(path, lambda unfinished: writers[path.suffix.lower()](unfinished, state))


def check_name(path: str | pathlib.Path) -> None:
  """Raises ValueError if a path is in a bucket, or its suffix is not one that `write` supports."""
  paths.local(path, "output")
  if pathlib.Path(path).suffix.lower() not in ENDINGS:
    raise UserError(f"output={str(path)!r} must end in one of {ENDINGS}; rename it.")


def _write_safetensors(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
  """Makes arrays contiguous, since the library silently corrupts others."""
  names = {np.dtype(dtype): name for name, dtype in SAFETENSORS.items()}
  for name, array in state.items():
    _known(names, name, array)
  save_file({name: np.asarray(array, order="C") for name, array in state.items()}, path)


def _write_pth(path: pathlib.Path, state: Mapping[str, np.ndarray], *, wrapper: str) -> None:
  """The zip archive of torch.save: one pickle that refers to storages, and one entry of raw bytes per storage."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", _pickle(state, wrapper))
    archive.writestr("archive/byteorder", "little")
    for i, array in enumerate(state.values()):
      with archive.open(f"archive/data/{i}", "w", force_zip64=True) as entry:
        entry.write(_bytes(array))
    archive.writestr("archive/version", "3\n")


def _pickle(state: Mapping[str, np.ndarray], wrapper: str) -> bytes:
  """{wrapper: OrderedDict of tensors} in pickle protocol 2, opcode by opcode, because its classes are PyTorch's."""
  storages = {np.dtype(dtype): name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
  ordered = b"ccollections\nOrderedDict\n)R"  # GLOBAL, EMPTY_TUPLE, REDUCE
  parts = [b"\x80\x02}", _value(wrapper), ordered, b"("]
  for i, (name, array) in enumerate(state.items()):
    storage = b"ctorch\n" + _known(storages, name, array).encode() + b"\n"
    persistent = b"(" + _value("storage") + storage + _value(str(i)) + _value("cpu") + _value(array.size) + b"tQ"
    view = _value(0) + _value(tuple(array.shape)) + _value(contiguous(array.shape)) + _value(False) + ordered
    parts += [_value(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", persistent, view, b"tR"]
  return b"".join([*parts, b"u", b"s."])


def _value(value: object) -> bytes:
  """Opcodes that push a plain value: its pickle without the frame around it."""
  return pickle.dumps(value, 2)[2:-1]


def _bytes(array: np.ndarray) -> memoryview:
  """The elements in row-major order, without a copy if the array is contiguous."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _known(names: Mapping[np.dtype, str], name: str, array: np.ndarray) -> str:
  if array.dtype not in names:
    raise UserError(f"{name} is {array.dtype}, which this format cannot hold; convert it to float32.")
  return names[array.dtype]
