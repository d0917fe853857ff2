"""Where a source of weights lies, and a local copy of what is needed of one that lies elsewhere.

A source is the first of:

1. `scheme://...`: a bucket, as etils.epath knows them (gs, s3, az, hf);
2. a local file or folder that exists;
3. a name of known_weights.py, such as `vpd/nyu_depth`;
4. a hub id: `org/name@revision`, or `org/name` unless it looks like a path, that is, it ends in a suffix such as .ckpt
   or there is a local folder `org`;
5. a local path that does not exist; never looked for elsewhere.

Tensors are read one by one, at their places in the file, so the files have to be on a disk. Those of the hub go to the
cache of huggingface_hub, those of a bucket to $XDG_CACHE_HOME/vpd_jax (~/.cache/vpd_jax): a network of gigabytes is
fetched once per machine and not once per run, and either folder may be deleted at any time.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import NamedTuple

from etils import epath

from vpd_jax.convert import known_weights
from vpd_jax.convert.formats import weight_files
from vpd_jax.errors import UserError
from vpd_jax.files import atomic
from vpd_jax.monitoring import progress

NETWORKS = ("unet", "vae", "text_encoder")
CONFIGS = (*(f"{network}/config.json" for network in NETWORKS), "scheduler/scheduler_config.json")
TOKENIZER = "tokenizer"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


class HubId(NamedTuple):
  """A repository of the hub, at a branch, tag or commit; None is its main branch."""

  repository: str
  revision: str | None


def in_bucket(source: epath.PathLike) -> bool:
  """Whether a source is written as `scheme://...`."""
  return isinstance(source, str | epath.Path) and "://" in str(source)


def hub_id(source: epath.PathLike) -> HubId | None:
  """The hub id that a source is, by the rules of this file; None for a path."""
  match = HUB_ID.fullmatch(source) if isinstance(source, str) else None
  if match is None or pathlib.Path(source).exists():
    return None
  repository, revision = match["repository"], match["revision"]
  like_a_path = FILE_SUFFIX.search(repository) or pathlib.Path(repository).parent.is_dir()
  return None if like_a_path and revision is None else HubId(repository, revision)


def local(source: epath.PathLike, parts: tuple[str, ...] = ()) -> pathlib.Path:
  """A source as a local path: itself, whether it exists or not, or a copy of what is needed of it.

  Args:
    source: see the top of this file.
    parts: what is needed of a folder beside the config files: the weights of some of NETWORKS (one file each, of the
      first form in files.SUFFIXES that is there), and TOKENIZER.

  Raises:
    ValueError: a hub id or a bucket that cannot be reached, or does not hold the weights; known weights that are not
      there, or are another file; one line.
  """
  if in_bucket(source):
    return _from_bucket(str(source), parts)
  if known := known_weights.find(source):
    return known_weights.local(str(source)) if known.file else _from_hub(known.hub, HubId(known.hub, None), parts)
  found = hub_id(source)
  if found and not found.revision:
    known_weights.check_name(found.repository)
  return pathlib.Path(source).expanduser() if found is None else _from_hub(str(source), found, parts)


def bucket(url: str) -> epath.Path:
  """A bucket's file or folder, which exists.

  Raises:
    ValueError: an unknown scheme, a missing package, a bucket that cannot be reached, nothing there; one line.
  """
  try:
    path = epath.Path(url)
    there = path.exists()
  except KeyError as error:
    raise UserError(f"{url}: {error.args[0]} is not known; give gs://, s3://, az://, hf:// or a local path.") from error
  except ImportError as error:
    raise UserError(
      f"{url} needs a package that is not installed ({_line(error)}); for gs:// run pip install 'vpd_jax[gcs]'."
    ) from error
  except Exception as error:  # Every filesystem has its own.
    raise _unreachable(url, error) from error
  if not there:
    raise UserError(f"{url} does not exist; check the name, or give a local path.")
  return path


def _from_bucket(url: str, parts: tuple[str, ...]) -> pathlib.Path:
  """A copy whose place follows from names, sizes and times: what has changed since is fetched anew."""
  source = bucket(url)
  try:
    folder = source.is_dir()
    root = source if folder else source.parent
    stats = {file: file.stat() for file in (_needed(source, parts) if folder else [source])}
  except UserError:
    raise
  except Exception as error:  # Every filesystem has its own.
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
      f"{url} cannot be copied to {copy} ({_line(error)}); if that disk is full or read-only, make room or set "
      "XDG_CACHE_HOME to another folder."
    ) from error
  except Exception as error:  # Every filesystem has its own.
    raise _unreachable(url, error) from error
  return copy if folder else targets[source]


def _needed(folder: epath.Path, parts: tuple[str, ...]) -> list[epath.Path]:
  """The files of a bucket's folder that `parts` need."""
  there = {path.name for path in folder.iterdir()}
  needed = [folder / name for name in CONFIGS if name.partition("/")[0] in there]
  needed = [file for file in needed if file.exists()]
  for part in parts:
    inner = folder / part if part in there else folder
    names = {path.name for path in inner.iterdir()}
    if part == TOKENIZER:
      needed += [inner / name for name in TOKENIZER_FILES if name in names]
      continue
    weights = weight_files.weights_name(names) if part in there else None
    if weights is None:
      raise UserError(f"{folder} holds no weights of {part}/; give a diffusers folder.")
    needed.append(inner / weights)
    if weight_files.INDEX.search(weights):
      needed += [inner / shard for shard in weight_files.shards(inner / weights)]
  return needed


