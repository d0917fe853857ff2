"""User-facing errors: one line that states the invalid input, what is required and how to fix it."""

import argparse
from typing import NoReturn


class UserError(ValueError):
  """Invalid user input. Commands print its message only; any other ValueError is printed with its traceback."""


class NotFiniteError(UserError, FloatingPointError):
  """Training stopped because the loss is not finite."""


class Parser(argparse.ArgumentParser):
  """Argument parser of a script: errors are printed as one line, without the usage; exit code 2."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog.removesuffix('.py')}: {' '.join(message.split())}; see --help\n")


def one_line(error: Exception) -> str:
  """The message of an error without line breaks."""
  return " ".join(str(error).split())
