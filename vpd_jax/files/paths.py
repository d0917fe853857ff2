"""Which folders arrays can be written to and found again."""

import contextlib
import tempfile
from pathlib import Path

from etils import epath

from vpd_jax.errors import UserError


def check_name(path: epath.Path, option: str) -> None:
  """Refuses a local path that orbax, which looks for the files of an array by pattern, would write and never find.

  Raises:
    ValueError: the path holds a character of patterns; `option` is what the user set.
  """
  if found := sorted(set(str(path)) & set("[]*?\\")):
    raise UserError(
      f"{option}={str(path)!r} holds {' '.join(found)}, and arrays below such a name are never found again; choose one "
      "without them, or rename the folder."
    )


def is_writable(target: Path) -> bool:
  """Whether a local folder, or the nearest one above it that exists, takes new files: tried, not read off its mode."""
  parent = next(p for p in (target, *target.absolute().parents) if p.exists())
  with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=".", dir=parent):
    return True
  return False
