"""python -m vpd_jax.main --config=configs/nyu_depth.py [--workdir=...] [--mode=train|eval|predict]

Any field of the config can be set on the command line: --config.optim.lr=3e-4.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vpd_jax import config_file

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file and words: configs/nyu_depth.py:vpd,tiny", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/<config name> by default.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "predict"], "What to do.")
INPUT = flags.DEFINE_string("input", "", "--mode=predict: folder of pictures.")
OUTPUT = flags.DEFINE_string("output", "", "--mode=predict: folder for the results.")
CLASS = flags.DEFINE_string("class", "", "--mode=predict: class of the scenes; the mean of all without it.")
ACCEPT = flags.DEFINE_bool("accept_config_changes", False, "Continue a workdir that was made with another config.")
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def main(arguments: list[str]) -> None:
  """Runs the mode; an error of the user's is one line and exit code 2."""
  if len(arguments) > 1:
    raise app.UsageError(f"unknown words on the command line: {arguments[1:]}.")
  logging.set_verbosity(logging.DEBUG if DEBUG.value else logging.ERROR)  # orbax tells every step it takes
  try:
    _run()
  except (ValueError, FloatingPointError, OSError) as error:
    if DEBUG.value:
      raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _run() -> None:
  # After the flags, so that a wrong flag answers at once.
  import jax

  from vpd_jax import evaluate, predict, train

  config, workdir = CONFIG.value, WORKDIR.value or config_file.workdir(config_string())
  if not jax.config.jax_compilation_cache_dir:
    # What one command compiles, the next one in this workdir need not.
    jax.config.update("jax_compilation_cache_dir", f"{workdir}/compiled")
  if MODE.value == "train":
    train.run(config, workdir, accept_changes=ACCEPT.value)
  elif MODE.value == "eval":
    evaluate.run(config, workdir)
  else:
    predict.run(config, workdir, source=INPUT.value, output=OUTPUT.value, class_name=CLASS.value)


def config_string() -> str:
  """The value of --config as it was given."""
  return config_flags.get_config_filename(flags.FLAGS["config"])


def entry() -> None:
  """Parses the command line, config paths looked up in the working directory and beside the package."""
  flags.mark_flag_as_required("config")
  app.run(main, argv=sys.argv, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  """The words that are no flags; a flag or field that is wrong is one line and exit code 2."""
  try:
    return flags.FLAGS(config_file.resolve_argv(arguments))
  except (flags.Error, ValueError, AttributeError, KeyError, TypeError) as error:
    # config_flags answers a misspelt field with an AttributeError, a wrong kind of value with a TypeError.
    if "--debug" in arguments:
      raise
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  entry()
