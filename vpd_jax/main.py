"""python -m vpd_jax.main --config=configs/nyu_depth.py [--workdir=...] [--mode=train|eval|predict]

Any field of the config can be set on the command line: --config.optim.lr=3e-4. On several machines the same command
runs on each of them: on a TPU pod and below SLURM's srun as it is, elsewhere with the three flags of `distributed`.
"""

import contextlib
import glob
import importlib.util
import os
import re
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

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
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for several processes.")
COUNT = flags.DEFINE_integer("process_count", None, "How many processes are one run; 1 joins nobody.", lower_bound=1)
INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
TIMEOUT = flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

_FAILURE, _LISTEN = "vpd_jax/failure", 1.0  # where a process leaves its last words, and seconds between two looks
_ended = threading.Event()  # the work of this process


def main(arguments: list[str]) -> None:
  """Runs the mode; an error of the user's is one line and exit code 2."""
  # orbax tells every step it takes, and shows the traceback of what it raises anyway.
  logging.set_verbosity(logging.DEBUG if DEBUG.value else logging.FATAL)
  with answered():
    if len(arguments) > 1:
      raise ValueError(f"words on the command line belong to no flag: {arguments[1:]}; write --flag=value.")
    _run()


@contextlib.contextmanager
def answered() -> Iterator[None]:
  """Ends the process at an error: with one line where it is the user's, and together with the others of the run."""
  try:
    yield
  except Exception as error:
    alone = "jax" not in sys.modules or not _jax().distributed.is_initialized()
    known = isinstance(error, (ValueError, FloatingPointError, OSError)) and not DEBUG.value
    if alone and not known:
      raise
    line = f"error: {' '.join(str(error).split())}" if known else traceback.format_exc()
    if not alone:
      _leave_all(line)
    print(line, file=sys.stderr)
    sys.exit(2)
  finally:
    _ended.set()


def _leave_all(line: str) -> None:
  """Ends this process with a line, and the others by telling them."""
  client, index = _client(), _jax().process_index()
  with contextlib.suppress(RuntimeError):  # another one was first, or is gone already
    client.key_value_set(_FAILURE, f"process {index} has ended. {line}")
    time.sleep(2 * _LISTEN if index == 0 else 0)  # the messages of all pass through process 0
  _leave(f"process {index}: {line}")


def _listen() -> None:
  """Body of a thread: ends this process when another one has told that it failed."""
  while not _ended.wait(_LISTEN):
    try:
      line = _client().key_value_try_get(_FAILURE)
    except RuntimeError:  # nothing is told
      continue
    if not _ended.wait(2 * _LISTEN):  # where all met the same error, each says it itself
      _leave(f"process {_jax().process_index()}: {line}")


def _client() -> Any:
  """The connection to the other processes, for words rather than arrays. jax shows it in no public module."""
  from jax._src import distributed

  return distributed.global_state.client


def _jax() -> Any:
  """jax, imported no earlier than needed, so that a wrong flag answers at once."""
  import jax

  return jax


