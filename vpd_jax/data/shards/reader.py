"""Records on their way to a batch: read from prepared shards, replaced where they cannot be read, stacked.

`writer.py` writes the shards. What stands here runs in worker processes too, so it is light and picklable.
"""

import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from etils import epath

from vpd_jax.data.readers.image_files import Record
from vpd_jax.errors import UserError
from vpd_jax.types import Example, Fields, Options, Source

FORMATS = ("files", "tfds")
INFO = "dataset_info.json"  # written last: a folder that has it is whole
ON_BAD_RECORD = ("stop", "skip")
SKIPPED = "skipped"  # key of an Example: int32 [2], the record asked for and how many were passed over for it
MOST = 10  # unreadable records in a row; more than that is a lost disk rather than a bad file


Method = TypeVar("Method", bound=Callable[..., Any])
_READ: weakref.WeakKeyDictionary[object, dict[object, object]] = (
  weakref.WeakKeyDictionary()
)  # by data set; never pickled


def read_once(method: Method) -> Method:
  """A method of a data set whose result for a split is kept as long as the data set; what it raises is not."""

  @functools.wraps(method)
  def once(dataset: object, split: str) -> object:
    held, key = _READ.setdefault(dataset, {}), (method.__qualname__, split)
    if key not in held:
      held[key] = method(dataset, split)
    return held[key]

  return cast(Method, once)


def check_format(format: str) -> str:
  """The given way of storage, or a ValueError with the list of them."""
  if format not in FORMATS:
    raise UserError(f"format={format!r} is unknown; choose one of {FORMATS}.")
  return format


def check_on_bad_record(word: str) -> None:
  """A ValueError with the list of them for an unknown way to answer a record that cannot be read."""
  if word not in ON_BAD_RECORD:
    raise UserError(f"on_bad_record={word!r} is unknown; choose one of {ON_BAD_RECORD}.")


class Shards(Source):
  """Random access to one split of prepared ArrayRecord shards: the Examples of the files, in their order.

  Args:
    root: folder that scripts/prepare_data.py wrote, local or gs://.
    name: of the data set.
    split: "train" or "eval".
    decode: from a stored record to an Example, the same function that serves the files; None where the Examples
      themselves were stored.
    made_with: options of the data set on which its records depend, as given to the builder.

  Raises:
    ValueError: no prepared folder, or one of another data set, without that split, made with other options, or with
      shards missing or cut off.
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

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    """The Example at that place of the list.

    Raises:
      ValueError: the record is damaged; names the folder and the record.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index={index} is outside the {len(self)} records of {self._split!r}.")
    try:
      stored = self._records[int(index)]
      record = {key: self._restore[key](value) for key, value in stored.items()}
      return record if self._decode is None else self._decode(record)
    except Exception as error:  # a damaged shard: riegeli's, protobuf's and numpy's errors have nothing else in common
      reason = " ".join(str(error).split())
      raise UserError(f"record {index} of split {self._split!r} in {self._root} cannot be read: {reason}") from None

  def picture(self, index: int) -> str:
    """See Source; reads the whole record."""
    if "image_path" not in self._restore:
      return super().picture(index)
    return str(self._restore["image_path"](self._records[int(index)]["image_path"]))

  def __getstate__(self) -> tuple[object, ...]:
    return self._root, self._split, self._decode

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    self._root, self._split, self._decode = state
    self._open()

  def _open(self) -> Any:
    """Opens the folder in this process; returns tfds' description of it."""
    import tensorflow_datasets as tfds  # a second to import, and only shards need it

    builder: Any = tfds.builder_from_directory(epath.Path(self._root).expanduser())
    info, features = builder.info, builder.info.features
    encoded = {key: tfds.decode.SkipDecoding() for key, f in features.items() if isinstance(f, tfds.features.Image)}
    self._restore = {key: bytes if key in encoded else _restorer(feature) for key, feature in features.items()}
    self._records: Any = ()
    if self._split in info.splits:
      self._records = builder.as_data_source(self._split, decoders=encoded)
    return info


