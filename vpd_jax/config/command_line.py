"""Command lines with a --config, whose mistakes are one line."""

import sys
from collections.abc import Callable

from absl import flags

from vpd_jax.config import loader


def parse(values: flags.FlagValues, arguments: list[str], completed: Callable[[list[str]], list[str]]) -> list[str]:
  """The positional arguments; a wrong flag or field is printed as one line, with exit code 2.

  Args:
    values: the flags that are known.
    arguments: the command line, whose first word is the program.
    completed: adds to it what follows from the rest.
  """
  try:
    return values(loader.resolve_argv(completed(arguments)))
  except (flags.Error, ValueError, AttributeError, KeyError, TypeError) as error:
    # config_flags raises AttributeError for a misspelled field, and TypeError for a value of another type.
    if "--debug" in arguments:
      raise
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
