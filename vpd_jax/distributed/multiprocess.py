"""A run of several processes: finding each other, and ending together."""

import contextlib
import glob
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
from typing import Any

from vpd_jax.errors import UserError

_FAILURE, _LISTEN = "vpd_jax/failure", 1.0  # where a process leaves its last words, and seconds between two looks
_ALIVE, _DONE = "vpd_jax/alive", "done"  # where processes give signs of life, and the last of them
_BEAT, _LOST = 5.0, 60.0  # seconds between two signs, and without one
_REMEDY = "The same command goes on from the last checkpoint."
_ended = threading.Event()  # the work of this process
_witness: subprocess.Popen | None = None  # says that this process was ended by others


@contextlib.contextmanager
def report_errors(debug: bool = False) -> Iterator[None]:
  """Ends the process at an error: with one line where it is the user's, and together with the others of the run.

  `debug` shows the traceback of any error.
  """
  try:
    yield
  except Exception as error:
    alone = "jax" not in sys.modules or not _jax().distributed.is_initialized()
    known = isinstance(error, (UserError, OSError)) and not debug
    if alone and not known:
      raise
    text = " ".join(str(error).split())
    line = f"error: {text}" if known else traceback.format_exc()
    if not alone and isinstance(error, _jax().errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text:
      time.sleep(_LOST + 2 * _BEAT)  # where another process is lost, this one learns which, and ends here
      line += f"error: another process may be lost: {text[:200]}. {_REMEDY}"
    if not alone:
      _abort_all(line)
    print(line, file=sys.stderr)
    sys.exit(2)
  finally:
    _finish()


def _abort_all(line: str) -> None:
  """Ends this process with a line, and the others by telling them."""
  index = _jax().process_index()
  try:
    line = _client().key_value_try_get(_FAILURE)  # another one was first: its reason is that of this error too
  except RuntimeError:
    with contextlib.suppress(RuntimeError):
      _client().key_value_set(_FAILURE, f"process {index} has ended. {line}")
      time.sleep(3 * _LISTEN if index == 0 else 0)  # the words of all pass through process 0
  _leave(f"process {index}: {line}")


def _listen() -> None:
  """Body of a thread: ends this process when another one has told that it failed, or tells nothing any more.

  Every process gives a sign of life, of which process 0 looks for new ones. jax would notice too, after longer, and
  abort.
  """
  index, beats, next_beat = _jax().process_index(), 0, 0.0
  seen: dict[str, tuple[str, float]] = {}  # key of a process to its last sign and when that was new
  while not _ended.wait(_LISTEN):
    now = time.monotonic()
    try:
      if now >= next_beat:
        next_beat, beats = now + _BEAT, beats + 1
        _client().key_value_set(f"{_ALIVE}/{index}", str(beats), allow_overwrite=True)
        signs = _client().key_value_dir_get(_ALIVE) if index == 0 else []
        seen |= {key: (sign, now) for key, sign in signs if seen.get(key, ("",))[0] != sign}
      late = [key for key, (sign, when) in seen.items() if sign != _DONE and now - when > _LOST]
      if late:
        lost = ", ".join(sorted(key.split("/")[-1] for key in late))
        _abort_all(f"error: process {lost} is lost: no sign of life for {_LOST:.0f} s. {_REMEDY}")
      line = _client().key_value_try_get(_FAILURE)
    except RuntimeError:  # nothing is told
      continue
    _leave(f"process {index}: {line}")


def _finish() -> None:
  """The work of this process is done; the others may still have some."""
  _ended.set()
  if "jax" in sys.modules and _jax().distributed.is_initialized():
    with contextlib.suppress(RuntimeError):
      _client().key_value_set(f"{_ALIVE}/{_jax().process_index()}", _DONE, allow_overwrite=True)
  _dismiss_witness()


def _start_exit_watcher() -> None:
  """Starts a shell that speaks when this process ends without a word: jax aborts where process 0 is gone."""
  global _witness
  index = _jax().process_index()
  line = (
    f"process {index}: ended from outside"
    + ("" if index == 0 else ", or, where jax says so above, because process 0 is lost, through which all speak")
    + f". {_REMEDY}"
  )
  _witness = subprocess.Popen(
    ["sh", "-c", 'trap "" INT TERM; read -r word || echo "$0" >&2', line], stdin=subprocess.PIPE, start_new_session=True
  )


def _dismiss_witness() -> None:
  if _witness is not None and _witness.poll() is None:
    _witness.communicate(b"\n")


def _client() -> Any:
  """The connection to the other processes, for words rather than arrays. jax shows it in no public module."""
  from jax._src import distributed

  return distributed.global_state.client


def _jax() -> Any:
  """jax, imported no earlier than needed, so that a wrong flag answers at once."""
  import jax

  return jax


def arguments(
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
        raise UserError(f"{name}={text!r} is no number; give a whole number from 0.")
      given[key] = text if key == "coordinator_address" else int(text)
  if given["num_processes"] == 1:
    return None
  cluster = _cluster(environment)
  missing = [key for key, value in given.items() if value is None]
  if len(missing) == len(given) and not cluster:
    return None
  if missing and not cluster:
    raise UserError(
      f"several processes were asked for without {missing}; give each of them --coordinator_address=HOST:PORT of "
      "process 0, --process_count=N and its own --process_id=0 to N-1, or none of the three."
    )
  if not missing and given["process_id"] >= given["num_processes"]:
    raise UserError(
      f"--process_id={given['process_id']} of --process_count={given['num_processes']} processes does not exist; "
      "ids begin with 0."
    )
  if given["coordinator_address"] and not re.fullmatch(r".+:\d+", given["coordinator_address"]):
    raise UserError(f"--coordinator_address={given['coordinator_address']!r} has no port; write HOST:PORT.")
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


def connect(address: str | None, count: int | None, index: int | None, seconds: int) -> None:
  """Makes this process one of several where it is; before anything touches a device.

  Args:
    address, count, index: see `arguments`.
    seconds: to wait for the others.

  Raises:
    ValueError: something is missing or wrong, or the others were not found.
  """
  given = arguments(address, count, index, os.environ)
  if given is None:
    return
  told = ", ".join(f"{key} {value}" for key, value in given.items() if key != "cluster_detection_method")
  failure = f"this process did not find the other ones of its run ({told or 'as SLURM or the TPU says'}): "
  remedy = (
    "Start all of them within --coordinator_timeout, let the port of process 0 be free and reachable, or run alone "
    "with --process_count=1."
  )
  # jax itself would abort without a word for the user.
  timer = threading.Timer(seconds, _leave, [f"error: {failure}nothing for {seconds} s. {remedy}"])
  timer.daemon = True
  timer.start()
  try:
    _jax().distributed.initialize(**given, initialization_timeout=seconds + 60)
  except (RuntimeError, ValueError, OSError) as error:
    raise UserError(f"{failure}{' '.join(str(error).split())[:300]}. {remedy}") from error
  finally:
    timer.cancel()
  # A collective with a process that is gone may wait for ever, or until jax aborts without the reason.
  threading.Thread(target=_listen, daemon=True, name="listen").start()
  _start_exit_watcher()


def _leave(line: str) -> None:
  """Ends the process at once: an orderly end waits for the others, which wait for it in their next collective."""
  _dismiss_witness()
  print(line, file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(2)
