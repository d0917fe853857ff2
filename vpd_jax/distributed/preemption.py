"""Preemption handling: SIGTERM or Ctrl-C ends a run after a step, which is the same one in all of its processes."""

import itertools
import os
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

_calls = itertools.count(1)  # of PreemptionGuard.should_stop in this process


class PreemptionGuard:
  """Notices SIGTERM and Ctrl-C: `with PreemptionGuard() as guard: ... if guard.should_stop(): save and leave`.

  All processes of a run have to leave after the same step, whichever of them received the signal; the others would wait
  in their next collective forever. With several processes SIGTERM, and Ctrl-C as SIGTERM, goes to JAX's preemption
  service, which `jax.distributed.initialize` starts. It notifies the other processes in the background and chooses the
  first call of `should_stop` that no process has made yet. A call only reads memory; an all-gather of a flag would
  synchronize host and devices in every step.

  A second Ctrl-C raises KeyboardInterrupt, and the previous handlers are restored at the end. Python handles signals in
  its main thread only: in any other thread `requested` stays False, and the caller's own handlers stay in place.

  Attributes:
    requested: whether a signal has been noticed.
    cause: which one, for messages.
  """

  def __init__(self) -> None:
    self.requested, self.cause = False, "SIGTERM"
    self._handled = False
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "PreemptionGuard":
    if threading.current_thread() is threading.main_thread():
      # With several processes, SIGTERM is JAX's.
      numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
      self._old = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def should_stop(self) -> bool:
    """Whether to stop at this point; stays True. All processes make the same calls in the same order."""
    if jax.process_count() > 1 and not self.requested:
      self.requested = multihost_utils.reached_preemption_sync_point(next(_calls))
    return self.requested

  def _handle(self, number: int, frame: object) -> None:
    if number == signal.SIGINT:
      if self._handled:
        raise KeyboardInterrupt
      self.cause = "Ctrl-C"
      print("Ctrl-C: finishing and saving this step; press again to stop immediately", file=sys.stderr, flush=True)
    self._handled = True
    if jax.process_count() == 1:
      self.requested = True
    else:
      os.kill(os.getpid(), signal.SIGTERM)
