"""Preemption handling: SIGTERM ends a run after a step, which is the same one in all of its processes."""

import itertools
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

_calls = itertools.count(1)  # of PreemptionGuard.should_stop in this process


class PreemptionGuard:
  """Notices SIGTERM: `with PreemptionGuard() as guard: ... if guard.should_stop(): save and leave`.

  All processes of a run have to leave after the same step, whichever of them received the signal; the others would
  wait in their next collective forever. With several processes the signal goes to JAX's preemption service, which
  `jax.distributed.initialize` starts. It notifies the other processes in the background and chooses the first call of
  `should_stop` that no process has made yet. A call only reads memory; an all-gather of a flag would synchronize host
  and devices in every step.

  With one process the previous handler is restored at the end. Python handles signals in its main thread only: in any
  other thread `requested` stays False, and the caller's own handler stays in place.

  Attributes:
    requested: whether a signal has been noticed.
  """

  def __init__(self) -> None:
    self.requested = False
    self._old: Any = None

  def __enter__(self) -> "PreemptionGuard":
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)

  def should_stop(self) -> bool:
    """Whether to stop at this point; stays True. All processes make the same calls in the same order."""
    if jax.process_count() > 1 and not self.requested:
      self.requested = multihost_utils.reached_preemption_sync_point(next(_calls))
    return self.requested

  def _handle(self, number: int, frame: object) -> None:
    self.requested = True
