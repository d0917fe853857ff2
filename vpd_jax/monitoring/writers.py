"""Metric writers: event files for TensorBoard, metrics.jsonl, the progress line, tables.

Event files in local folders are written by tensorboardX, those in buckets by clu.metric_writers, which has the same
methods. clu.metric_writers imports TensorFlow, an optional dependency, which takes eight seconds of a core;
`config.writer` selects it for folders too. `create` imports only the one it needs. For the same reason `Progress` and
monitoring.profiler are not clu.periodic_actions, whose module imports clu.metric_writers.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np
from absl import logging
from etils import epath

from vpd_jax.errors import UserError, check_choice
from vpd_jax.files import atomic
from vpd_jax.monitoring import progress
from vpd_jax.types import Fields, ParamDict

BACKENDS = ("auto", "clu", "tensorboardX")


class Backend(Protocol):
  """The methods of clu.metric_writers.MetricWriter that are used here."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...
  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...
  def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...
  def write_hparams(self, hparams: Mapping[str, object]) -> None: ...
  def flush(self) -> None: ...
  def close(self) -> None: ...


def create(workdir: str | epath.PathLike, *, just_logging: bool = False, backend: str = "auto") -> "Writer":
  """Creates a writer for a workdir; use it in a `with`, or close it.

  Args:
    workdir: a local folder or a bucket. metrics.jsonl, with one object per call of `write_scalars`, is written to local
      folders only.
    just_logging: only log scalars, as in every process but the first.
    backend: 'clu', 'tensorboardX', or 'auto': clu for a bucket if TensorFlow is installed, else tensorboardX.

  Raises:
    ValueError: an unknown backend, or clu without TensorFlow.
  """
  check_choice("config.writer", backend, BACKENDS)
  if just_logging:
    return Writer(_Log())
  has_tensorflow = importlib.util.find_spec("tensorflow") is not None
  if backend == "clu" and not has_tensorflow:
    raise UserError("config.writer='clu' needs TensorFlow: pip install 'vpd_jax[clu]', or use 'tensorboardX'.")
  folder = epath.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  bucket = "://" in str(workdir)
  _remove_partial_line(folder / "metrics.jsonl")
  use_clu = backend == "clu" or (backend == "auto" and bucket and has_tensorflow)
  chosen = _clu(folder) if use_clu else _TensorboardX(folder)
  return Writer(chosen, None if bucket else folder / "metrics.jsonl")


class Writer:
  """Scalars, images, texts and hyperparameters of a run, by name and step.

  Args:
    backend: writes the event file.
    lines: file to which scalars are appended as JSON, or None.
  """

  def __init__(self, backend: Backend, lines: epath.Path | None = None):
    self._backend = backend
    self._lines = lines

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # an error in the block is the first one
      self.close()

  def write_scalars(self, step: int, scalars: Mapping[str, object]) -> None:
    """Writes numbers, or arrays with one element."""
    values = {name: float(np.asarray(value).item()) for name, value in scalars.items()}
    self._backend.write_scalars(int(step), values)
    if self._lines is not None:
      try:
        with self._lines.open("a") as lines:
          lines.write(atomic.to_json({"step": int(step), "time": round(time.time(), 3)} | values) + "\n")
      except OSError as error:
        raise _unwritable(self._lines, error) from error

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 [N, H, W, 3] under each name; skips N = 0, which some backends do not accept."""
    if shown := {name: np.asarray(image) for name, image in images.items() if len(image)}:
      self._backend.write_images(int(step), shown)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes Markdown under each name."""
    self._backend.write_texts(int(step), texts)

  def write_hparams(self, hparams: Mapping[str, object]) -> None:
    """Writes a config of nested plain values, once per run: dotted names, and strings for all but numbers."""
    self._backend.write_hparams(dict(_flat(hparams)))

  def flush(self) -> None:
    """Waits until everything written so far is on disk."""
    self._backend.flush()

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    self._backend.close()


