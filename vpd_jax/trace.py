"""A profiler trace of some steps of a run, for TensorBoard."""

from collections.abc import Callable

import jax

TRACE_FROM = 10  # steps after the start of the process: compiled and warm


class Trace:
  """A profiler trace of `steps` steps from the tenth step of this process on; none for 0."""

  def __init__(self, steps: int, workdir: str, log: Callable[[str], None]):
    self._steps, self._workdir, self._log, self._running = steps, workdir, log, False

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *_: object) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._log(f"a trace is in {self._workdir}/plugins/profile")
      self._running = False

  def before(self, step: int) -> None:
    """Starts or ends the trace before the given step of this process, counted from 1."""
    if self._steps and step == TRACE_FROM:
      jax.profiler.start_trace(self._workdir)
      self._running = True
    elif step == TRACE_FROM + self._steps:
      self.__exit__()
