"""Errors that are meant for users: one line that says what came, what is needed and what to do."""

import argparse
from typing import NoReturn


class UserError(ValueError):
  """What a user gave cannot be used. Commands show its text alone; any other ValueError comes with its traceback."""


class NotFiniteError(UserError, FloatingPointError):
  """Training cannot go on, as its loss is not finite."""


class Parser(argparse.ArgumentParser):
  """The parser of a script: what is wrong with its arguments is one line, without the usage; exit code 2."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog.removesuffix('.py')}: {' '.join(message.split())}; see --help\n")


def one_line(error: Exception) -> str:
  """The text of an error without line breaks."""
  return " ".join(str(error).split())
