"""Checks of output folders."""

import contextlib
import re
import tempfile
from pathlib import Path

from etils import epath

from vpd_jax.errors import UserError


def check_name(path: epath.Path, option: str) -> None:
  """Rejects a local path that orbax, which finds arrays by glob patterns, could write but not read.

  Raises:
    ValueError: if the path contains a wildcard; `option` is the option that the user set.
  """
  if wildcards := sorted(set(str(path)) & set("[]*?\\")):
    raise UserError(
      f"{option}={str(path)!r} holds {' '.join(wildcards)}, and arrays below such a name are never found again; choose "
      "one without them, or rename the folder."
    )


def local(path: str | Path, option: str) -> Path:
  """An output path on this machine, with "~" expanded.

  Raises:
    ValueError: for a bucket; `option` is the option that the user set.
  """
  if re.match(r"[a-z][a-z0-9]+:/", str(path)):
    raise UserError(f"{option}={str(path)!r} is in a bucket; give a local path, and copy the result there.")
  return Path(path).expanduser()


def nearest_existing(path: Path) -> Path:
  """The path itself if it exists, else its nearest existing parent."""
  return next(p for p in (path, *path.absolute().parents) if p.exists())


def is_writable(target: Path) -> bool:
  """Whether files can be created in a folder, or in its nearest existing parent; tried, not read from its mode."""
  with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=".", dir=nearest_existing(target)):
    return True
  return False
