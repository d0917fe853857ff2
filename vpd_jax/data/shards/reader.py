"""Reads records from prepared shards, replaces unreadable ones, and collates them to batches.

`writer.py` writes the shards. This module also runs in worker processes, so it is lightweight and its objects are
picklable.
"""

import contextlib
import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from etils import epath

from vpd_jax.data import validation
from vpd_jax.data.readers.image_files import Record
from vpd_jax.errors import UserError, first_items, one_line
from vpd_jax.types import Example, Fields, Options, Source

FORMATS = ("files", "tfds")
INFO = "dataset_info.json"  # written last, so a folder with it is complete
ON_BAD_RECORD = ("stop", "skip")
SKIPPED = "skipped"  # key of an Example: int32 [2], the requested record and how many were skipped for it
MAX_UNREADABLE = 10  # consecutive records; more suggest a failed disk rather than bad files

Method = TypeVar("Method", bound=Callable[..., Any])
# Results of `read_once` by data set; never pickled.
_READ: weakref.WeakKeyDictionary[object, dict[object, object]] = weakref.WeakKeyDictionary()


def read_once(method: Method) -> Method:
  """Caches the result of a data set's method by split, for the lifetime of the data set; errors are not cached."""

  @functools.wraps(method)
  def once(dataset: object, split: str) -> object:
    cache, key = _READ.setdefault(dataset, {}), (method.__qualname__, split)
    if key not in cache:
      cache[key] = method(dataset, split)
    return cache[key]

  return cast(Method, once)


class Shards(Source):
  """Random access to one split of prepared ArrayRecord shards: the same Examples as from files, in the same order.

  Args:
    root: folder that scripts/prepare_data.py wrote, local or gs://.
    name: of the data set.
    split: "train" or "eval".
    decode: decodes a stored record to an Example, as for files; None if Examples are stored.
    made_with: options of the data set that its records depend on, as given to the builder; None is the default of an
      option, which shards may leave out.

  Raises:
    ValueError: if the folder is not prepared, or has another data set, other splits or options, or missing or truncated
      shards.
  """

  def __init__(
    self,
    root: str,
    name: str,
    split: str,
    *,
    decode: Callable[[Record], Example] | None = None,
    made_with: Options | None = None,
  ):
    self._root, self._split, self._decode = str(root), split, decode
    if not root:
      raise UserError("data.root is empty; with data.format='tfds' it is the folder that prepare_data.py wrote.")
    if not (epath.Path(root).expanduser() / INFO).exists():
      raise UserError(
        f"root={self._root!r} holds no prepared shards ({INFO} is not there); write them with "
        f"scripts/prepare_data.py {name} --root=FILES --output={self._root}, or set data.format='files'."
      )
    info = self._open()
    _check(self._root, info, name, split, made_with or {})
    notes = dict(info.metadata or {}).get("notes", {}).get(split, ())
    self.notes = [f"when the shards were written: {note}" for note in notes]

  def __len__(self) -> int:
    return len(self._records)

  def summary(self) -> str:
    """The number of records: images, or referring expressions, or people."""
    return f"{len(self)} records"

  def __getitem__(self, index: int) -> Example:
    """The Example at an index.

    Raises:
      ValueError: for a damaged record; names the folder and the record.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index={index} is outside the {len(self)} records of {self._split!r}.")
    with self._reading(index):
      stored = self._records[int(index)]
      record = {key: self._restore[key](value) for key, value in stored.items()}
      return record if self._decode is None else self._decode(record)

  def picture(self, index: int) -> str:
    """See Source; reads the full record."""
    if "image_path" not in self._restore:
      return super().picture(index)
    with self._reading(index):
      return str(self._restore["image_path"](self._records[int(index)]["image_path"]))

  @contextlib.contextmanager
  def _reading(self, index: int) -> Iterator[None]:
    """Names the folder and the record of an error."""
    try:
      yield
    except MemoryError:  # not caused by the record
      raise
    except Exception as error:  # damaged shards raise many types, of riegeli, protobuf and numpy
      reason = one_line(error)
      raise UserError(f"record {index} of split {self._split!r} in {self._root} cannot be read: {reason}") from None

  def __getstate__(self) -> tuple[object, ...]:
    return self._root, self._split, self._decode

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    self._root, self._split, self._decode = state
    self._open()

  def _open(self) -> Any:
    """Opens the folder in this process; returns tfds' description of it."""
    import tensorflow_datasets as tfds  # slow to import, and only needed for shards

    builder: Any = tfds.builder_from_directory(epath.Path(self._root).expanduser())
    info, features = builder.info, builder.info.features
    encoded = {key: tfds.decode.SkipDecoding() for key, f in features.items() if isinstance(f, tfds.features.Image)}
    self._restore = {key: bytes if key in encoded else _restorer(feature) for key, feature in features.items()}
    self._records: Any = ()
    if self._split in info.splits:
      self._records = builder.as_data_source(self._split, decoders=encoded)
    return info


def forbid_stop_iteration(function: Callable[..., Any]) -> Callable[..., Any]:
  """Turns StopIteration into RuntimeError, because grain would treat it as the end of the data."""

  @functools.wraps(function)
  def call(*arguments: object) -> object:
    try:
      return function(*arguments)
    except StopIteration as error:
      raise RuntimeError(
        "reading or transforming a record raised StopIteration, as next() does on an empty iterator: the data "
        "would silently end there. Give next() a default, or raise a ValueError that names the file."
      ) from error

  return call


