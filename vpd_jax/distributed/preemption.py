"""The wish to stop: SIGTERM, answered at the end of a step, by all processes at the same one."""

import itertools
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

_calls = itertools.count(1)  # of PreemptionGuard.now in this process


class PreemptionGuard:
  """Notices SIGTERM: `with PreemptionGuard() as stop: ... if stop.now(): save and leave`.

  Of several processes all must leave at the same point, whichever of them the signal reached, or the rest would wait
  in its next collective for ever. There jax's preemption service, which `jax.distributed.initialize` starts, takes the
  signal, spreads the news in the background, and chooses the first call of `now` that no process has made yet. A call
  costs a look into memory; an all-gather of the flag would make host and devices wait for each other in every step.

  Alone, the old handler comes back at the end. Python handles signals in its main thread only; in another one
  `requested`, which `now` returns, stays False, and the caller's own handler, if any, in force.
  """

  def __init__(self) -> None:
    self.requested = False
    self._old: Any = None

  def __enter__(self) -> "PreemptionGuard":
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)

  def now(self) -> bool:
    """Whether to leave here; True ever after. All processes make the same calls in the same order."""
    if jax.process_count() > 1 and not self.requested:
      self.requested = multihost_utils.reached_preemption_sync_point(next(_calls))
    return self.requested

  def _handle(self, number: int, frame: object) -> None:
    self.requested = True
