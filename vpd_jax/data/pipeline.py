"""The input pipeline, from Examples to batches on the mesh, with grain.

The data of a step depend only on (seed, step). The records of all epochs form one infinite sequence, by default
reshuffled in each epoch. Global batch k of size n has its positions k n to (k + 1) n - 1, so a batch may span two
epochs, and process p of P has the p-th of P equal parts of each batch. Random numbers depend on the position, not on
the worker. Therefore no iterator state is saved: an iterator that starts at step k yields the same batches as an
uninterrupted one. A record that cannot be read stops the run or is replaced by the next one, deterministically on all
processes.
"""

import atexit
import dataclasses
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import cv2
import grain
import jax
import numpy as np
from absl import flags

from vpd_jax.data import worker_failures
from vpd_jax.data.shards import reader
from vpd_jax.data.shards.reader import forbid_stop_iteration
from vpd_jax.errors import UserError, check_choice
from vpd_jax.types import Batch, Dataset, Example, Source

NumpyBatch = dict[str, np.ndarray]
_THREADS = 4  # that read and transform batches without worker processes
_AHEAD = 2  # batches to buffer per worker
_EPOCHS = 2**32  # practically infinite; the length of grain's infinite repetition overflows for batch size 1
PADDING = ("position", "real")  # keys that evaluation adds to a batch


