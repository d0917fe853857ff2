"""What a run tells: event files for TensorBoard, metrics.jsonl, the line of progress, tables.

Event files in local folders are written by tensorboardX, those in buckets by clu.metric_writers with the same methods.
clu needs TensorFlow, whose import costs a start eight seconds of a core; `config.writer` chooses it for folders too.
Neither is imported before `create` needs it.
"""

import contextlib
import dataclasses
import importlib.util
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

from vpd_jax.errors import UserError
from vpd_jax.files import atomic

BACKENDS = ("auto", "clu", "tensorboardX")


class Backend(Protocol):
  """The methods of clu.metric_writers.MetricWriter in use."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...
  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...
  def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...
  def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...
  def flush(self) -> None: ...
  def close(self) -> None: ...


def create(workdir: str | epath.PathLike, *, just_logging: bool = False, backend: str = "auto") -> "Writer":
  """A writer into a workdir; use it in a `with`, or close it.

  Args:
    workdir: a local folder or a bucket. metrics.jsonl, one object per call of `write_scalars`, needs a local one.
    just_logging: scalars to the log only, as on every process but the first.
    backend: 'clu', 'tensorboardX', or 'auto': clu for a bucket where TensorFlow is installed, else tensorboardX.

  Raises:
    ValueError: for an unknown backend, or clu without tensorflow.
  """
  if backend not in BACKENDS:
    raise UserError(f"config.writer={backend!r} is unknown; choose one of {BACKENDS}.")
  if just_logging:
    return Writer(_Log())
  has_tensorflow = importlib.util.find_spec("tensorflow") is not None
  if backend == "clu" and not has_tensorflow:
    raise UserError("config.writer='clu' needs TensorFlow: pip install 'vpd_jax[clu]', or use 'tensorboardX'.")
  folder = epath.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  bucket = "://" in str(workdir)
  use_clu = backend == "clu" or (backend == "auto" and bucket and has_tensorflow)
  chosen = _clu(folder) if use_clu else _TensorboardX(folder)
  return Writer(chosen, None if bucket else folder / "metrics.jsonl")


class Writer:
  """Scalars, images, texts and hyperparameters of a run, by name and step.

  Args:
    backend: writes the event file.
    lines: file to which scalars are added as JSON, or None.
  """

  def __init__(self, backend: Backend, lines: epath.Path | None = None):
    self._backend = backend
    self._lines = lines

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Numbers, or arrays of one number."""
    values = {name: float(np.asarray(value).item()) for name, value in scalars.items()}
    self._backend.write_scalars(int(step), values)
    if self._lines is not None:
      with self._lines.open("a") as lines:
        lines.write(atomic.to_json({"step": int(step), "time": round(time.time(), 3)} | values) + "\n")

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """uint8 [N, H, W, 3] under each name; nothing where N is 0, which not every backend takes."""
    if shown := {name: np.asarray(image) for name, image in images.items() if len(image)}:
      self._backend.write_images(int(step), shown)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Markdown under each name."""
    self._backend.write_texts(int(step), texts)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """A config as nested plain values; once per run. Fields get dotted names, what is no number becomes a string."""
    self._backend.write_hparams(dict(_flat(hparams)))

  def flush(self) -> None:
    """Returns when everything written so far is on disk."""
    self._backend.flush()

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    self._backend.close()


class Progress:
  """The speed of a run, and its line of progress.

  Give it every point at which the host has waited for the devices, i.e. read a loss; times in between are those of
  dispatch only. Evaluation and saving go into `pause()` and do not count.

  Args:
    num_steps: the last step.
    images_per_step: the global batch.
    start: finished steps at the beginning.
    devices: chips among which the speed is divided.
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
    self._times: list[float] = []  # seconds per step of each interval; the first one holds the compilation

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Time spent inside is not training."""
    begin = self._clock()
    try:
      yield
    finally:
      self._since += self._clock() - begin

  def report(self, step: int, loss: float) -> tuple[str, dict[str, float]]:
    """The line and the scalars at `step`, whose loss was just read.

    Milliseconds per step are the median over the last 20 intervals between reports, the first one of the run left
    out as soon as there is another: it holds the compilation.

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
      f"{speed:.1f} img/s  {1e3 * seconds:.0f} ms/step  ETA {duration((self._num_steps - step) * seconds)}"
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
    print(line, flush=True)


def duration(seconds: float) -> str:
  """'42s', '7m42s', '3h07m', '2d03h'."""
  seconds = max(round(seconds), 0)
  for size, below, letters in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
    if seconds >= size:
      return f"{seconds // size}{letters[0]}{seconds % size // below:02d}{letters[1]}"
  return f"{seconds}s"


def table(rows: Sequence[Sequence[Any]]) -> str:
  """A text table, columns padded, numbers to the right; the first row is the header."""
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


def class_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A text table of the scores of classes, "-" for None, and a line break; empty where there are no rows."""
  told = lambda value: "-" if value is None else f"{value:.4f}" if isinstance(value, float) else value
  return table([tuple(rows[0]), *(tuple(map(told, row.values())) for row in rows)]) + "\n" if rows else ""


def parameter_overview(arrays: Mapping[str, Any], max_lines: int | None = None) -> str:
  """Name, shape, dtype and size of every array of a Named dict (or of its shapes), and their total, as a table."""
  from clu import parameter_overview as overview

  return overview.get_parameter_overview(dict(arrays), include_stats=False, max_lines=max_lines)


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
  """(dotted name, value) pairs; event files hold numbers and strings only."""
  for key, value in section.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)


def _clu(folder: epath.Path) -> Backend:
  """clu's asynchronous writer; tensorflow comes in without its messages and without the accelerators."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it speaks of them before its log level counts
  import tensorflow as tf
  from clu import metric_writers

  for kind in ("GPU", "TPU"):
    # A program that has used tensorflow before us has decided about its devices.
    with contextlib.suppress(RuntimeError):
      tf.config.set_visible_devices([], kind)
  return metric_writers.create_default_writer(folder, asynchronous=True)


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
  """A package as if it were not installed, for what is imported inside; one that is imported already stays."""
  if package in sys.modules:
    yield
    return
  modules: dict[str, Any] = sys.modules
  modules[package] = None
  try:
    yield
  finally:
    del sys.modules[package]


class _TensorboardX:
  """clu's methods over tensorboardX, which writes in a thread of its own."""

  def __init__(self, folder: epath.Path):
    # Where PyTorch is installed, tensorboardX imports it for graphs, which are never written here: three seconds.
    with _hidden("torch"):
      import tensorboardX

    self._writer = tensorboardX.SummaryWriter(str(folder))

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    for name, image in images.items():
      n, height, width, channels = image.shape if image.ndim == 4 else (1, *image.shape)
      below = image.reshape(n * height, width, channels)  # [N * H, W, C]
      self._writer.add_image(name, below, step, dataformats="HWC")

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      self._writer.add_text(name, text, step)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    from tensorboardX import summary

    # add_hparams would put them into a run of their own.
    for part in summary.hparams(dict(hparams), {}):
      cast(Any, self._writer.file_writer).add_summary(part)

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


@dataclasses.dataclass
class _Log:
  """Scalars to the log, nothing else."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    logging.info("[%d] %s", step, ", ".join(f"{name}={value:.6g}" for name, value in sorted(scalars.items())))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    pass

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    pass

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    pass

  def flush(self) -> None:
    logging.flush()

  def close(self) -> None:
    pass