def _copy(source: epath.Path, target: pathlib.Path) -> None:
  """Copies one file; it appears under its name only when it is complete."""
  with atomic.beside(target) as unfinished, source.open("rb") as read, unfinished.open("wb") as write:
    shutil.copyfileobj(read, write, 1 << 24)


def _from_hub(source: str, found: HubId, parts: tuple[str, ...]) -> pathlib.Path:
  """The snapshot in huggingface_hub's cache, with what is needed of it."""
  from huggingface_hub import snapshot_download  # Slow to import, and only needed here.

  patterns = [*CONFIGS]
  if TOKENIZER in parts:
    patterns += [f"{folder}{name}" for folder in (f"{TOKENIZER}/", "") for name in TOKENIZER_FILES]
  lacking = [part for part in parts if part != TOKENIZER]
  for suffix in weight_files.SUFFIXES:  # One form after the other, until every network has its weights in one of them.
    wanted = [pattern for part in lacking for pattern in _patterns(part, suffix)]
    try:
      folder = pathlib.Path(
        snapshot_download(found.repository, revision=found.revision, allow_patterns=patterns + wanted)
      )
    except Exception as error:  # The hub's client and its transports have many.
      raise UserError(
        f"{source!r} is no local path, and as a hub id it cannot be fetched ({_line(_root(error))}); "
        f"{known_weights.near(source)}check the name, "
        "the network and HF_HUB_OFFLINE, or give a local folder."
      ) from error
    lacking = [part for part in lacking if not _held(folder / part)]
    if not lacking:
      return folder
  raise UserError(
    f"hub id {source!r} holds no weights of {'/, '.join(lacking)}/, or the network is off and they were never fetched; "
    "give the id of a diffusers repository, or a local folder."
  )


def _patterns(part: str, suffix: str) -> list[str]:
  """Names that the weights of a network may have in one form."""
  variant, _, form = suffix.removeprefix(".").rpartition(".")
  numbered = [f"-*-of-*{suffix}"] + [f".{variant}-*-of-*.{form}"] * bool(variant)
  ends = [
    (stem + suffix, *weight_files.indices(stem, suffix), *(stem + end for end in numbered))
    for stem in weight_files.STEMS
  ]
  return [f"{part}/{name}" for names in ends for name in names]


def _held(folder: pathlib.Path) -> bool:
  return folder.is_dir() and weight_files.weights_name({path.name for path in folder.iterdir()}) is not None


def _unreachable(url: str, error: Exception) -> UserError:
  return UserError(
    f"{url} cannot be reached ({_line(error)}); check the name, the network and your credentials, or give a local path."
  )


def _line(error: BaseException) -> str:
  """What an error says, in one line."""
  return " ".join(str(error).split())[:300] or type(error).__name__


def _root(error: BaseException) -> BaseException:
  """The error behind an error, where the hub's client wraps that of its transport several times."""
  while (behind := error.__cause__ or error.__context__) is not None:
    error = behind
  return error
