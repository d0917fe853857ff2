"""Tells damaged files from temporary read errors, so that users are only asked to remove damaged ones."""

import contextlib
import json
import re
from collections.abc import Iterator

from etils import epath

from vpd_jax.errors import UserError, one_line

# Prefixes of tensorstore errors, which are raised as ValueError, for missing or corrupted data.
_STATUS = re.compile(r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION: .*Invalid JSON)", re.DOTALL)
_ABSENT = "was not found in the checkpoint"  # orbax's KeyError for an item whose folder is missing


@contextlib.contextmanager
def explained(name: str, folder: epath.Path, remedy: str) -> Iterator[None]:
  """Turns read errors into one-line user errors that tell damage from other causes; program errors are re-raised.

  Args:
    name: what is read.
    folder: that contains it, to be removed if damaged.
    remedy: what to do afterwards, for the message.
  """
  try:
    yield
  except Exception as error:
    text = one_line(error)[:200]
    if is_damage(error) and folder.is_dir():
      raise UserError(f"{name} is damaged ({text}); remove {folder}, {remedy}.") from error
    # Buckets raise any type of error.
    if is_outside(error) or "://" in str(folder):
      raise UserError(
        f"{name} cannot be read now ({type(error).__name__}: {text}), which does not mean that it is damaged: keep it, "
        "check the connection, the permissions and the memory, and give the same command again."
      ) from error
    raise


def is_damage(error: BaseException) -> bool:
  """Whether the content is missing, truncated or corrupted, as opposed to an inaccessible file."""
  if isinstance(error, (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, EOFError)):
    return True
  if isinstance(error, KeyError):
    return _ABSENT in str(error)
  return isinstance(error, ValueError) and bool(_STATUS.match(str(error)))


def is_outside(error: BaseException) -> bool:
  """Whether the machine, the network or permissions are the cause, so that a retry may succeed."""
  text = str(error)
  status = re.match(r"[A-Z]+(_[A-Z]+)*: ", text) is not None or "RESOURCE_EXHAUSTED" in text
  return isinstance(error, (OSError, MemoryError)) or (isinstance(error, (ValueError, RuntimeError)) and status)
