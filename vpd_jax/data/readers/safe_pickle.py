"""Pickles of plain data, read without running anything they ask for.

The references of RefCOCO come as a pickle of Python 2. A pickle can call any function it names; this unpickler knows
none, so that a file can hold dicts, lists, texts and numbers, and nothing else.
"""

import pickle
from pathlib import Path

from vpd_jax.errors import UserError


class _Plain(pickle.Unpickler):
  """Every class and function is refused before it is looked up."""

  def find_class(self, module: str, name: str) -> object:
    raise _Refused(f"asks for {module}.{name}")

  def persistent_load(self, pid: object) -> object:
    raise _Refused(f"refers to something outside of it ({str(pid)[:50]!r})")


class _Refused(Exception):
  """The file holds more than plain data."""


def read(path: str | Path) -> object:
  """What a pickle of plain data holds; texts of Python 2 are read byte by byte as Latin-1.

  Raises:
    ValueError: it asks for a class or function (nothing of it is run), is damaged, or cannot be read; one line.
  """
  try:
    with Path(path).open("rb") as file:
      return _Plain(file, encoding="latin1").load()
  except _Refused as error:
    raise UserError(
      f"{path} {error}, which could run anything, so it was not read further; only lists, dicts, texts and numbers "
      "are needed: fetch the file from where the data set is published."
    ) from None
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from None
  except Exception as error:  # a damaged pickle can fail anywhere
    reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"{path} is damaged or no pickle ({reason}); fetch it again.") from None
