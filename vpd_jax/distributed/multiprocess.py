"""Runs of several processes: connecting them, and ending all of them if one fails."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vpd_jax.errors import UserError, one_line
from vpd_jax.monitoring import accelerators

if TYPE_CHECKING:  # it imports jax, for which the first line of a command does not wait
  from vpd_jax.types import Fields

_FAILURE, _POLL = "vpd_jax/failure", 1.0  # key of the error of a failed process, and seconds between two reads of it
_ALIVE, _DONE = "vpd_jax/alive", "done"  # keys of the heartbeats of the processes, and the last value
_HEARTBEAT, _TIMEOUT = 5.0, 60.0  # seconds between heartbeats, and without one until a process is assumed dead
_REMEDY = "The same command continues from the last checkpoint."
_finished = threading.Event()  # set when the work of this process is done
_exit_watcher: subprocess.Popen | None = None  # reports that this process was killed


@contextlib.contextmanager
def report_errors(debug: bool = False) -> Iterator[None]:
  """Ends the process at an error, and with it the other processes of the run.

  Ctrl-C is one line, and exit code 130.

  Args:
    debug: print the traceback of every error; else those of the user (UserError, OSError) are printed as one line.
  """
  try:
    yield
  except KeyboardInterrupt as error:
    line = "; ".join(["interrupted", *getattr(error, "__notes__", [])])
    if "jax" in sys.modules and _jax().distributed.is_initialized():
      _abort_all(line)
    print(line, file=sys.stderr)
    sys.exit(130)
  except Exception as error:
    alone = "jax" not in sys.modules or not _jax().distributed.is_initialized()
    known = isinstance(error, (UserError, OSError)) and not debug
    if alone and not known:
      raise
    text = one_line(error)
    line = f"error: {text}" if known else traceback.format_exc()
    if not alone and isinstance(error, _jax().errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text:
      time.sleep(_TIMEOUT + 2 * _HEARTBEAT)  # the watcher ends this process if another one is dead, and names it
      line += f"error: another process may have died: {text[:200]}. {_REMEDY}"
    if not alone:
      _abort_all(line)
    print(line, file=sys.stderr)
    sys.exit(2)
  finally:
    _finish()


def _abort_all(line: str) -> None:
  """Ends this process with a line, and publishes the line so that the others end too."""
  index = _jax().process_index()
  try:
    line = _client().key_value_try_get(_FAILURE)  # the first error is the cause of the later ones
  except RuntimeError:
    with contextlib.suppress(RuntimeError):
      _client().key_value_set(_FAILURE, f"process {index} failed. {line}")
      time.sleep(3 * _POLL if index == 0 else 0)  # the others read it from process 0
  _exit(f"process {index}: {line}")


class _Heartbeat(NamedTuple):
  """The last heartbeat of a process, and when it was first read."""

  value: str
  time: float


def _watch_others() -> None:
  """Body of a thread that ends this process when another one fails or has no heartbeat.

  Every process publishes heartbeats, which process 0 checks. JAX would notice too, but later, and abort.
  """
  index, beats, next_beat = _jax().process_index(), 0, 0.0
  seen: dict[str, _Heartbeat] = {}  # by key of a process
  while not _finished.wait(_POLL):
    now = time.monotonic()
    try:
      if now >= next_beat:
        next_beat, beats = now + _HEARTBEAT, beats + 1
        _client().key_value_set(f"{_ALIVE}/{index}", str(beats), allow_overwrite=True)
        values = _client().key_value_dir_get(_ALIVE) if index == 0 else []
        seen |= {key: _Heartbeat(value, now) for key, value in values if key not in seen or seen[key].value != value}
      late = [key for key, last in seen.items() if last.value != _DONE and now - last.time > _TIMEOUT]
      if late:
        lost = ", ".join(sorted(key.split("/")[-1] for key in late))
        _abort_all(f"error: process {lost}: no heartbeat for {_TIMEOUT:.0f} s; assuming it died. {_REMEDY}")
      line = _client().key_value_try_get(_FAILURE)
    except RuntimeError:  # the key is not set
      continue
    _exit(f"process {index}: {line}")


def _finish() -> None:
  """Marks the work of this process as done; others may still be working."""
  _finished.set()
  if "jax" in sys.modules and _jax().distributed.is_initialized():
    with contextlib.suppress(RuntimeError):
      _client().key_value_set(f"{_ALIVE}/{_jax().process_index()}", _DONE, allow_overwrite=True)
  _stop_exit_watcher()


def _start_exit_watcher() -> None:
  """Starts a shell that prints a line if this process is killed, or aborted by JAX because process 0 died."""
  global _exit_watcher
  index = _jax().process_index()
  line = (
    f"process {index}: killed"
    + ("" if index == 0 else ", or, if JAX says so above, aborted because process 0 died")
    + f". {_REMEDY}"
  )
  _exit_watcher = subprocess.Popen(
    ["sh", "-c", 'trap "" INT TERM; read -r word || echo "$0" >&2', line], stdin=subprocess.PIPE, start_new_session=True
  )


def _stop_exit_watcher() -> None:
  if _exit_watcher is not None and _exit_watcher.poll() is None:
    _exit_watcher.communicate(b"\n")


def _client() -> Any:
  """The key-value store of JAX's coordination service, which has no public module."""
  from jax._src import distributed

  return distributed.global_state.client


def _jax() -> Any:
  """jax, imported late so that a wrong flag is reported immediately."""
  import jax

  return jax