class Progress:
  """Measures the speed of a run, and formats its progress line.

  Call `report` after the host has waited for the devices, e.g. by reading a loss; earlier, only the time of dispatch
  would be measured. Time in `pause()` is not counted: evaluation, saving and compilation.

  Args:
    num_steps: the last step.
    images_per_step: the global batch.
    start: finished steps at the beginning.
    devices: number of devices, for the speed per chip.
    clock: seconds.
  """

  def __init__(
    self,
    num_steps: int,
    images_per_step: int,
    *,
    start: int = 0,
    devices: int = 1,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._num_steps, self._images, self._devices, self._clock = num_steps, images_per_step, devices, clock
    self._step, self._since = start, clock()
    self._times: list[float] = []  # seconds per step of each interval; the first one includes the warm-up

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Excludes the time inside the `with` from the speed."""
    begin = self._clock()
    try:
      yield
    finally:
      self._since += self._clock() - begin

  def report(self, step: int, loss: float) -> tuple[str, dict[str, float]]:
    """The progress line and the scalars at `step`, whose loss has just been read.

    Milliseconds per step are the median of the last 20 intervals between reports, without the first interval of the
    run if there is another one.

    Returns:
      'step 100/2000 (5%)  loss 0.4123  12.3 img/s  243 ms/step  ETA 7m42s', and {'perf/step_ms',
      'perf/img_per_sec', 'perf/img_per_sec_per_chip'}.
    """
    now = self._clock()
    if step > self._step:
      self._times.append(max(now - self._since, 1e-9) / (step - self._step))
    self._step, self._since = step, now
    if not self._times:
      return f"step {step}/{self._num_steps}  loss {loss:.4g}", {}
    seconds = statistics.median(self._times[1:][-20:] or self._times)
    speed = self._images / seconds
    line = (
      f"step {step}/{self._num_steps} ({100 * step / max(self._num_steps, 1):.0f}%)  loss {loss:.4g}  "
      f"{speed:.1f} img/s  {1e3 * seconds:.0f} ms/step  ETA {progress.duration((self._num_steps - step) * seconds)}"
    )
    scalars = {
      "perf/step_ms": 1e3 * seconds,
      "perf/img_per_sec": speed,
      "perf/img_per_sec_per_chip": speed / self._devices,
    }
    return line, scalars


def log(line: str) -> None:
  """Prints a line to the terminal, from the first process only."""
  if jax.process_index() == 0:
    progress.write(line)


def table(rows: Sequence[Sequence[object]]) -> str:
  """A text table with padded columns and right-aligned numbers; the first row is the header."""
  cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  right = [all(isinstance(cell, (int, float)) for cell in column) for column in zip(*rows[1:], strict=True)]
  lines = [
    "  ".join(
      cell.rjust(width) if to_right else cell.ljust(width)
      for cell, width, to_right in zip(row, widths, right or [False] * len(row), strict=True)
    ).rstrip()
    for row in cells
  ]
  return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def class_table(rows: Sequence[Mapping[str, object]]) -> str:
  """A text table of the scores of classes and a line break, with "-" for None; empty without rows."""
  text = lambda value: "-" if value is None else f"{value:.4f}" if isinstance(value, float) else value
  return table([tuple(rows[0]), *(tuple(map(text, row.values())) for row in rows)]) + "\n" if rows else ""


def parameter_overview(arrays: ParamDict) -> str:
  """Name, shape, dtype and size of every array of a ParamDict (or of its shapes), and their total, as a table."""
  from clu import parameter_overview as overview

  return overview.get_parameter_overview(dict(arrays), include_stats=False, max_lines=None)


def _flat(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
  """(dotted name, value) pairs; event files store numbers and strings only."""
  for key, value in section.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)


def _clu(folder: epath.Path) -> Backend:
  """clu's asynchronous writer, with TensorFlow's messages and its use of accelerators disabled."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it prints a message before the log level is set
  import tensorflow as tf
  from clu import metric_writers

  for kind in ("GPU", "TPU"):
    # Raised if the program has already initialized the devices of TensorFlow.
    with contextlib.suppress(RuntimeError):
      tf.config.set_visible_devices([], kind)
  return metric_writers.create_default_writer(folder, asynchronous=True)


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
  """Makes a package appear not installed inside the `with`, unless it has been imported before."""
  if package in sys.modules:
    yield
    return
  modules: Fields = sys.modules
  modules[package] = None
  try:
    yield
  finally:
    del sys.modules[package]


class _TensorboardX:
  """clu's methods on top of tensorboardX, which writes in a separate thread."""

  def __init__(self, folder: epath.Path):
    # tensorboardX would import PyTorch for graphs, which are not written here; this takes three seconds.
    with _hidden("torch"):
      import tensorboardX

    self._folder, self._failed = folder, False
    self._writer = tensorboardX.SummaryWriter(str(folder))
    self._event_writer = cast(Any, self._writer.file_writer).event_writer

  def _wait_for_room(self) -> None:
    """Returns when the thread can take an event; raises if it has ended, for which tensorboardX would wait forever."""
    events = self._event_writer
    while not events._closed and events._worker.is_alive() and events._event_queue.full():
      time.sleep(0.01)
    if not events._closed and not events._worker.is_alive():
      self._failed = events._closed = True  # so that nothing waits for the thread at the end either
      events._event_queue.cancel_join_thread()
    if self._failed:
      raise _unwritable(self._folder, "the event file has failed")

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    for name, value in scalars.items():
      self._wait_for_room()
      self._writer.add_scalar(name, value, step)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    for name, image in images.items():
      self._wait_for_room()
      n, height, width, channels = image.shape if image.ndim == 4 else (1, *image.shape)
      below = image.reshape(n * height, width, channels)  # [N * H, W, C]
      self._writer.add_image(name, below, step, dataformats="HWC")

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      self._writer.add_text(name, text, step)

  def write_hparams(self, hparams: Mapping[str, object]) -> None:
    from tensorboardX import summary

    # add_hparams would create a separate run.
    for part in summary.hparams(dict(hparams), {}):
      cast(Any, self._writer.file_writer).add_summary(part)

  def flush(self) -> None:
    self._wait_for_room()
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _remove_partial_line(path: epath.Path) -> None:
  """Removes the last line of a file if it was cut off, such as by a full disk; adds a missing newline."""
  content = path.read_bytes() if path.exists() else b""
  end = content.rfind(b"\n") + 1
  if end < len(content):
    try:
      json.loads(content[end:])
      content += b"\n"
    except ValueError:
      content = content[:end]
    atomic.write(path, content)


def _unwritable(path: epath.Path, error: object) -> OSError:
  return OSError(f"{path} cannot be written ({error}); check the disk space, then give the same command again.")


class _Log:
  """Logs scalars, and ignores everything else."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    logging.info("[%d] %s", step, ", ".join(f"{name}={value:.6g}" for name, value in sorted(scalars.items())))

  def _ignore(self, *_: object, **__: object) -> None:
    pass

  write_images = write_texts = write_hparams = close = _ignore

  def flush(self) -> None:
    logging.flush()