def distributed(
  address: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
  """The arguments of jax.distributed.initialize; None where this process is the whole run.

  What is not given comes from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT and JAX_PROCESS_ID, then, where srun started
  several tasks or a TPU has several hosts, from these, by jax itself. A machine on its own connects nowhere.

  Args:
    address: "HOST:PORT" of process 0.
    count: of processes; 1 means alone, wherever.
    index: of this process, from 0.
    environment: os.environ.

  Raises:
    ValueError: something is missing or wrong.
  """
  given = {"coordinator_address": address, "num_processes": count, "process_id": index}
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_ID")
  for (key, value), name in zip(list(given.items()), names, strict=True):
    text = environment.get(name)
    if value is None and text:
      if key != "coordinator_address" and not text.isdecimal():
        raise ValueError(f"{name}={text!r} is no number; give a whole number from 0.")
      given[key] = text if key == "coordinator_address" else int(text)
  if given["num_processes"] == 1:
    return None
  cluster = _cluster(environment)
  missing = [key for key, value in given.items() if value is None]
  if len(missing) == len(given) and not cluster:
    return None
  if missing and not cluster:
    raise ValueError(
      f"several processes were asked for without {missing}; give each of them --coordinator_address=HOST:PORT of "
      "process 0, --process_count=N and its own --process_id=0 to N-1, or none of the three."
    )
  if not missing and given["process_id"] >= given["num_processes"]:
    raise ValueError(
      f"--process_id={given['process_id']} of --process_count={given['num_processes']} processes does not exist; "
      "ids begin with 0."
    )
  if given["coordinator_address"] and not re.fullmatch(r".+:\d+", given["coordinator_address"]):
    raise ValueError(f"--coordinator_address={given['coordinator_address']!r} has no port; write HOST:PORT.")
  detection = {} if missing else {"cluster_detection_method": "deactivate"}
  return {key: value for key, value in given.items() if value is not None} | detection


def _cluster(environment: Mapping[str, str]) -> bool:
  """Whether SLURM or Cloud TPU started this process as one of several."""
  if "SLURM_STEP_NODELIST" in environment:  # set by srun, not in a batch script or on a login node
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
  chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")
  if not chips or not importlib.util.find_spec("libtpu") or environment.get("JAX_PLATFORMS", "tpu") != "tpu":
    return False
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
  slices = re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", "" if hosts else _metadata("tpu-env"))
  slices = environment.get("MEGASCALE_NUM_SLICES") or (slices[1] if slices else 1)
  return int(slices) > 1 or len((hosts or _metadata("worker-network-endpoints")).split(",")) > 1


def _metadata(key: str) -> str:
  """What Google Cloud says of this machine; empty elsewhere."""
  host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  address = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
  try:
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Metadata-Flavor": "Google"}), timeout=5) as x:
      return x.read().decode()
  except OSError:
    return ""


def connect() -> None:
  """Makes this process one of several where it is; before anything touches a device."""
  arguments = distributed(COORDINATOR.value, COUNT.value, INDEX.value, os.environ)
  if arguments is None:
    return
  told = ", ".join(f"{key} {value}" for key, value in arguments.items() if key != "cluster_detection_method")
  failure = f"this process did not find the other ones of its run ({told or 'as SLURM or the TPU says'}): "
  remedy = (
    "Start all of them within --coordinator_timeout, let the port of process 0 be free and reachable, or run alone "
    "with --process_count=1."
  )
  seconds = TIMEOUT.value
  # jax itself would abort without a word for the user.
  timer = threading.Timer(seconds, _leave, [f"error: {failure}nothing for {seconds} s. {remedy}"])
  timer.daemon = True
  timer.start()
  try:
    _jax().distributed.initialize(**arguments, initialization_timeout=seconds + 60)
  except (RuntimeError, ValueError, OSError) as error:
    raise ValueError(f"{failure}{' '.join(str(error).split())[:300]}. {remedy}") from error
  finally:
    timer.cancel()
  # A collective with a process that is gone may wait for ever, or until jax aborts without the reason.
  threading.Thread(target=_listen, daemon=True, name="listen").start()


def _leave(line: str) -> None:
  """Ends the process at once: an orderly end waits for the others, which wait for it in their next collective."""
  print(line, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(2)


def _run() -> None:
  connect()
  from vpd_jax import evaluate, predict, train  # after the flags, so that a wrong flag answers at once

  jax = _jax()
  config, workdir = CONFIG.value, WORKDIR.value or config_file.workdir(config_string())
  if not jax.config.jax_compilation_cache_dir:
    # What one command compiles, the next one in this workdir need not.
    jax.config.update("jax_compilation_cache_dir", f"{workdir}/compiled")
  if MODE.value == "train":
    train.run(config, workdir, accept_changes=ACCEPT.value)
  elif MODE.value == "eval":
    evaluate.run(config, workdir)
  elif jax.process_count() > 1:
    raise ValueError("--mode=predict is the work of one process; add --process_count=1, and give each its own --input.")
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
