"""Atomic file writes, by renaming a temporary file, and strictly valid JSON."""

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
from etils import epath

AnyPath = TypeVar("AnyPath", pathlib.Path, epath.Path)


@contextlib.contextmanager
def beside(path: AnyPath) -> Iterator[AnyPath]:
  """A temporary path in the folder of `path`, renamed to `path` on success and removed on failure.

  It may become a file or a folder. Its name is hidden, random, and has the suffix of `path`. An existing file at `path`
  is replaced, a folder is not.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # File names are limited to 255 bytes, of which a character takes up to 4.
  unfinished = path.with_name(f".unfinished.{secrets.token_hex(4)}.{path.name[-50:]}")
  try:
    yield unfinished
    unfinished.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      if unfinished.is_dir():
        shutil.rmtree(unfinished) if "://" not in str(unfinished) else epath.Path(unfinished).rmtree()
      else:
        unfinished.unlink(missing_ok=True)
    raise


def write(path: AnyPath, content: str | bytes | Callable[[AnyPath], object]) -> AnyPath:
  """Writes a file atomically; returns its path.

  Args:
    path: a local path, or an epath.Path, also in a bucket.
    content: text (UTF-8), bytes, or a function that writes to a given path.
  """
  with beside(path) as unfinished:
    if isinstance(content, str):
      unfinished.write_bytes(content.encode())
    elif isinstance(content, bytes):
      unfinished.write_bytes(content)
    else:
      content(unfinished)
  return path


def sync(path: pathlib.Path) -> None:
  """Writes a file or the names in a folder to the disk, so that they survive a crash of the machine."""
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def write_json(path: AnyPath, content: object) -> AnyPath:
  """Writes JSON atomically, with a final newline; see `to_json`."""
  return write(path, to_json(content, indent=1) + "\n")


def to_json(content: object, *, indent: int | None = None) -> str:
  """JSON with null for numbers that are not finite, because NaN and Infinity are not valid JSON."""
  return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: object) -> object:
  if isinstance(content, float | np.floating):
    return float(content) if math.isfinite(content) else None
  if isinstance(content, Mapping):
    return {key: _finite(value) for key, value in content.items()}
  if isinstance(content, list | tuple):
    return [_finite(value) for value in content]
  return content
