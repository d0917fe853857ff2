"""Data workers that die: signal, memory left and remedies in one line; other errors as they are."""

import errno
import os
import re
import signal

import pytest

from tests.helpers.squares import Squares
from vpd_jax.data import pipeline, worker_failures

SIGNALS = {-7: "SIGBUS): shared memory ran out", -9: "SIGKILL): usually the kernel", -6: "SIGABRT)."}


def run_out_of_shared_memory(example):
  os.kill(os.getpid(), signal.SIGBUS)


def be_interrupted(example):
  """Receives Ctrl-C, as every process of a terminal does."""
  os.kill(os.getpid(), signal.SIGINT)
  return example


def raising(error):
  raise error
  yield


def message(error):
  with pytest.raises(ValueError) as caught:
    worker_failures.next_batch(raising(error))
  assert "\n" not in str(caught.value)
  for remedy in (r"/dev/shm has \d+ of \d+ MiB left", "--shm-size=", "fewer config.data.workers", "data.workers=0"):
    assert re.search(remedy, str(caught.value))
  return str(caught.value)


def test_a_worker_that_dies_in_a_run_is_told_with_its_signal():
  batches = pipeline.train_batches(
    Squares(), batch_size=2, seed=0, keys=("index",), workers=1, prepare=run_out_of_shared_memory
  )
  with pytest.raises(
    ValueError, match=r"^a data worker was ended by signal 7 \(SIGBUS\): shared memory ran out\. /dev"
  ):
    next(batches)
  batches.close()


def test_ctrl_c_leaves_the_workers_to_the_main_process_which_still_saves():
  batches = pipeline.train_batches(Squares(), batch_size=2, seed=0, keys=("index",), workers=1, prepare=be_interrupted)
  assert [len(next(batches)["index"]) for _ in range(2)] == [2, 2]
  batches.close()


@pytest.mark.parametrize("code", SIGNALS)
def test_signals_have_names(code):
  error = RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search the logs above for")
  assert message(error).startswith(f"a data worker was ended by signal {-code} ({SIGNALS[code]}")


def test_exit_codes_and_full_shared_memory_are_told():
  error = RuntimeError("Worker process was terminated unexpectedly with exit code 1. Search the logs above for")
  assert message(error).startswith("a data worker ended with exit code 1; see its output above.")
  for number in (errno.ENOSPC, errno.ENOMEM):
    assert message(OSError(number, "No room")).startswith("a data worker could not fit a batch into shared memory")


FULL_DISK = OSError(errno.ENOSPC, "No space left on device", "/data/cache/x")  # no shared memory, which has no name


@pytest.mark.parametrize(
  "error", [RuntimeError("x"), OSError(errno.EACCES, "x"), FULL_DISK, ValueError("x"), KeyError("x")]
)
def test_other_errors_stay_what_they_are(error):
  with pytest.raises(type(error)) as caught:
    worker_failures.next_batch(raising(error))
  assert caught.value is error
  assert worker_failures.next_batch(iter([1])) == 1
  with pytest.raises(StopIteration):
    worker_failures.next_batch(iter([]))
