"""Profiler traces for TensorBoard, and the slowest operations in them."""

import collections
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from etils import epath

from vpd_jax.errors import UserError

FIRST_STEP = 10  # of the process, after compilation and warm-up
SLOWEST = 10  # operations to report
_INSTRUCTION = re.compile(
  r'^\s*(?:ROOT )?%?([\w.\-]+) = (\w+\[[\d,]*\])?.*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE
)


class Operation(NamedTuple):
  """The time of one operation of a program.

  Attributes:
    name: of the XLA operation, or of a kernel outside of any.
    milliseconds: per step and device.
    share: fraction of the time of all operations; nested operations (a loop and its body) are both counted.
    result: dtype and shape, if the program states them and the result is one array.
    origin: JAX's name of the operation, after "backward" if it belongs to a gradient; empty if unknown.
  """

  name: str
  milliseconds: float
  share: float
  result: str
  origin: str


class Profiler:
  """Traces `steps` steps, from the tenth step of this process; 0 disables it. Only the first process traces.

  At the end it logs the location of the trace and the slowest operations, or that there were too few steps for a trace.
  """

  def __init__(self, steps: int, workdir: str, log: Callable[[str], None], text: Callable[[], str] = lambda: ""):
    """
    Args:
      steps: number of steps to trace.
      workdir: a local folder or a bucket; the trace lies below plugins/profile.
      log: prints a line.
      text: returns the text of the compiled step; called at the end.
    """
    self._steps = steps if jax.process_index() == 0 else 0
    self._workdir, self._log, self._text = workdir, log, text
    self._begin, self._traced = 0, False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_: object) -> None:
    if self._steps and not self._traced:
      self._log(f"config.profile={self._steps}: no trace, because fewer than {FIRST_STEP} steps were left")
    if self._begin:
      jax.profiler.stop_trace()
      self._begin = 0
      self._log(f"a trace of fewer than {self._steps} steps is in {self._workdir}/plugins/profile")

  def on_step_start(self, step: int, last: object = None) -> None:
    """Starts or stops the trace before the given step of this process, counted from 1.

    Waits for `last`, a result of the previous step, so that the trace contains whole steps.
    """
    if self._steps and step == FIRST_STEP:
      jax.block_until_ready(last)
      jax.profiler.start_trace(self._workdir)
      self._begin, self._traced = step, True
    elif self._begin and step == self._begin + self._steps:
      jax.block_until_ready(last)
      jax.profiler.stop_trace()
      self._begin = 0
      self._log(f"a trace of {self._steps} steps is in {self._workdir}/plugins/profile")
      self._log(table(slowest_ops(self._workdir, self._steps, self._text())))


def slowest_ops(folder: str, steps: int, text: str = "", count: int = SLOWEST) -> list[Operation]:
  """The slowest operations of the newest trace, in descending order.

  Args:
    folder: of jax.profiler.start_trace.
    steps: number of traced steps.
    text: of the program, `xla_cost.text`, which describes the operations.
    count: number of operations.

  Raises:
    ValueError: there is no trace.
  """
  traces = sorted(epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.parent.name)
  if not traces:
    raise UserError(f"there is no trace below {Path(folder) / 'plugins' / 'profile'}.")
  data = jax.profiler.ProfileData.from_serialized_xspace(traces[-1].read_bytes())
  devices, times = set(), cast(Any, collections.Counter())  # the type of Counter is limited to integers
  with warnings.catch_warnings():
    # Raised inside C++ since Python 3.13; where warnings are errors it would abort the process.
    warnings.simplefilter("ignore", DeprecationWarning)
    for device, name, nanoseconds in _device_events(data):
      devices.add(device)
      times[name] += nanoseconds
  total = sum(times.values())
  descriptions = {name: (result, _origin(origin)) for name, result, origin in _INSTRUCTION.findall(text)}
  return [
    Operation(name, ns / 1e6 / steps / len(devices), ns / total, *descriptions.get(name, ("", "")))
    for name, ns in times.most_common(count)
  ]


def table(operations: list[Operation]) -> str:
  """The operations as text."""
  if not operations:
    return "the trace contains no operation"
  lines = [
    f"{100 * o.share:6.1f} % {o.milliseconds:10.2f} ms a step  {' '.join(filter(None, (o.name, o.result, o.origin)))}"
    for o in operations
  ]
  return "\n".join([f"the {len(lines)} slowest operations, as a share of the time of all:", *lines])


def _device_events(data: Any) -> Iterator[tuple[str, str, float]]:
  """(device, name, nanoseconds) of every executed operation, on accelerators if there are any, else on the CPU."""
  has_device_events = False
  for plane in data.planes:
    if not plane.name.startswith("/device:"):
      continue
    lines = {line.name: line for line in plane.lines}
    chosen = ["XLA Ops"] if "XLA Ops" in lines else [name for name in lines if name.startswith("Stream")]
    for event in (event for name in chosen for event in lines[name].events):
      has_device_events = True
      name = str(dict(event.stats).get("hlo_op") or event.name)
      yield plane.name, name.partition(" = ")[0].lstrip("%"), event.duration_ns
  if has_device_events:
    return
  for event in (event for plane in data.planes for line in plane.lines for event in line.events):
    stats = dict(event.stats)
    if stats.get("hlo_op") == event.name:
      yield str(stats.get("device_ordinal", 0)), event.name, event.duration_ns


def _origin(name: str) -> str:
  """JAX's name of an operation, without its enclosing functions."""
  return ("backward " if "transpose(" in name else "") + name.rpartition("/")[2]
