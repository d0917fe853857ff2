"""Reads pickles of plain data without executing code.

The references of RefCOCO are a Python 2 pickle. A pickle can call any function by name; this unpickler rejects all of
them, so that files can only contain dicts, lists, strings and numbers.
"""

import pickle
from pathlib import Path

from vpd_jax.errors import UserError, one_line


class _Plain(pickle.Unpickler):
  """Rejects classes and functions before they are imported."""

  def find_class(self, module: str, name: str) -> object:
    raise _Refused(f"asks for {module}.{name}")

  def persistent_load(self, pid: object) -> object:
    raise _Refused(f"refers to something outside of it ({str(pid)[:50]!r})")


class _Refused(Exception):
  """The file contains more than plain data."""


def read(path: str | Path) -> object:
  """Reads a pickle of plain data; Python 2 strings are decoded as Latin-1.

  Raises:
    ValueError: if it refers to a class or function (which is not executed), is damaged, or cannot be read; one line.
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
  except Exception as error:  # a damaged pickle can raise any error
    raise UserError(f"{path} is damaged or not a pickle ({one_line(error)}); fetch it again.") from None
