"""A profiler trace of some steps, for TensorBoard, and the operations in it that took longest."""

import collections
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from etils import epath

from vpd_jax.errors import UserError

TRACE_FROM = 10  # steps after the start of the process: compiled and warm
LONGEST = 10  # operations that are told
_WRITTEN = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\w+\[[\d,]*\])?.*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


class Operation(NamedTuple):
  """What one operation of a program took.

  Attributes:
    name: XLA's, or a kernel's that belongs to none.
    milliseconds: a step and device.
    share: of the time of all operations; where one runs inside another (a loop's body), both count.
    result: dtype and shape, where the program says so and it is one array.
    origin: what it was made of, likewise: JAX's name, "backward" before it where it belongs to a gradient.
  """

  name: str
  milliseconds: float
  share: float
  result: str
  origin: str


class Profiler:
  """A profiler trace of `steps` steps from the tenth step of this process on; none for 0.

  At its end it says where it is, and which operations took longest.
  """

  def __init__(self, steps: int, workdir: str, log: Callable[[str], None], text: Callable[[], str] = lambda: ""):
    """
    Args:
      steps: how many.
      workdir: a local folder or a bucket; the trace lies below plugins/profile.
      log: takes a line.
      text: of the compiled step; called at the end.
    """
    self._steps, self._workdir, self._log, self._text, self._begun = steps, workdir, log, text, 0

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_: object) -> None:
    if self._begun:
      jax.profiler.stop_trace()
      self._begun = 0
      self._log(f"a trace of fewer than {self._steps} steps is in {self._workdir}/plugins/profile")

  def before(self, step: int, last: Any = None) -> None:
    """Starts or ends the trace before the given step of this process, counted from 1.

    `last` is a result of the step before, which is waited for, so that the trace holds whole steps.
    """
    if self._steps and step == TRACE_FROM:
      jax.block_until_ready(last)
      jax.profiler.start_trace(self._workdir)
      self._begun = step
    elif self._begun and step == self._begun + self._steps:
      jax.block_until_ready(last)
      jax.profiler.stop_trace()
      self._begun = 0
      self._log(f"a trace of {self._steps} steps is in {self._workdir}/plugins/profile")
      self._log(table(longest(self._workdir, self._steps, self._text())))


def longest(folder: str, steps: int, text: str = "", count: int = LONGEST) -> list[Operation]:
  """The operations of the newest trace that took longest, the first first.

  Args:
    folder: given to jax.profiler.start_trace.
    steps: of the program that it holds.
    text: of the program, `xla_cost.text`: says what the operations are.
    count: how many are wanted.

  Raises:
    ValueError: there is no trace.
  """
  found = sorted(epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.parent.name)
  if not found:
    raise UserError(f"there is no trace below {Path(folder) / 'plugins' / 'profile'}.")
  data = jax.profiler.ProfileData.from_serialized_xspace(found[-1].read_bytes())
  places, times = set(), cast(Any, collections.Counter())  # the typed one counts whole numbers only
  with warnings.catch_warnings():
    # Since Python 3.13 jaxlib's types bring one; where warnings are errors it ends the process, raised inside C++.
    warnings.simplefilter("ignore", DeprecationWarning)
    for place, name, nanoseconds in _on_devices(data):
      places.add(place)
      times[name] += nanoseconds
  total = sum(times.values())
  made = {name: (result, _origin(origin)) for name, result, origin in _WRITTEN.findall(text)}
  return [
    Operation(name, ns / 1e6 / steps / len(places), ns / total, *made.get(name, ("", "")))
    for name, ns in times.most_common(count)
  ]


def table(operations: list[Operation]) -> str:
  """For the terminal."""
  if not operations:
    return "the trace holds no operation"
  lines = [
    f"{100 * o.share:6.1f} % {o.milliseconds:10.2f} ms a step  {' '.join(filter(None, (o.name, o.result, o.origin)))}"
    for o in operations
  ]
  return "\n".join([f"the {len(lines)} operations that took longest, of the time of all:", *lines])


def _on_devices(data: Any) -> Iterator[tuple[str, str, float]]:
  """(device, name, nanoseconds) of every operation that ran: of accelerators where there are any, else of the CPU."""
  found = False
  for plane in data.planes:
    if not plane.name.startswith("/device:"):
      continue
    lines = {line.name: line for line in plane.lines}
    whole = ["XLA Ops"] if "XLA Ops" in lines else [name for name in lines if name.startswith("Stream")]
    for event in (event for name in whole for event in lines[name].events):
      found = True
      name = str(dict(event.stats).get("hlo_op") or event.name)
      yield plane.name, name.partition(" = ")[0].lstrip("%"), event.duration_ns
  if found:
    return
  for event in (event for plane in data.planes for line in plane.lines for event in line.events):
    stats = dict(event.stats)
    if stats.get("hlo_op") == event.name:
      yield str(stats.get("device_ordinal", 0)), event.name, event.duration_ns


def _origin(name: str) -> str:
  """JAX's name of an operation, without the functions around it."""
  return ("backward " if "transpose(" in name else "") + name.rpartition("/")[2]