def train_batches(
  dataset: Dataset,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  workers: int = 0,
  keys: Iterable[str],
  prepare: Callable[[Example], Example] | None = None,
  process_index: int = 0,
  process_count: int = 1,
  on_bad_record: str = "stop",
  reshuffle_each_epoch: bool = True,
) -> "Batches":
  """Infinite batches of the training split, with the rows of this process.

  Args:
    dataset: see types.Dataset.
    batch_size: rows of the global batch, a multiple of process_count.
    seed: of the order and of the augmentation.
    start_step: index of the first batch.
    workers: number of worker processes; 0 for threads of this process. The batches are the same.
    keys: keys of a batch.
    prepare: a host transform after that of the data set.
    process_index: of this process.
    process_count: number of processes that share the global batch.
    on_bad_record: "stop" raises the error of a record that cannot be read; "skip" replaces it by the next readable
      record, names the file on stderr once, and counts it in `skipped`.
    reshuffle_each_epoch: False keeps the shuffled order of the first epoch. The augmentation differs in any case.

  Returns:
    an iterator of {key: [batch_size / process_count, ...]}. The original error of a record is raised by `next`, also if
    it occurred in a worker.

  Raises:
    ValueError: if batch_size is not a multiple of process_count, the split is empty, or on_bad_record is unknown.
  """
  check_choice("on_bad_record", on_bad_record, reader.ON_BAD_RECORD)
  source, report = _source(dataset, "train", batch_size, process_count), None
  if on_bad_record == "skip":
    source, report, keys = reader.SkipUnreadable(source), reader.Report(source), (*keys, reader.SKIPPED)
  order_seed, transform_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
  examples = (
    grain.MapDataset.source(source)
    .shuffle(seed=order_seed)
    .map_with_index(_with_position)
    .repeat(_EPOCHS, reseed_each_epoch=reshuffle_each_epoch)
    .random_map(_TrainTransform(dataset, len(source), prepare), seed=transform_seed)
  )
  batches = examples.batch(batch_size // process_count, batch_fn=reader.Collate(tuple(sorted(keys))))
  return Batches(batches[start_step * process_count + process_index :: process_count], workers, report)


def eval_batches(
  dataset: Dataset,
  *,
  batch_size: int,
  keys: Iterable[str],
  prepare: Callable[[Example], Example] | None = None,
  process_index: int = 0,
  process_count: int = 1,
  workers: int = 0,
) -> "Batches":
  """Every record of the evaluation split once, in order, with the rows of this process.

  All batches have the same shape, and all processes get the same number of batches: the last one is padded with copies
  of the last record. A record that cannot be read always raises, because a score over fewer images is not comparable.

  Args: as for `train_batches`.

  Returns:
    an iterator of {key: [batch_size / process_count, ...]} with "real" bool [batch_size / process_count], False for
    padding, and "position" int32, that of the record in the split.
  """
  source = _source(dataset, "eval", batch_size, process_count)
  examples = grain.MapDataset.source(reader.PadToLength(source, -(-len(source) // batch_size) * batch_size))
  examples = examples.map(_EvalTransform(dataset, prepare))
  batches = examples.batch(batch_size // process_count, batch_fn=reader.Collate(tuple(sorted({*keys, *PADDING}))))
  return Batches(batches[process_index::process_count], workers)


def eval_examples(
  dataset: Dataset,
  *,
  prepare: Callable[[Example], Example] | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> "Batches":
  """As `eval_batches`, but single Examples of any size."""
  source = _source(dataset, "eval", process_count, process_count)
  filled = reader.PadToLength(source, -(-len(source) // process_count) * process_count)
  examples = grain.MapDataset.source(filled).map(_EvalTransform(dataset, prepare))
  return Batches(examples[process_index::process_count], 0)


class HostBatches:
  """Iterator of batches {key: [rows, ...]} on the host, from any iterable."""

  def __init__(self, batches: Iterable[NumpyBatch]):
    self._batches = iter(batches)

  def __iter__(self) -> "HostBatches":
    return self

  def __next__(self) -> NumpyBatch:
    return next(self._batches)

  @property
  def skipped(self) -> int:
    """Number of rows so far in which a record that cannot be read was replaced."""
    return 0

  def close(self) -> None:
    """Releases the resources of the iterator; none here."""


class Batches(HostBatches):
  """Batches read by threads or worker processes.

  Workers assemble complete batches in turn, so the result does not depend on their number. They terminate with `close`,
  when the iterator is garbage collected, or at exit.
  """

  def __init__(self, batches: grain.MapDataset, workers: int, report: reader.Report | None = None):
    threads = 0 if workers else _THREADS
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads one of its flags before it starts a worker
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
      dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    self._shared, self._report = workers > 0, report
    self._open = [iter(dataset)]
    self._finalizer = weakref.finalize(self, _close, self._open)

  def close(self) -> None:
    """See HostBatches."""
    self._finalizer()

  def __next__(self) -> NumpyBatch:
    if not self._open:
      raise StopIteration
    batch = worker_failures.next_batch(self._open[0])
    # Copied out of the memory shared with the worker, which does not outlive the iterator.
    batch = {key: np.array(array) for key, array in batch.items()} if self._shared else batch
    return self._report(batch) if self._report else batch

  @property
  def skipped(self) -> int:
    """See HostBatches."""
    return self._report.skipped if self._report else 0


def to_mesh(batch: NumpyBatch, sharding: jax.sharding.NamedSharding) -> Batch:
  """Puts the rows of this process on its devices, as a part of global arrays.

  Args:
    batch: {key: [rows, ...]}, the same number of rows on every process.
    sharding: how the first axis of every array is split, e.g. P(("data", "fsdp")).

  Raises:
    ValueError: if the global batch cannot be split evenly.
  """
  axes = sharding.spec[0] if len(sharding.spec) else None
  names = () if axes is None else (axes,) if isinstance(axes, str) else axes
  processes = len({device.process_index for device in sharding.device_set})
  rows = len(next(iter(batch.values()))) * processes
  check_batch_size(rows, int(np.prod([sharding.mesh.shape[name] for name in names], dtype=int)), "devices")
  return jax.make_array_from_process_local_data(sharding, batch)


class Prefetch:
  """Puts batches on the mesh in a background thread, up to `size` batches ahead, and measures the wait for input.

  Attributes:
    wait_ms: milliseconds that the last `next` waited for the host; about 0 if the input is fast enough.
    skipped: number of rows of this process so far in which a record that cannot be read was replaced.
  """

  def __init__(self, iterator: HostBatches, sharding: jax.sharding.NamedSharding, size: int = 2):
    self.wait_ms, self.skipped = 0.0, 0
    self._waits: list[float] = []
    self._iterator, self._sharding = iterator, sharding
    self._ready: queue.Queue[tuple[Batch, int] | Exception] = queue.Queue(size)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._fill, daemon=True, name="prefetch")
    self._thread.start()
    atexit.register(self.close)

  def __iter__(self) -> "Prefetch":
    return self

  def __next__(self) -> Batch:
    if self._stop.is_set():
      raise StopIteration
    start = time.perf_counter()
    item = self._ready.get()
    self.wait_ms = 1e3 * (time.perf_counter() - start)
    if isinstance(item, Exception):  # StopIteration at the end, or an error of the thread
      self.close()
      raise item
    self._waits.append(self.wait_ms)
    batch, self.skipped = item
    return batch

  def mean_wait_ms(self) -> float:
    """Mean wait per batch since the last call, in milliseconds; 0 if there were no batches."""
    waits, self._waits = self._waits, []
    return float(np.mean(waits)) if waits else 0.0

  def close(self) -> None:
    """Stops the thread and closes the underlying iterator with its workers."""
    atexit.unregister(self.close)
    self._stop.set()
    while self._thread.is_alive():
      while not self._ready.empty():
        self._ready.get_nowait()
      self._thread.join(timeout=0.05)
    self._iterator.close()

  def _fill(self) -> None:
    """Body of the thread: fills the queue until stopped; errors are passed on through the queue."""
    while not self._stop.is_set():
      try:
        item = to_mesh(next(self._iterator), self._sharding), self._iterator.skipped
      except Exception as error:
        self._ready.put(error)
        return
      self._ready.put(item)


def check_batch_size(batch_size: int, parts: int, name: str) -> None:
  """Raises if `batch_size` cannot be split evenly over `parts` `name` ("devices" or "processes")."""
  if batch_size < 1 or batch_size % parts:
    nearest = max(round(batch_size / parts), 1) * parts
    raise UserError(f"batch_size={batch_size} must be a positive multiple of the {parts} {name}; use {nearest}.")


def _source(dataset: Dataset, split: str, batch_size: int, process_count: int) -> Source:
  check_batch_size(batch_size, process_count, "processes")
  source = dataset.source(split)
  if not len(source):
    raise UserError(f"the {split} split has no records.")
  return reader.ForbidStopIteration(source)


def _with_position(position: int, example: Example) -> tuple[int, Example]:
  """Attaches the position in the infinite sequence."""
  return position, example


@dataclasses.dataclass(frozen=True)
class _TrainTransform:
  """The data set's transform and the method's, with the position in the epoch."""

  dataset: Dataset
  records: int
  prepare: Callable[[Example], Example] | None

  @forbid_stop_iteration
  def __call__(self, indexed: tuple[int, Example], rng: np.random.Generator) -> Example:
    position, example = indexed
    skipped = {key: example[key] for key in (reader.SKIPPED,) if key in example}
    example = self.dataset.train_transform(example, rng, position % self.records)
    return {**(self.prepare(example) if self.prepare else example), **skipped}


@dataclasses.dataclass(frozen=True)
class _EvalTransform:
  """The data set's transform and the method's, then PADDING."""

  dataset: Dataset
  prepare: Callable[[Example], Example] | None

  @forbid_stop_iteration
  def __call__(self, row: tuple[Example, int, bool]) -> Example:
    example, position, real = row
    example = self.dataset.eval_transform(example)
    example = self.prepare(example) if self.prepare else example
    return dict(example, position=np.int32(position), real=np.asarray(real))


def _close(iterators: list[grain.DatasetIterator]) -> None:
  """Closes and removes iterators; grain's print errors if they still exist when the interpreter exits."""
  while iterators:
    iterators.pop().close()


def _start_worker(index: int, count: int) -> None:
  """Keeps a worker off the accelerators, which belong to the main process, and disables OpenCV's threads."""
  del index, count
  # A terminal sends Ctrl-C to all processes; the main process, which saves first, still needs its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  os.environ["JAX_PLATFORMS"] = "cpu"
  jax.config.update("jax_platforms", "cpu")  # the variable above was read when jax was imported
  cv2.setNumThreads(0)
