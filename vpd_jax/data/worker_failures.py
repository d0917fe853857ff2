"""Error messages for failed data workers: the signal, the remaining memory and a remedy."""

import errno
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from vpd_jax.errors import UserError

T = TypeVar("T")
_EXIT = re.compile(r"[Ww]orker process was terminated unexpectedly with exit code (-?\d+)")  # grain 0.2.18
_SHARED = "/dev/shm"
_MEANS = {
  signal.SIGBUS: "shared memory ran out",
  signal.SIGKILL: "usually the kernel's out-of-memory killer",
  signal.SIGSEGV: "a library crashed, often because memory ran out",
}
REMEDY = (
  f"Give more memory to {_SHARED} (docker run --shm-size=16g, or --ipc=host), or take fewer config.data.workers or a "
  "smaller config.data.batch_size, or none with config.data.workers=0"
)


def next_batch(batches: Iterator[T]) -> T:
  """The next batch of grain's workers.

  Raises:
    ValueError: if a worker died or shared memory is full; one line.
  """
  try:
    return next(batches)
  except (RuntimeError, OSError) as error:
    reason = _reason(error)
    if reason is None:
      raise
    raise UserError(f"{reason}. {_remaining_memory()}. {REMEDY}.") from error


def _reason(error: Exception) -> str | None:
  """The cause of a worker's failure; None for other errors."""
  if isinstance(error, OSError):
    # An error with a file name is from the data set or a transform: shared memory has none.
    full = error.errno in (errno.ENOSPC, errno.ENOMEM) and error.filename is None
    return f"a data worker could not fit a batch into shared memory ({error.strerror})" if full else None
  match = _EXIT.search(str(error))
  if match is None:
    return None
  code = int(match[1])
  if code >= 0:
    return f"a data worker ended with exit code {code}; see its output above"
  try:
    number = signal.Signals(-code)
  except ValueError:
    return f"a data worker was ended by signal {-code}"
  means = f": {_MEANS[number]}" if number in _MEANS else ""
  return f"a data worker was ended by signal {-code} ({number.name}){means}"


def _remaining_memory() -> str:
  """The remaining shared memory and main memory, as far as the system reports them."""
  parts = []
  try:
    shared = shutil.disk_usage(_SHARED)
    parts.append(f"{_SHARED} has {shared.free / 2**20:.0f} of {shared.total / 2**20:.0f} MiB left")
  except OSError:
    parts.append(f"there is no {_SHARED}")
  try:
    available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    parts += [f"the machine {int(available[1]) / 2**10:.0f} MiB of memory"] if available else []
  except OSError:
    pass
  return ", ".join(parts)