def unending(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, its StopIteration made a RuntimeError: grain would take it for the end of the data."""

  @functools.wraps(function)
  def call(*arguments: object) -> object:
    try:
      return function(*arguments)
    except StopIteration as error:
      raise RuntimeError(
        "reading or transforming a record raised StopIteration, as next() does on an empty iterator: the data would "
        "end there without a word. Give next() a default, or raise a ValueError that names the file."
      ) from error

  return call


@dataclasses.dataclass(frozen=True)
class Unending(Source):
  """A source whose records never end an iteration, see `unending`."""

  source: Source

  def __len__(self) -> int:
    return len(self.source)

  @unending
  def __getitem__(self, index: int) -> Example:
    return self.source[index]


class SkipUnreadable(Source):
  """A source that gives the next readable record in place of one that is not.

  Which one depends on the files only, so that every process, worker and resumed run sees the same.
  """

  def __init__(self, source: Source):
    self.source = source

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    """The Example with SKIPPED.

    Raises:
      ValueError: MOST records after this one, or all there are, cannot be read either; names the first.
    """
    first = None
    for count in range(min(MOST + 1, len(self))):
      try:
        example = self.source[(index + count) % len(self)]
      except UserError as error:
        first = first or error
      else:
        return {**example, SKIPPED: np.array([index, count], np.int32)}
    raise UserError(f"{min(MOST + 1, len(self))} records in a row cannot be read, the first: {first}")


@dataclasses.dataclass
class Report:
  """Takes SKIPPED out of batches, counts, and names each record that was left out once, on stderr.

  Attributes:
    source: of the records, for the reason why one cannot be read.
    skipped: rows so far that hold another record than the one whose turn it was.
  """

  source: Source
  skipped: int = 0
  _named: set[int] = dataclasses.field(default_factory=set)

  def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    asked = batch.pop(SKIPPED)  # [B, 2]
    self.skipped += int(np.count_nonzero(asked[:, 1]))
    for index, count in asked[asked[:, 1] > 0].tolist():
      for bad in ((index + step) % len(self.source) for step in range(count)):
        if bad not in self._named:
          self._named.add(bad)
          print(f"left out, the next record takes its place: {self._reason(bad)}", file=sys.stderr, flush=True)
    return batch

  def _reason(self, index: int) -> str:
    try:
      self.source[index]
    except UserError as error:
      return str(error)
    return f"record {index} could not be read before, but can be now."


@dataclasses.dataclass(frozen=True)
class PadToLength:
  """A source lengthened by repeating its last record; a row is (Example, whether it is real)."""

  source: Source
  length: int

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> tuple[Example, bool]:
    last = len(self.source) - 1
    return self.source[min(index, last)], index <= last


@dataclasses.dataclass(frozen=True)
class Collate:
  """Examples to a batch that holds `keys` only."""

  keys: tuple[str, ...]

  def __call__(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    batch = {}
    for key in self.keys:
      if any(key not in example for example in examples):
        raise UserError(f"an example has no {key!r}; it has {sorted(examples[0])}.")
      arrays = [np.asarray(example[key]) for example in examples]
      shapes = {array.shape for array in arrays}
      if len(shapes) > 1:
        raise UserError(f"{key!r} of one batch has the shapes {sorted(shapes)}; give all one size by data.resize.")
      batch[key] = np.stack(arrays)
    return batch


def _check(root: str, info: Any, name: str, split: str, made_with: Options) -> None:
  """Whether a prepared folder is the one asked for, and whole."""
  found = dict(info.metadata or {})
  if found.get("dataset") != name:
    raise UserError(f"root={root!r} holds shards of {found.get('dataset')!r}, but data.name={name!r}.")
  if split not in info.splits:
    raise UserError(
      f"root={root!r} holds the splits {sorted(info.splits)} only; prepare it again with --splits and {split!r}."
    )
  old = found.get("made_with", {})
  differing = [
    f"{key}={old.get(key)!r} (here {value!r})" for key, value in plain(made_with).items() if old.get(key) != value
  ]
  if differing:
    raise UserError(
      f"the shards in {root!r} were made with {', '.join(differing)}; prepare them again for other values."
    )
  paths = info.splits[split].filepaths
  missing = [path.name for path in paths if not path.exists()]
  if missing:
    raise UserError(
      f"{len(missing)} of {len(paths)} shards are missing in {root}: {', '.join(missing[:10])}; copy again."
    )
  size, whole = sum(path.stat().length for path in paths), int(info.splits[split].num_bytes)
  if size != whole:
    raise UserError(f"the {split} shards in {root} have {size} bytes in place of {whole}; copy them again.")


def plain(options: Options) -> Fields:
  """Options as they look after a round through JSON: tuples are lists."""
  return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}


def _restorer(feature: Any) -> Callable[[Any], Any]:
  """From tfds' numpy value back to what was stored."""
  if type(feature).__name__ == "Text":
    return lambda value: value.decode() if isinstance(value, bytes) else str(value)
  dtype = feature.np_dtype
  return lambda value: np.array(value, dtype)  # a copy: what tfds gives is read-only
