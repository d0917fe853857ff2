"""Opens weight files as {name: tensor}, with lazily read values.

Supported are diffusers folders of PyTorch or Flax (one subfolder per network), single .safetensors files, CompVis .ckpt
files and the authors' .pth files.
"""

import hashlib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from vpd_jax.convert.formats import flax_folder, pickles
from vpd_jax.convert.formats.lazy_tensor import LazyTensor, NotRead, contiguous
from vpd_jax.errors import UserError
from vpd_jax.files import reading
from vpd_jax.types import Fields

SAFETENSORS = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
WRAPPERS = ("state_dict", "model")
# File names of weights in folders of diffusers or transformers, in order of preference.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "diffusion_flax_model", "flax_model")
SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".msgpack")
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # Suffix of the shard index of sharded weights.
WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile and FSDP
NOT_WEIGHTS = {
  b"version https://git-lfs": "a git-lfs pointer; run 'git lfs pull' beside it",
  b"<": "a web page, left by a failed download; fetch the file again",
}


class Weights(NamedTuple):
  """The content of a source.

  Attributes:
    tensors: by the source's names, without the prefixes of DistributedDataParallel, torch.compile and FSDP; those of
      Flax by PyTorch's names.
    files: the files that contain them.
    others: types of the entries that are not tensors, by name.
  """

  tensors: dict[str, LazyTensor]
  files: tuple[pathlib.Path, ...]
  others: dict[str, str]


def open_file(path: str | pathlib.Path) -> Weights:
  """Opens a single file of any supported format, which is detected by its first bytes, not by its name.

  Raises:
    ValueError: for a missing, truncated or unknown file, or one without weights; one line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path} is not a file; give a .safetensors, .ckpt or .pth file.")
  with path.open("rb") as file:
    head = file.read(64)
  if head[8:9] == b"{":
    return Weights(_unwrapped(_read_safetensors(path)), (path,), {})
  if head[:2] in (b"PK", b"\x80\x02"):
    tensors, others = _unwrap(pickles.read(path), path)
    return Weights(_unwrapped(tensors), (path,), others)
  if head[:1] and head[0] in flax_folder.STARTS:
    tensors, others = flax_folder.read(path)
    return Weights(tensors, (path,), others)
  if not head:
    raise UserError(f"{path} is an empty file; fetch it again.")
  for start, what in NOT_WEIGHTS.items():
    if head.lstrip().startswith(start):
      raise UserError(f"{path} is {what}.")
  raise UserError(f"{path} is not a checkpoint (it begins with {head[:8]!r}); give a .safetensors, .ckpt or .pth file.")


def open_folder(path: str | pathlib.Path, parts: tuple[str, ...]) -> Weights:
  """Opens networks of a diffusers folder; their names are prefixes: `unet.conv_in.weight`.

  Raises:
    ValueError: for a network without readable weights; one line.
  """
  tensors, files, others = {}, [], {}
  for part in parts:
    for file in _weight_files(pathlib.Path(path) / part):
      weights = open_file(file)
      tensors |= {f"{part}.{name}" if part else name: tensor for name, tensor in weights.tensors.items()}
      others |= {f"{part}.{name}" if part else name: type_name for name, type_name in weights.others.items()}
      files.append(file)
  return Weights(tensors, tuple(files), others)


def read_config(path: str | pathlib.Path, name: str = "config.json") -> Fields:
  """Reads the config.json of a network, or another file with a JSON object."""
  path = pathlib.Path(path) / name
  config = reading.read_json(path)
  if not isinstance(config, dict):
    raise UserError(f"{path} holds no JSON object; complete the folder.")
  return config


def sha256(path: str | pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with pathlib.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def weights_name(names: Collection[str]) -> str | None:
  """The name of the weights of a network, or of their shard index, among file names; None if there is none."""
  known = (name for suffix in SUFFIXES for stem in STEMS for name in (stem + suffix, *indices(stem, suffix)))
  return next((name for name in known if name in names), None)


def indices(stem: str, suffix: str) -> tuple[str, ...]:
  """Possible names of a shard index: "model.safetensors.index.fp16.json", or the older form."""
  variant, _, form = suffix.removeprefix(".").rpartition(".")
  older = f"{stem}{suffix}.index.json"
  return (f"{stem}.{form}.index.{variant}.json", older) if variant else (older,)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The weight file of a network, or its shards."""
  names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
  name = weights_name(names)
  if name is None:
    content = names if folder.is_dir() else "nothing: it does not exist"
    raise UserError(
      f"{folder} holds no weights ({content}); complete it with a {STEMS[0]}{SUFFIXES[0]} or one of the other files "
      "that diffusers saves."
    )
  return [folder / shard for shard in shards(folder / name)] if INDEX.search(name) else [folder / name]


