"""Files that are whole at any time: written beside their place, then renamed. And JSON that every reader takes."""

import contextlib
import json
import math
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
  """A name in the same folder to write a file or folder to: renamed to `path` at the end, removed on failure.

  It is hidden, different every time, and ends in the suffix of `path`. A file under `path` is replaced, a folder
  is not.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f".unfinished.{secrets.token_hex(4)}.{path.name[-200:]}")  # names end at 255 bytes
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
  """Writes a file that appears under its name only when it is complete; returns its path.

  Args:
    path: local, or an epath.Path, also in a bucket.
    content: text (UTF-8), bytes, or a function that writes to the path it is given.
  """
  with beside(path) as unfinished:
    if isinstance(content, str):
      unfinished.write_bytes(content.encode())
    elif isinstance(content, bytes):
      unfinished.write_bytes(content)
    else:
      content(unfinished)
  return path


def write_json(path: AnyPath, content: object, *, indent: int | None = 1) -> AnyPath:
  """`write` of `to_json`, with a line break at the end."""
  return write(path, to_json(content, indent=indent) + "\n")


def to_json(content: object, *, indent: int | None = None) -> str:
  """JSON in which numbers that are not finite are null: NaN and Infinity are no JSON."""
  return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: object) -> object:
  if isinstance(content, float | np.floating):
    return float(content) if math.isfinite(content) else None
  if isinstance(content, Mapping):
    return {key: _finite(value) for key, value in content.items()}
  if isinstance(content, list | tuple):
    return [_finite(value) for value in content]
  return content
