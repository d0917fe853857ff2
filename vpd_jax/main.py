"""python -m vpd_jax.main --config=configs/nyu_depth.py [--workdir=...] [--mode=train|eval|predict|export|plan|weights]

Every field of the config can be set on the command line: --config.optim.lr=3e-4. To train on several machines, run the
same command on each of them. TPU pods and SLURM's srun are detected; elsewhere add --coordinator_address,
--process_count and --process_id.
"""

import os
import sys
from typing import Any, cast

from absl import app, flags, logging
from ml_collections import config_flags

from vpd_jax.config import command_line, loader, stored
from vpd_jax.distributed import multiprocess
from vpd_jax.errors import UserError
from vpd_jax.monitoring import accelerators, progress

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file and variant: configs/nyu_depth.py:vpd,tiny; default of --mode=eval|predict|export: that of the run.",
  lock_config=True,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config name>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "predict", "export", "plan", "weights"], "What to run.")
INPUT = flags.DEFINE_string("input", "", "--mode=predict: an image or a folder of images; of depth also a video.")
OUTPUT = flags.DEFINE_string("output", "", "--mode=predict|export: folder for the results.")
CLASS = flags.DEFINE_string("class", "", "--mode=predict: class of all images; default: the mean of all classes.")
SENTENCE = flags.DEFINE_string("sentence", "", "--mode=predict: sentence about all images.")
SENTENCES = flags.DEFINE_string("sentences", "", "--mode=predict: JSON file with sentences about each image.")
BOXES = flags.DEFINE_string("boxes", "", "--mode=predict: JSON file with the boxes of people in each image.")
ATTENTION = flags.DEFINE_bool("attention", False, "--mode=predict: also write the attention maps of the classes.")
PLY = flags.DEFINE_bool("ply", False, "--mode=predict of depth: also write a colored point cloud of each image.")
FOCAL = flags.DEFINE_float(
  "focal", None, "--ply: focal length of all images, in pixels; default: as in their EXIF data, else assumed."
)
ALLOW_DAMAGED = flags.DEFINE_bool(
  "allow_damaged", False, "--mode=predict: exit code 0 although some images cannot be read."
)
TOPOLOGY = flags.DEFINE_string(
  "topology", "", "--mode=plan: TPUs like v5e:2x4 or GPUs like h200:8; default: the local devices."
)
EFFORT = flags.DEFINE_enum("effort", "low", ["low", "default"], "--mode=plan: effort of the TPU compiler.")
ACCEPT = flags.DEFINE_bool("accept_config_changes", False, "Continue a workdir of a different config.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
COUNT = flags.DEFINE_integer("process_count", None, "Number of processes; 1 runs alone.", lower_bound=1)
INDEX = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)
TIMEOUT = flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def main(arguments: list[str]) -> None:
  """Runs the selected mode; user errors are printed as one line, with exit code 2."""
  # Orbax logs every step, and the traceback of every error it raises.
  logging.set_verbosity(logging.DEBUG if DEBUG.value else logging.FATAL)
  with multiprocess.report_errors(DEBUG.value):
    if len(arguments) > 1:
      raise UserError(f"unexpected positional arguments: {arguments[1:]}; write --flag=value.")
    _run()


def _run() -> None:
  _check_modes()
  if MODE.value == "weights":
    from vpd_jax.convert import known_weights

    progress.write("\n".join(known_weights.listing()))
    return
  if MODE.value == "plan" and TOPOLOGY.value:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compiles only, and needs no device
  workdir = os.path.expanduser(WORKDIR.value or loader.workdir(config_string()))
  if multiprocess.may_be_first(INDEX.value, os.environ):
    progress.show()
  is_run_config = config_string() == stored.config_string(WORKDIR.value or workdir)
  config_name = "of the run" if is_run_config else os.path.basename(config_string())
  progress.say(f"--mode={MODE.value}, config {config_name}, workdir {workdir}")
  multiprocess.connect(COORDINATOR.value, COUNT.value, INDEX.value, TIMEOUT.value)
  # Imported late so that invalid flags are reported immediately.
  with progress.phase("import"):
    import jax

    from vpd_jax import experiment
    from vpd_jax.evaluation import evaluate
    from vpd_jax.planning import plan
    from vpd_jax.prediction import export, predict_folder, predict_video
    from vpd_jax.training import train

  if jax.process_index():
    progress.hide()
  if warning := accelerators.unused():
    print(warning, file=sys.stderr, flush=True)
  overrides = vars(config_flags)["get_override_values"](flags.FLAGS["config"])  # missing from the type stubs
  config = experiment.with_chosen_parts(CONFIG.value, overrides)
  loader.check(config)
  if not cast(Any, jax.config).jax_compilation_cache_dir and MODE.value != "plan":
    # The next command in this workdir reuses the compiled programs.
    jax.config.update("jax_compilation_cache_dir", f"{workdir}/compiled")
  if MODE.value == "train":
    train.run(config, workdir, accept_changes=ACCEPT.value)
  elif MODE.value == "eval":
    evaluate.run(config, workdir)
  elif jax.process_count() > 1:
    hint = ", and give each its own --input" if MODE.value == "predict" else ""
    raise UserError(f"--mode={MODE.value} runs in one process; add --process_count=1{hint}.")
  elif MODE.value == "export":
    export.run(config, workdir, output=OUTPUT.value)
  elif MODE.value == "plan":
    plan.run(config, TOPOLOGY.value, workdir=workdir, effort=EFFORT.value)
  else:
    options: dict[str, Any] = {name: flag.value for name, flag in _prediction_flags().items()}
    if not predict_video.is_video(INPUT.value):
      predict_folder.run(config, workdir, **options)
      return
    video_options = {name: options.pop(name) for name in ("source", "output", "class_name", "sentence")}
    if unused := [f"--{name}" for name in options if _is_set(_prediction_flags()[name])]:
      raise UserError(f"{', '.join(unused)}: no effect on a video, --input={INPUT.value!r}; leave it out.")
    predict_video.run(config, workdir, **video_options)