def shards(index: epath.Path | pathlib.Path) -> list[str]:
  """File names in a shard index.

  Raises:
    ValueError: for a damaged index; one line.
  """
  content = reading.read_json(index)
  try:
    return sorted(set(content["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index} is not an index of shards ({error!r}); fetch it again.") from error


def _read_safetensors(path: pathlib.Path) -> dict[str, LazyTensor]:
  """The library reads and validates the header; the values follow without gaps."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      slices = {name: file.get_slice(name) for name in file.offset_keys()}
      dtype_names = {name: tensor.get_dtype() for name, tensor in slices.items()}
      shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
      aliases = file.metadata() or {}
  except safetensors.SafetensorError as error:
    _check_dtypes(path, _header_dtypes(path))
    raise UserError(f"{path} is damaged or not a safetensors file ({error}); fetch it again.") from error
  _check_dtypes(path, dtype_names)
  dtypes = {name: np.dtype(SAFETENSORS[dtype_name]) for name, dtype_name in dtype_names.items()}
  sizes = [math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()]
  starts = itertools.accumulate(sizes, initial=path.stat().st_size - sum(sizes))
  tensors = {
    name: LazyTensor(path, start, dtypes[name], shape, contiguous(shape))
    for (name, shape), start in zip(shapes.items(), starts, strict=False)
  }
  # For tensors with several names, save_model stores one and lists the others in the metadata: {other: stored}.
  return tensors | {
    name: tensors[stored] for name, stored in aliases.items() if stored in tensors and name not in tensors
  }


def _header_dtypes(path: pathlib.Path) -> dict[str, str]:
  """{name: dtype} in a header that the library rejects, to tell unknown dtypes from damage."""
  try:
    with path.open("rb") as file:
      header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
  except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
    return {}


def _check_dtypes(path: pathlib.Path, dtype_names: Mapping[str, str]) -> None:
  if unsupported := {name: dtype_name for name, dtype_name in dtype_names.items() if dtype_name not in SAFETENSORS}:
    raise NotRead(path, unsupported)


def _unwrap(content: object, path: pathlib.Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
  """(tensors, types of other entries) of a state dict, bare or below a key of WRAPPERS."""
  state = content
  if isinstance(content, dict):
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
  entries = state if isinstance(state, dict) else {}
  unsupported = {str(name): value.dtype for name, value in entries.items() if isinstance(value, pickles.Unsupported)}
  if unsupported:
    raise NotRead(path, unsupported)
  tensors = {str(name): value for name, value in entries.items() if isinstance(value, LazyTensor)}
  if not tensors:
    content_hint = list(entries)[:5] if entries else type(content).__name__
    raise UserError(
      f"{path} holds no weights by name, but {content_hint}; save it with torch.save(model.state_dict(), ...), "
      f"bare or under one of {list(WRAPPERS)}."
    )
  others = {str(name): type(value).__name__ for name, value in entries.items() if str(name) not in tensors}
  return tensors, others


def _unwrapped(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Removes the `module.` of DistributedDataParallel from all names, and WRAPPER_PREFIXES anywhere in them."""
  plain = {_plain(name): tensor for name, tensor in tensors.items()}
  if len(plain) < len(tensors):
    return tensors  # two names would collide
  if all(name.startswith("module.") for name in plain):
    return {name.removeprefix("module."): tensor for name, tensor in plain.items()}
  return plain


def _plain(name: str) -> str:
  for prefix in WRAPPER_PREFIXES:
    name = name.replace(prefix, "")
  return name
