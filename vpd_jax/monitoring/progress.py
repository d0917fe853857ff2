"""Progress of a command: one line for each phase with its duration, and the progress of long phases.

Phases are silent until a command calls `show`, so that the library prints nothing by default. Lines go to stdout, like
the log of a run. If stderr is a terminal, tqdm redraws a line there during a phase; otherwise a line is printed every
10 seconds. This module does not import jax, since the first line of a command must not wait for it.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

INTERVAL = 10.0  # seconds between two lines of a phase, if stderr is not a terminal
_REDRAW = 1.0  # seconds, if it is
_LONG = 1.0  # seconds from which on the first part of a phase is reported separately
_shown = threading.Event()
_written = [0.0]  # time of the last line


def show() -> None:
  """Enables printing of phases; called by commands, in the first process of a run only."""
  _shown.set()


def hide() -> None:
  """Silences phases again."""
  _shown.clear()


def begin(command: str) -> None:
  """Enables progress, and prints the first line of a command: its name and arguments."""
  if not {"-h", "--help"} & set(sys.argv[1:]):
    show()
    say(" ".join([command, *sys.argv[1:]]))


def say(line: str) -> None:
  """Prints a line if progress is shown."""
  if _shown.is_set():
    write(line)


def write(line: str) -> None:
  """Prints a line to stdout, above the line that tqdm redraws."""
  _written[0] = time.monotonic()
  if sys.stderr.isatty() and "tqdm" in sys.modules:
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
      print(line, flush=True)
  else:
    print(line, flush=True)


class Phase:
  """A running phase.

  Args:
    name: of the phase.
    total: number of units; 0: only time is measured.
    unit: name of the units, in the plural.
    reached: returns the number of finished units, if `advance` does not know it, e.g. for asynchronous steps.
    clock: seconds.
  """

  def __init__(
    self,
    name: str,
    total: int = 0,
    unit: str = "",
    reached: Callable[[], int] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.name, self.total, self.unit, self._count, self._reached = name, total, unit, 0, reached
    self._clock, self._begin = clock, clock()
    self._first: tuple[float, int] | None = None  # seconds and units of the first part, which includes compilation

  def advance(self, count: int = 1) -> None:
    """Counts finished units."""
    self._count += count
    if self._first is None:
      self._first = self._clock() - self._begin, self.done

  @property
  def done(self) -> int:
    """Finished units."""
    return self._count if self._reached is None else self._reached()

  @property
  def seconds(self) -> float:
    """Elapsed seconds."""
    return self._clock() - self._begin

  @property
  def remaining(self) -> float | None:
    """Estimated remaining seconds, at the speed since the first part; None before the second part."""
    if not (self._first and self.done > self._first[1]):
      return None
    return (self.total - self.done) * (self.seconds - self._first[0]) / (self.done - self._first[1])

  def under_way(self) -> str:
    """'evaluate: 24 of 654 images, 30s, ETA 5m10s'."""
    count = f"{self.done} of {self.total} {self.unit}, " if self.total else ""
    eta = "" if self.remaining is None else f", ETA {duration(self.remaining)}"
    return f"{self.name}: {count}{duration(self.seconds)}{eta}"

  def finished(self) -> str:
    """'compile: 33.7 s', 'evaluate: 654 images in 312.0 s, the first 8 in 20.1 s'."""
    if not self.total:
      return f"{self.name}: {self.seconds:.1f} s"
    first = ""
    if self._first and self._first[1] < self.done and self._first[0] >= _LONG:
      first = f", the first{f' {self._first[1]}' if self._first[1] > 1 else ''} in {self._first[0]:.1f} s"
    return f"{self.name}: {self.done} {self.unit} in {self.seconds:.1f} s{first}"


@contextlib.contextmanager
def phase(name: str, total: int = 0, unit: str = "", reached: Callable[[], int] | None = None) -> Iterator[Phase]:
  """Prints a line at the end of the `with`, and the progress during long phases.

      with progress.phase("evaluate", total=654, unit="images") as evaluated:
        evaluated.advance(8)

  Args:
    name, total, unit, reached: see Phase.
  """
  running = Phase(name, total, unit, reached)
  if not _shown.is_set():
    yield running
    return
  with _reported(running):
    yield running
  write(running.finished())


@contextlib.contextmanager
def _reported(running: Phase) -> Iterator[None]:
  """Reports a phase from a separate thread, since compilation blocks the main thread."""
  ended = threading.Event()
  report = _redraw if sys.stderr.isatty() else _print
  thread = threading.Thread(target=report, args=(running, ended), daemon=True, name="progress")
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def _print(running: Phase, ended: threading.Event) -> None:
  while not ended.wait(INTERVAL):
    # Otherwise a log line, or a nested phase, already shows progress.
    if time.monotonic() - _written[0] >= INTERVAL / 2:
      write(running.under_way())


def _redraw(running: Phase, ended: threading.Event) -> None:
  from tqdm import tqdm

  with tqdm(bar_format="{desc}", file=sys.stderr, leave=False, disable=False) as line:
    while not ended.wait(_REDRAW):
      line.set_description_str(running.under_way())


def duration(seconds: float) -> str:
  """'42s', '7m42s', '3h07m', '2d03h'."""
  seconds = max(round(seconds), 0)
  for size, below, letters in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
    if seconds >= size:
      return f"{seconds // size}{letters[0]}{seconds % size // below:02d}{letters[1]}"
  return f"{seconds}s"