def _prediction_flags() -> dict[str, flags.FlagHolder]:
  """The flags of --mode=predict, keyed by the arguments of predict_folder.run."""
  text_flags = {"source": INPUT, "output": OUTPUT, "class_name": CLASS, "sentence": SENTENCE}
  text_flags |= {"sentences": SENTENCES, "boxes": BOXES}
  return text_flags | cast(
    dict[str, Any], {"attention": ATTENTION, "allow_damaged": ALLOW_DAMAGED, "ply": PLY, "focal": FOCAL}
  )


def _check_modes() -> None:
  """Raises for flags that do not apply to the selected mode."""
  others = [
    CONFIG,
    WORKDIR,
    *_prediction_flags().values(),
    TOPOLOGY,
    EFFORT,
    ACCEPT,
    COORDINATOR,
    COUNT,
    INDEX,
    TIMEOUT,
  ]
  if MODE.value == "weights" and (unused := [f"--{flag.name}" for flag in others if flag.present]):
    raise UserError(f"{', '.join(unused)}: no effect with --mode=weights, which lists what is known; leave it out.")
  flags_by_mode = {"predict": _prediction_flags(), "plan": {"topology": TOPOLOGY}, "train": {"accept_changes": ACCEPT}}
  for mode, mode_flags in flags_by_mode.items():
    set_flags = [f for f in mode_flags.values() if _is_set(f) and not (f is OUTPUT and MODE.value == "export")]
    if unused := [f"--{flag.name}" for flag in set_flags if MODE.value != mode]:
      raise UserError(f"{', '.join(unused)}: only valid with --mode={mode}, not with --mode={MODE.value}.")
  if EFFORT.value != "low" and not TOPOLOGY.value:
    raise UserError("--effort is only valid with --mode=plan and --topology; leave it out.")


def _is_set(flag: flags.FlagHolder) -> bool:
  """Whether a flag asks for anything but its default; --focal=0 does, although 0 is false."""
  return flag.value != flag.default


def config_string() -> str:
  """The value of --config on the command line."""
  return config_flags.get_config_filename(flags.FLAGS["config"])


def entry() -> None:
  """Parses the command line and runs `main`; config paths may be relative to the package."""
  flags.register_validator(
    "config",
    lambda config: bool(config) or MODE.value == "weights",
    "give one, like --config=configs/nyu_depth.py, or for --mode=eval|predict|export the --workdir of a run",
  )
  app.run(main, argv=sys.argv, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  return command_line.parse(flags.FLAGS, arguments, _with_config)


def _with_config(arguments: list[str]) -> list[str]:
  """The command line; modes that read a run default to the config stored in --workdir if --config is missing."""
  options = arguments[: arguments.index("--")] if "--" in arguments else arguments
  values = {flag: loader.argument(options, flag) for flag in ("config", "mode", "workdir")}
  if values["config"] is None and values["mode"] in ("eval", "predict", "export") and values["workdir"]:
    return [arguments[0], f"--config={stored.config_string(values['workdir'])}", *arguments[1:]]
  return arguments


def use_huge_pages() -> None:
  """Starts the program again with its memory in huge pages, if it will run on the CPU of a Linux machine.

  A call of the network allocates gigabytes; in pages of 4 KiB that takes up to a third of the CPU time. glibc reads
  this setting only when a process starts. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 keeps small pages.
  """
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables or not accelerators.is_absent():
    return
  os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
  use_huge_pages()
  entry()
