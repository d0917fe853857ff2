"""Parses command lines with a --config flag and prints user errors as one line."""

import sys
from collections.abc import Callable

from absl import flags

from vpd_jax.config import loader
from vpd_jax.errors import one_line


def parse(values: flags.FlagValues, arguments: list[str], complete: Callable[[list[str]], list[str]]) -> list[str]:
  """Returns the positional arguments. A wrong flag or field is printed as one line, with exit code 2.

  Args:
    values: the defined flags.
    arguments: the command line; its first item is the program.
    complete: adds the arguments that follow from the given ones.
  """
  try:
    return values(loader.resolve_argv(complete(arguments)))
  except (flags.Error, ValueError, AttributeError, KeyError, TypeError) as error:
    # config_flags raises AttributeError for a misspelled field, and TypeError for a value of another type.
    if "--debug" in arguments:
      raise
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)