@dataclasses.dataclass(frozen=True)
class ForbidStopIteration(Source):
  """A source whose records never raise StopIteration, see `forbid_stop_iteration`."""

  source: Source

  def __len__(self) -> int:
    return len(self.source)

  @forbid_stop_iteration
  def __getitem__(self, index: int) -> Example:
    return self.source[index]


class SkipUnreadable(Source):
  """A source that replaces unreadable records by the next readable one.

  The replacement depends only on the files, so it is the same for all processes, workers and resumed runs.
  """

  def __init__(self, source: Source):
    self.source = source

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    """The Example with SKIPPED.

    Raises:
      ValueError: MAX_UNREADABLE records after this one, or all, cannot be read either; names the first.
    """
    first = None
    for count in range(min(MAX_UNREADABLE + 1, len(self))):
      try:
        example = self.source[(index + count) % len(self)]
      except UserError as error:
        first = first or error
      else:
        return {**example, SKIPPED: np.array([index, count], np.int32)}
    raise UserError(f"{min(MAX_UNREADABLE + 1, len(self))} records in a row cannot be read, the first: {first}")


@dataclasses.dataclass
class Report:
  """Removes SKIPPED from batches, counts replaced rows, and reports each skipped record once, on stderr.

  Attributes:
    source: of the records, to find out why one cannot be read.
    skipped: number of rows so far in which a record was replaced.
  """

  source: Source
  skipped: int = 0
  _named: set[int] = dataclasses.field(default_factory=set)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    skipped = batch.pop(SKIPPED)  # [B, 2]
    self.skipped += int(np.count_nonzero(skipped[:, 1]))
    for index, count in skipped[skipped[:, 1] > 0].tolist():
      for unreadable in ((index + step) % len(self.source) for step in range(count)):
        if unreadable not in self._named:
          self._named.add(unreadable)
          print(f"skipped and replaced by the next record: {self._reason(unreadable)}", file=sys.stderr, flush=True)
    return batch

  def _reason(self, index: int) -> str:
    try:
      self.source[index]
    except UserError as error:
      return str(error)
    return f"record {index} could not be read before, but can be now."


@dataclasses.dataclass(frozen=True)
class PadToLength:
  """A source padded with copies of its last record; a row is (Example, index, whether it is not padding)."""

  source: Source
  length: int

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> tuple[Example, int, bool]:
    last = len(self.source) - 1
    return self.source[min(index, last)], index, index <= last


@dataclasses.dataclass(frozen=True)
class Collate:
  """Collates Examples to a batch with `keys` only; raises a UserError for a missing or Absent value."""

  keys: tuple[str, ...]

  def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    batch = {}
    for key in self.keys:
      if any(key not in example for example in examples):
        raise UserError(f"an example has no {key!r}; it has {sorted(examples[0])}.")
      if absent := [example[key] for example in examples if isinstance(example[key], validation.Absent)]:
        raise UserError(absent[0].reason)
      arrays = [np.asarray(example[key]) for example in examples]
      shapes = {array.shape for array in arrays}
      if len(shapes) > 1:
        raise UserError(f"{key!r} of one batch has the shapes {sorted(shapes)}; give all one size by data.resize.")
      batch[key] = np.stack(arrays)
    return batch


def _check(root: str, info: Any, name: str, split: str, made_with: Options) -> None:
  """Checks that a prepared folder is the requested one, and complete."""
  metadata = dict(info.metadata or {})
  if metadata.get("dataset") != name:
    raise UserError(f"root={root!r} holds shards of {metadata.get('dataset')!r}, but data.name={name!r}.")
  if split not in info.splits:
    raise UserError(
      f"root={root!r} holds the splits {sorted(info.splits)} only; prepare it again with --splits and {split!r}."
    )
  stored_options = metadata.get("made_with", {})
  show = lambda value: "default" if value is None else repr(value)
  differing = [
    f"{key}={show(stored_options.get(key))} (here {show(value)})"
    for key, value in plain(made_with).items()
    if stored_options.get(key) != value
  ]
  if differing:
    raise UserError(
      f"the shards in {root!r} were made with {', '.join(differing)}; prepare them again for other values."
    )
  paths = info.splits[split].filepaths
  missing = [path.name for path in paths if not path.exists()]
  if missing:
    raise UserError(f"{len(missing)} of {len(paths)} shards are missing in {root}: {first_items(missing)}; copy again.")
  size, expected = sum(path.stat().length for path in paths), int(info.splits[split].num_bytes)
  if size != expected:
    raise UserError(f"the {split} shards in {root} have {size} bytes in place of {expected}; copy them again.")


def plain(options: Options) -> Fields:
  """Options as after a JSON round trip: tuples become lists."""
  return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}


def _restorer(feature: Any) -> Callable[[Any], Any]:
  """The function from a numpy value of tfds to the stored value."""
  if type(feature).__name__ == "Text":
    return lambda value: value.decode() if isinstance(value, bytes) else str(value)
  dtype = feature.np_dtype
  return lambda value: np.array(value, dtype)  # a copy, because arrays of tfds are read-only
