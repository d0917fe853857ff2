"""Locates a source of weights and makes a local copy of the needed files if it is remote.

A source is the first match of:

1. `scheme://...`: a bucket that etils.epath supports (gs, s3, az, hf);
2. a local file or folder that exists;
3. a name of known_weights.py, such as `vpd/nyu_depth`;
4. a hub id: `org/name@revision`, or `org/name` unless it looks like a path, i.e. it ends in a suffix such as .ckpt or
   there is a local folder `org`;
5. a local path that does not exist.

Tensors are read one at a time by their offsets, so the files must be on a local disk. Files of the hub are stored in
the cache of huggingface_hub, those of a bucket in $XDG_CACHE_HOME/vpd_jax (~/.cache/vpd_jax), so that they are
downloaded once per machine. Both folders may be deleted at any time.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
from typing import NamedTuple

from etils import epath

from vpd_jax.convert import known_weights
from vpd_jax.convert.formats import weight_files
from vpd_jax.errors import UserError, one_line
from vpd_jax.files import atomic
from vpd_jax.monitoring import progress

NETWORKS = ("unet", "vae", "text_encoder")
CONFIGS = ("config.json", *(f"{network}/config.json" for network in NETWORKS), "scheduler/scheduler_config.json")
TOKENIZER = "tokenizer"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


class HubId(NamedTuple):
  """A repository of the hub, at a branch, tag or commit; revision None is the main branch."""

  repository: str
  revision: str | None


def in_bucket(source: epath.PathLike) -> bool:
  """Whether a source has the form `scheme://...`."""
  return isinstance(source, str | epath.Path) and "://" in str(source)


def hub_id(source: epath.PathLike) -> HubId | None:
  """Parses a source as a hub id by the rules of this module; None for a path."""
  match = HUB_ID.fullmatch(source) if isinstance(source, str) else None
  if match is None or pathlib.Path(source).exists():
    return None
  repository, revision = match["repository"], match["revision"]
  like_a_path = FILE_SUFFIX.search(repository) or pathlib.Path(repository).parent.is_dir()
  return None if like_a_path and revision is None else HubId(repository, revision)


def local(source: epath.PathLike, parts: tuple[str, ...] = ()) -> pathlib.Path:
  """The local path of a source: the source itself, which may not exist, or a copy of the needed files.

  Args:
    source: see the module docstring.
    parts: what is needed of a folder besides the config files: the weights of some of NETWORKS, or "", those in the
      folder itself (of each the first suffix of weight_files.SUFFIXES that exists), and TOKENIZER.

  Raises:
    ValueError: for a hub id or a bucket that cannot be reached or has no such weights, and for known weights that are
      missing or have another checksum; one line.
  """
  if in_bucket(source):
    return _from_bucket(str(source), parts)
  if known := known_weights.find(source):
    return known_weights.local(str(source)) if known.file else _from_hub(known.hub, HubId(known.hub, None), parts)
  hub_source = hub_id(source)
  if hub_source and not hub_source.revision:
    known_weights.check_name(hub_source.repository)
  return pathlib.Path(source).expanduser() if hub_source is None else _from_hub(str(source), hub_source, parts)


def bucket(url: str) -> epath.Path:
  """An existing file or folder in a bucket.

  Raises:
    ValueError: for an unknown scheme, a missing package, an unreachable bucket or a missing file; one line.
  """
  try:
    path = epath.Path(url)
    exists = path.exists()
  except KeyError as error:
    raise UserError(f"{url}: {error.args[0]} is not known; give gs://, s3://, az://, hf:// or a local path.") from error
  except ImportError as error:
    raise UserError(
      f"{url} needs a package that is not installed ({one_line(error)}); for gs:// run pip install 'vpd_jax[gcs]'."
    ) from error
  except Exception as error:  # Every filesystem raises its own errors.
    raise _unreachable(url, error) from error
  if not exists:
    raise UserError(f"{url} does not exist; check the name, or give a local path.")
  return path


def _from_bucket(url: str, parts: tuple[str, ...]) -> pathlib.Path:
  """A cached copy, keyed by file names, sizes and times, so that changed files are downloaded again."""
  source = bucket(url)
  try:
    folder = source.is_dir()
    root = source if folder else source.parent
    stats = {file: file.stat() for file in (_needed(source, parts) if folder else [source])}
  except UserError:
    raise
  except Exception as error:  # Every filesystem raises its own errors.
    raise _unreachable(url, error) from error
  state = json.dumps([[str(file), stat.length, stat.mtime] for file, stat in stats.items()])
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vpd_jax"
  copy = cache / f"{source.name}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
  targets = {file: copy / file.relative_to(root).as_posix() for file in stats}
  missing = [file for file, target in targets.items() if not target.is_file()]
  try:
    copy.mkdir(parents=True, exist_ok=True)
    if missing:
      size = sum(stats[file].length for file in missing) / 2**20
      with progress.phase(f"fetch {url} ({size:.1f} MiB) to {copy}", len(missing), "files") as fetched:
        for file in missing:
          _copy(file, targets[file])
          fetched.advance()
  except OSError as error:
    raise UserError(
      f"{url} cannot be copied to {copy} ({one_line(error)}); if that disk is full or read-only, make room or set "
      "XDG_CACHE_HOME to another folder."
    ) from error
  except Exception as error:  # Every filesystem raises its own errors.
    raise _unreachable(url, error) from error
  return copy if folder else targets[source]


def _needed(folder: epath.Path, parts: tuple[str, ...]) -> list[epath.Path]:
  """The files in a folder of a bucket that `parts` need."""
  present = {path.name for path in folder.iterdir()}
  needed = [folder / name for name in CONFIGS if name.partition("/")[0] in present]
  needed = [file for file in needed if file.exists()]
  for part in parts:
    subfolder = folder / part if part and part in present else folder
    names = {path.name for path in subfolder.iterdir()}
    if part == TOKENIZER:
      needed += [subfolder / name for name in TOKENIZER_FILES if name in names]
      continue
    weights = weight_files.weights_name(names) if part in ("", *present) else None
    if weights is None:
      raise UserError(f"{folder} holds no weights{f' of {part}/; give a diffusers folder' if part else ''}.")
    needed.append(subfolder / weights)
    if weight_files.INDEX.search(weights):
      needed += [subfolder / shard for shard in weight_files.shards(subfolder / weights)]
  return needed


def _copy(source: epath.Path, target: pathlib.Path) -> None:
  """Copies one file atomically."""
  with atomic.beside(target) as unfinished, source.open("rb") as read, unfinished.open("wb") as write:
    shutil.copyfileobj(read, write, 1 << 24)


def _from_hub(source: str, hub: HubId, parts: tuple[str, ...]) -> pathlib.Path:
  """The snapshot in huggingface_hub's cache, with the needed files."""
  from huggingface_hub import snapshot_download  # Slow to import, and only needed here.

  patterns = [*CONFIGS]
  if TOKENIZER in parts:
    patterns += [f"{folder}{name}" for folder in (f"{TOKENIZER}/", "") for name in TOKENIZER_FILES]
  missing = [part for part in parts if part != TOKENIZER]
  for suffix in weight_files.SUFFIXES:  # Try one format after the other until all networks have weights.
    weight_patterns = [pattern for part in missing for pattern in _patterns(part, suffix)]
    try:
      folder = pathlib.Path(
        snapshot_download(hub.repository, revision=hub.revision, allow_patterns=patterns + weight_patterns)
      )
    except Exception as error:  # The hub client and its transports raise many types.
      raise UserError(
        f"{source!r} is no local path, and as a hub id it cannot be fetched ({one_line(_root(error))[:300]}); "
        f"{known_weights.near(source)}check the name, "
        "the network and HF_HUB_OFFLINE, or give a local folder."
      ) from error
    missing = [part for part in missing if not _has_weights(folder / part)]
    if not missing:
      return folder
  where = f" of {'/, '.join(missing)}/" if any(missing) else ""
  raise UserError(
    f"hub id {source!r} holds no weights{where}, or the network is off and they were never fetched; "
    f"give the id of a {'diffusers ' if where else ''}repository that does, or a local folder."
  )


