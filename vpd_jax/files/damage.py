"""Which errors of reading mean that a file is damaged: only then is anyone asked to remove it."""

import contextlib
import json
import re
from collections.abc import Iterator

from etils import epath

from vpd_jax.errors import UserError

# How errors of tensorstore begin, which come as ValueErrors: numbers that are missing or are not those written.
_STATUS = re.compile(r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION: .*Invalid JSON)", re.DOTALL)
_ABSENT = "was not found in the checkpoint"  # orbax's KeyError for a part whose folder is gone


@contextlib.contextmanager
def explained(what: str, folder: epath.Path, then: str) -> Iterator[None]:
  """An error of reading as one line that calls a thing damaged only where it is; an error of the program as it is.

  Args:
    what: the thing.
    folder: in which it lies, to be removed where it is damaged.
    then: what follows, for the message.
  """
  try:
    yield
  except Exception as error:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if is_damage(error) and folder.is_dir():
      raise UserError(f"{what} is damaged ({text}); remove {folder}, {then}.") from error
    # A bucket fails with any kind of error.
    if is_outside(error) or "://" in str(folder):
      raise UserError(
        f"{what} cannot be read now ({type(error).__name__}: {text}), which does not mean that it is damaged: keep it, "
        "see to the connection, the permissions or the memory, and give the same command again."
      ) from error
    raise


def is_damage(error: BaseException) -> bool:
  """Whether content is missing, cut off or not what was written; not where a file could not be asked for it."""
  if isinstance(error, (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, EOFError)):
    return True
  if isinstance(error, KeyError):
    return _ABSENT in str(error)
  return isinstance(error, ValueError) and bool(_STATUS.match(str(error)))


def is_outside(error: BaseException) -> bool:
  """Whether the machine, the network or the rights are to blame: the same file may be read at another time."""
  text = str(error)
  status = re.match(r"[A-Z]+(_[A-Z]+)*: ", text) is not None or "RESOURCE_EXHAUSTED" in text
  return isinstance(error, (OSError, MemoryError)) or (isinstance(error, (ValueError, RuntimeError)) and status)
