"""The files foreign weights come in, as {name: tensor}; names, shapes and dtypes at once, numbers when asked for.

A diffusers folder (one sub-folder per network) of PyTorch or Flax, a single .safetensors, a CompVis .ckpt, an authors'
.pth.
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
# What a folder of diffusers or transformers may call its weights, in order of preference.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "diffusion_flax_model", "flax_model")
SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".msgpack")
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # How the name of the list of shards of a divided file ends.
WRAPPING = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # By torch.compile and the like.
NOT_WEIGHTS = {
  b"version https://git-lfs": "a git-lfs pointer; run 'git lfs pull' beside it",
  b"<": "a web page, left by a failed download; fetch the file again",
}


class Weights(NamedTuple):
  """What a source holds.

  Attributes:
    tensors: by their own names, without what DistributedDataParallel, torch.compile and FSDP add to them; those of Flax
      by PyTorch's names.
    files: the files they lie in.
    others: entries beside the tensors that are none, with what they are.
  """

  tensors: dict[str, LazyTensor]
  files: tuple[pathlib.Path, ...]
  others: dict[str, str]


def open_file(path: str | pathlib.Path) -> Weights:
  """Weights of a single file of any known format; told by its first bytes, not by its name.

  Raises:
    ValueError: a missing, truncated or unknown file, or one without weights; one line.
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
  """Weights of some networks of a diffusers folder; the network's name stands in front: `unet.conv_in.weight`.

  Raises:
    ValueError: a network without a readable file of weights; one line.
  """
  tensors, files, others = {}, [], {}
  for part in parts:
    for file in _weight_files(pathlib.Path(path) / part):
      weights = open_file(file)
      tensors |= {f"{part}.{name}" if part else name: tensor for name, tensor in weights.tensors.items()}
      others |= {f"{part}.{name}" if part else name: kind for name, kind in weights.others.items()}
      files.append(file)
  return Weights(tensors, tuple(files), others)


def read_config(path: str | pathlib.Path, name: str = "config.json") -> Fields:
  """A network's config.json, or another file of one JSON object."""
  path = pathlib.Path(path) / name
  config = reading.read_json(path)
  if not isinstance(config, dict):
    raise UserError(f"{path} holds no JSON object; complete the folder.")
  return config


def sha256(path: str | pathlib.Path) -> str:
  """Of a file's content, in hexadecimal."""
  with pathlib.Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def weights_name(names: Collection[str]) -> str | None:
  """Which file of a network's folder holds its weights, or the index of their shards; None where none does."""
  known = (name for suffix in SUFFIXES for stem in STEMS for name in (stem + suffix, *indices(stem, suffix)))
  return next((name for name in known if name in names), None)


def indices(stem: str, suffix: str) -> tuple[str, ...]:
  """What the list of shards of a divided file may be called: "model.safetensors.index.fp16.json", or the older form."""
  variant, _, form = suffix.removeprefix(".").rpartition(".")
  older = f"{stem}{suffix}.index.json"
  return (f"{stem}.{form}.index.{variant}.json", older) if variant else (older,)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The file of weights of one network, or its shards."""
  held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
  name = weights_name(held)
  if name is None:
    found = held if folder.is_dir() else "nothing: it does not exist"
    raise UserError(
      f"{folder} holds no weights ({found}); complete it with a {STEMS[0]}{SUFFIXES[0]} or one of the other files "
      "that diffusers saves."
    )
  return [folder / shard for shard in shards(folder / name)] if INDEX.search(name) else [folder / name]


def shards(index: epath.Path | pathlib.Path) -> list[str]:
  """File names in the index of a divided file of weights.

  Raises:
    ValueError: a damaged index; one line.
  """
  content = reading.read_json(index)
  try:
    return sorted(set(content["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index} is not an index of shards ({error!r}); fetch it again.") from error


def _read_safetensors(path: pathlib.Path) -> dict[str, LazyTensor]:
  """The library reads the header and checks it against the file; the numbers lie behind it without gaps."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      found = {name: file.get_slice(name) for name in file.offset_keys()}
      kinds = {name: tensor.get_dtype() for name, tensor in found.items()}
      shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
      shared = file.metadata() or {}
  except safetensors.SafetensorError as error:
    _check_kinds(path, _kinds(path))
    raise UserError(f"{path} is damaged or not a safetensors file ({error}); fetch it again.") from error
  _check_kinds(path, kinds)
  dtypes = {name: np.dtype(SAFETENSORS[kind]) for name, kind in kinds.items()}
  sizes = [math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()]
  starts = itertools.accumulate(sizes, initial=path.stat().st_size - sum(sizes))
  tensors = {
    name: LazyTensor(path, start, dtypes[name], shape, contiguous(shape))
    for (name, shape), start in zip(shapes.items(), starts, strict=False)
  }
  # Of several names of one tensor save_model keeps one, and tells the others: {other: kept}.
  return tensors | {name: tensors[kept] for name, kept in shared.items() if kept in tensors and name not in tensors}


def _kinds(path: pathlib.Path) -> dict[str, str]:
  """{name: type} in a header that the library refuses: types that it does not know are no damage."""
  try:
    with path.open("rb") as file:
      header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
  except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
    return {}


def _check_kinds(path: pathlib.Path, kinds: Mapping[str, str]) -> None:
  if strange := {name: kind for name, kind in kinds.items() if kind not in SAFETENSORS}:
    raise NotRead(path, strange)


def _unwrap(content: object, path: pathlib.Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
  """(tensors, other entries) of a state dict, bare or under one of the usual keys."""
  found = content
  if isinstance(content, dict):
    found = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
  entries = found if isinstance(found, dict) else {}
  strange = {str(name): value.kind for name, value in entries.items() if isinstance(value, pickles.Strange)}
  if strange:
    raise NotRead(path, strange)
  tensors = {str(name): value for name, value in entries.items() if isinstance(value, LazyTensor)}
  if not tensors:
    held = list(entries)[:5] if entries else type(content).__name__
    raise UserError(
      f"{path} holds no weights by name, but {held}; save it with torch.save(model.state_dict(), ...), "
      f"bare or under one of {list(WRAPPERS)}."
    )
  others = {str(name): type(value).__name__ for name, value in entries.items() if str(name) not in tensors}
  return tensors, others


def _unwrapped(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
  """Names without the `module.` that DistributedDataParallel puts before every one, and without WRAPPING anywhere."""
  plain = {_plain(name): tensor for name, tensor in tensors.items()}
  if len(plain) < len(tensors):
    return tensors  # two names would become one
  if all(name.startswith("module.") for name in plain):
    return {name.removeprefix("module."): tensor for name, tensor in plain.items()}
  return plain


def _plain(name: str) -> str:
  for word in WRAPPING:
    name = name.replace(word, "")
  return name