def _patterns(part: str, suffix: str) -> list[str]:
  """Possible file names of the weights of a network for one suffix."""
  variant, _, form = suffix.removeprefix(".").rpartition(".")
  numbered = [f"-*-of-*{suffix}"] + [f".{variant}-*-of-*.{form}"] * bool(variant)
  ends = [
    (stem + suffix, *weight_files.indices(stem, suffix), *(stem + end for end in numbered))
    for stem in weight_files.STEMS
  ]
  return [f"{part}/{name}".lstrip("/") for names in ends for name in names]


def _has_weights(folder: pathlib.Path) -> bool:
  return folder.is_dir() and weight_files.weights_name({path.name for path in folder.iterdir()}) is not None


def _unreachable(url: str, error: Exception) -> UserError:
  # etils gives all schemes to TensorFlow if it is installed.
  others = not url.startswith("gs://") and importlib.util.find_spec("tensorflow") is not None
  hint = "set EPATH_USE_TF=0 (TensorFlow reads gs:// only), " if others else ""
  return UserError(
    f"{url} cannot be reached ({one_line(error)[:300]}); {hint}check the name, the network and your credentials, or "
    "give a local path."
  )


def _root(error: BaseException) -> BaseException:
  """The original error; the hub client wraps those of its transport several times."""
  while (cause := error.__cause__ or error.__context__) is not None:
    error = cause
  return error
