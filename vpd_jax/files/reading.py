"""Reads text and JSON files of users; errors are one line that names the file."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from vpd_jax.errors import UserError, one_line


def read_text(path: str | os.PathLike, *, called: str = "") -> str:
  """Reads a UTF-8 file, or UTF-16 with a byte order mark, plain or gzip-compressed, without byte order marks.

  Args:
    path: a local path, or an epath of a bucket.
    called: name of the file in messages; empty for its path.

  Raises:
    ValueError: if it is missing, cannot be read or is not such a text.
  """
  called = called or str(path)
  try:
    raw = epath.Path(path).expanduser().read_bytes()
    raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8")
  except (OSError, EOFError, zlib.error) as error:
    remedy = "; check its name" if isinstance(error, FileNotFoundError) else ""
    raise UserError(
      f"{called} cannot be read ({(isinstance(error, OSError) and error.strerror) or error}){remedy}."
    ) from None
  except UnicodeDecodeError as error:
    raise UserError(f"{called} cannot be read: it is not text in UTF-8 ({error}); save it as UTF-8.") from None
  return text.replace("\ufeff", "")  # also inside, from concatenated files


def read_json(path: str | os.PathLike, *, called: str = "") -> Any:
  """The content of a JSON file, see `read_text`.

  Raises:
    ValueError: as for `read_text`, or if it is not valid JSON.
  """
  called = called or str(path)
  text = read_text(path, called=called)
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{called} cannot be read: it is not valid JSON or truncated ({one_line(error)}); correct or copy it."
    ) from None


def visible(names: Iterable[str]) -> list[str]:
  """The sorted names of data files, without hidden ones; macOS adds a ._NAME to every file."""
  return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")
