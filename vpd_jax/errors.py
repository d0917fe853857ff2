"""User-facing errors: one line that states the invalid input, what is required and how to fix it."""

import argparse
from collections.abc import Collection, Sequence
from typing import NoReturn

SHOWN = 10  # items listed in a message


class UserError(ValueError):
  """Invalid user input. Commands print its message only; any other ValueError is printed with its traceback."""


class NotFiniteError(UserError, FloatingPointError):
  """Training stopped because the loss is not finite."""


class Parser(argparse.ArgumentParser):
  """Argument parser of a script: errors are printed as one line, without the usage; exit code 2."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog.removesuffix('.py')}: {' '.join(message.split())}; see --help\n")


def one_line(error: BaseException, *, with_type: bool = False) -> str:
  """The message of an error without line breaks, behind its type if wanted; the type alone if there is no message."""
  name, text = type(error).__name__, " ".join(str(error).split())
  return f"{name}: {text}" if text and with_type else text or name


def first_items(items: Sequence[object], separator: str = ", ", *, total: int | None = None) -> str:
  """The first items of a list for a message, such as "a, b" or "a, b, .., j, and 5 more".

  Args:
    items: all, or at least the first SHOWN of them.
    separator: between items.
    total: number of items if `items` does not hold all.
  """
  more = (len(items) if total is None else total) - SHOWN
  return separator.join([*map(str, items[:SHOWN]), *([f"and {more} more"] if more > 0 else [])])


def check_choice(option: str, value: object, choices: Collection[object], *, owner: str = "") -> None:
  """Raises a UserError if the value of an option is not one of the choices.

  Args:
    option: its name in the message.
    value: of the option.
    choices: all valid values.
    owner: what the choices belong to, if they depend on it.
  """
  if value not in choices:
    where = f" to {owner}" if owner else ""
    raise UserError(f"{option}={value!r} is unknown{where}; choose one of {choices}.")