def arguments(
  address: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> "Fields | None":
  """The arguments of jax.distributed.initialize; None if this process is the whole run.

  Missing values are read from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT and JAX_PROCESS_ID. If srun started several
  tasks, or a TPU has several hosts, JAX detects the rest itself. A single machine connects to nothing.

  Args:
    address: "HOST:PORT" of process 0.
    count: of processes; 1 disables the detection.
    index: of this process, from 0.
    environment: os.environ.

  Raises:
    ValueError: a missing or invalid value.
  """
  values = {"coordinator_address": address, "num_processes": count, "process_id": index}
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_COUNT", "JAX_PROCESS_ID")
  for (key, value), name in zip(list(values.items()), names, strict=True):
    text = environment.get(name)
    if value is None and text:
      if key != "coordinator_address" and not text.isdecimal():
        raise UserError(f"{name}={text!r} is not a number; give an integer from 0.")
      values[key] = text if key == "coordinator_address" else int(text)
  if values["num_processes"] == 1:
    return None
  cluster = _cluster(environment)
  missing = [key for key, value in values.items() if value is None]
  if len(missing) == len(values) and not cluster:
    return None
  if missing and not cluster:
    raise UserError(
      f"several processes were requested without {missing}; give each of them --coordinator_address=HOST:PORT of "
      "process 0, --process_count=N and its own --process_id=0 to N-1, or none of the three."
    )
  if not missing and values["process_id"] >= values["num_processes"]:
    raise UserError(
      f"--process_id={values['process_id']} of --process_count={values['num_processes']} processes does not exist; "
      "ids start at 0."
    )
  if values["coordinator_address"] and not re.fullmatch(r".+:\d+", values["coordinator_address"]):
    raise UserError(f"--coordinator_address={values['coordinator_address']!r} has no port; write HOST:PORT.")
  detection = _gpus_of_task(environment) if missing else {"cluster_detection_method": "deactivate"}
  return {key: value for key, value in values.items() if value is not None} | detection


def may_be_first(index: int | None, environment: Mapping[str, str]) -> bool:
  """Whether this process may be the first of its run, as far as is known before `connect`.

  Args:
    index: of this process, from 0, as the command line gives it.
    environment: os.environ.
  """
  ranks = (index, environment.get("JAX_PROCESS_ID"), environment.get("SLURM_PROCID"))
  known = next((str(number) for number in ranks if number not in (None, "")), "0")
  return known == "0"


def _cluster(environment: Mapping[str, str]) -> bool:
  """Whether SLURM or Cloud TPU started this process as one of several."""
  if "SLURM_STEP_NODELIST" in environment:  # set by srun, not in a batch script or on a login node
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
  platforms = (environment.get("JAX_PLATFORMS") or "tpu").split(",")
  if not accelerators.tpu_chips() or not importlib.util.find_spec("libtpu") or "tpu" not in platforms:
    return False
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
  slices = re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", "" if hosts else _metadata("tpu-env"))
  slices = environment.get("MEGASCALE_NUM_SLICES") or (slices[1] if slices else 1)
  return int(slices) > 1 or len((hosts or _metadata("worker-network-endpoints")).split(",")) > 1


def _gpus_of_task(environment: Mapping[str, str]) -> "Fields":
  """{"local_device_ids": all visible GPUs} of a task of SLURM that shares them with no other task; else empty.

  JAX takes the GPU that has the task's number on its machine: of a task that sees a single GPU, one that is not there;
  of the only task of a machine, one of several.
  """
  visible = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
  if "SLURM_STEP_NODELIST" not in environment or not visible or environment.get("JAX_LOCAL_DEVICE_IDS"):
    return {}
  tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # "4", "4(x2)" or "4,3"
  alone = re.fullmatch(r"1(\(x\d+\))?", tasks) or len(visible) == 1
  return {"local_device_ids": list(range(len(visible)))} if alone else {}


def _metadata(key: str) -> str:
  """A metadata value of a Google Cloud machine; empty elsewhere."""
  host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  address = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
  try:
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Metadata-Flavor": "Google"}), timeout=5) as x:
      return x.read().decode()
  except OSError:
    return ""


def connect(address: str | None, count: int | None, index: int | None, seconds: int) -> None:
  """Connects the processes of a run, if there are several. Call it before any device is used.

  Args:
    address, count, index: see `arguments`.
    seconds: timeout.

  Raises:
    ValueError: a missing or invalid value, or the other processes were not found.
  """
  options = arguments(address, count, index, os.environ)
  if options is None:
    return
  unspoken = ("cluster_detection_method", "local_device_ids")
  settings = ", ".join(f"{key} {value}" for key, value in options.items() if key not in unspoken)
  failure = f"could not reach the coordinator ({settings or 'detected from SLURM or the TPU'}): "
  remedy = (
    "Start all processes within --coordinator_timeout, check that the port of process 0 is free and reachable, or run "
    "alone with --process_count=1."
  )
  # JAX itself would abort without a message for the user.
  timer = threading.Timer(seconds, _exit, [f"error: {failure}no answer for {seconds} s. {remedy}"])
  timer.daemon = True
  timer.start()
  # At the end, process 0 may compute scores of trivial predictors while the others wait for it.
  timeouts = {"initialization_timeout": seconds + 60, "shutdown_timeout_seconds": 24 * 3600}
  try:
    _jax().distributed.initialize(**options, **timeouts)
  except (RuntimeError, ValueError, OSError) as error:
    raise UserError(f"{failure}{one_line(error)[:300]}. {remedy}") from error
  finally:
    timer.cancel()
  # A collective with a dead process may wait forever, or until JAX aborts without stating the cause.
  threading.Thread(target=_watch_others, daemon=True, name="watch").start()
  _start_exit_watcher()


def _exit(line: str) -> None:
  """Ends the process immediately: a regular exit waits for the others, which wait in their next collective."""
  _stop_exit_watcher()
  print(line, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(2)
