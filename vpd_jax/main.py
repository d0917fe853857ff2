"""python -m vpd_jax.main --config=configs/nyu_depth.py [--workdir=...] [--mode=train|eval|predict|plan]

Any field of the config can be set on the command line: --config.optim.lr=3e-4. On several machines the same command
runs on each of them: on a TPU pod and below SLURM's srun as it is, elsewhere with --coordinator_address,
--process_count and --process_id.
"""

import os
import sys
from typing import Any, cast

from absl import app, flags, logging
from ml_collections import config_flags

from vpd_jax.config import loader
from vpd_jax.distributed import multiprocess
from vpd_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file and words: configs/nyu_depth.py:vpd,tiny", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/<config name> by default.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "predict", "plan"], "What to do.")
INPUT = flags.DEFINE_string("input", "", "--mode=predict: folder of pictures.")
OUTPUT = flags.DEFINE_string("output", "", "--mode=predict: folder for the results.")
CLASS = flags.DEFINE_string("class", "", "--mode=predict: class of the scenes; the mean of all without it.")
SENTENCE = flags.DEFINE_string("sentence", "", "--mode=predict: what is to be found in all pictures.")
SENTENCES = flags.DEFINE_string("sentences", "", "--mode=predict: JSON file with what is to be found in each picture.")
BOXES = flags.DEFINE_string("boxes", "", "--mode=predict: JSON file with the boxes of the people in each picture.")
ATTENTION = flags.DEFINE_bool("attention", False, "--mode=predict: also write attention maps of the classes.")
TOPOLOGY = flags.DEFINE_string(
  "topology", "", "--mode=plan: for TPUs like v5e:2x4 or GPUs like h200:8; or these devices."
)
EFFORT = flags.DEFINE_enum("effort", "low", ["low", "default"], "--mode=plan, TPUs: of the compiler.")
ACCEPT = flags.DEFINE_bool("accept_config_changes", False, "Continue a workdir that was made with another config.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for several processes.")
COUNT = flags.DEFINE_integer("process_count", None, "How many processes are one run; 1 joins nobody.", lower_bound=1)
INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
TIMEOUT = flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def main(arguments: list[str]) -> None:
  """Runs the mode; an error of the user's is one line and exit code 2."""
  # orbax tells every step it takes, and shows the traceback of what it raises anyway.
  logging.set_verbosity(logging.DEBUG if DEBUG.value else logging.FATAL)
  with multiprocess.report_errors(DEBUG.value):
    if len(arguments) > 1:
      raise UserError(f"words on the command line belong to no flag: {arguments[1:]}; write --flag=value.")
    _run()


def _run() -> None:
  if MODE.value == "plan" and TOPOLOGY.value:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing but compiling: no device is looked for
  multiprocess.connect(COORDINATOR.value, COUNT.value, INDEX.value, TIMEOUT.value)
  # After the flags, so that a wrong flag answers at once.
  import jax

  from vpd_jax.evaluation import evaluate
  from vpd_jax.monitoring import accelerators
  from vpd_jax.planning import plan
  from vpd_jax.prediction import predict_folder
  from vpd_jax.training import train

  if line := accelerators.unused():
    print(line, file=sys.stderr, flush=True)
  given = {"input": INPUT.value, "output": OUTPUT.value, "class": CLASS.value}
  given |= {
    "sentence": SENTENCE.value,
    "sentences": SENTENCES.value,
    "boxes": BOXES.value,
    "attention": ATTENTION.value,
  }
  idle = [f"--{name}" for name, value in given.items() if value and MODE.value != "predict"]
  idle += ["--topology"] if TOPOLOGY.value and MODE.value != "plan" else []
  idle += ["--effort"] if EFFORT.value != "low" and not TOPOLOGY.value else []
  idle += ["--accept_config_changes"] if ACCEPT.value and MODE.value != "train" else []
  if idle:
    raise UserError(f"{', '.join(idle)} would have no effect with --mode={MODE.value}; leave it out.")
  config, workdir = CONFIG.value, WORKDIR.value or loader.workdir(config_string())
  if not cast(Any, jax.config).jax_compilation_cache_dir and MODE.value != "plan":
    # What one command compiles, the next one in this workdir need not.
    jax.config.update("jax_compilation_cache_dir", f"{workdir}/compiled")
  if MODE.value == "train":
    train.run(config, workdir, accept_changes=ACCEPT.value)
  elif MODE.value == "eval":
    evaluate.run(config, workdir)
  elif jax.process_count() > 1:
    own = ", and give each its own --input" if MODE.value == "predict" else ""
    raise UserError(f"--mode={MODE.value} is the work of one process; add --process_count=1{own}.")
  elif MODE.value == "plan":
    plan.run(config, TOPOLOGY.value, workdir=workdir, effort=EFFORT.value)
  else:
    asked: dict[str, Any] = {
      "class_name": CLASS.value,
      "sentence": SENTENCE.value,
      "sentences": SENTENCES.value,
      "boxes": BOXES.value,
    }
    asked["attention"] = ATTENTION.value
    predict_folder.run(config, workdir, source=INPUT.value, output=OUTPUT.value, **asked)


def config_string() -> str:
  """The value of --config as it was given."""
  return config_flags.get_config_filename(flags.FLAGS["config"])


def entry() -> None:
  """Parses the command line, config paths looked up in the working directory and beside the package."""
  flags.register_validator("config", bool, "give one, like --config=configs/nyu_depth.py")
  app.run(main, argv=sys.argv, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  """The words that are no flags; a flag or field that is wrong is one line and exit code 2."""
  try:
    return flags.FLAGS(loader.resolve_argv(arguments))
  except (flags.Error, ValueError, AttributeError, KeyError, TypeError) as error:
    # config_flags answers a misspelt field with an AttributeError, a wrong kind of value with a TypeError.
    if "--debug" in arguments:
      raise
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  entry()
