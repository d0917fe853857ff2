"""Writes data sets as ArrayRecord shards with tensorflow-datasets, e.g. to read them from a bucket.

Shards contain the bytes of the files (images are not re-encoded), so Examples from shards equal those from files and
both use the same decoder. tensorflow is not required for writing or reading.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tqdm import tqdm

from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError
from vpd_jax.files import atomic
from vpd_jax.types import Dataset, Fields, Source

FEATURES: dict[str, Callable[[], object]] = {  # the valid values of Dataset.stored
  "picture": lambda: tfds.features.Image(shape=(None, None, 3)),
  "depth16": lambda: tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
  "labels8": lambda: tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
  "text": tfds.features.Text,
  "int32": lambda: tfds.features.Scalar(np.int32),
  "float32": lambda: tfds.features.Scalar(np.float32),
}
SHARD_BYTES = 256 * 2**20
SAMPLES = 32  # records to estimate the number of shards from
STATE = "state.json"


class VpdJax(tfds.core.ShardBasedBuilder):
  """Builder for all data sets.

  tfds' GeneratorBasedBuilder either orders records by a hash or, with that disabled, holds a full split in memory,
  since all keys fall into one bucket. This builder writes shard by shard, in order.

  Args:
    name: of the data set.
    sources: random access to the records by split.
    features: see `describe`.
    made_with: options of the data set that its records depend on; stored, and compared when the shards are read.
    shard_bytes: approximate size of a shard.
    staging: folder of finished shards, which a later run reuses.
    folder: for tfds.
  """

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None  # no downloads; tfds 4.9.10 would need importlib_resources to determine this

  def __init__(
    self,
    *,
    name: str,
    sources: dict[str, Source],
    features: Fields,
    made_with: Fields,
    shard_bytes: int,
    staging: Path,
    folder: Path,
  ):
    self._sources, self._features = sources, features
    notes = {split: list(source.notes) for split, source in sources.items()}
    self._about = {"dataset": name, "made_with": made_with, "notes": notes}
    self._shard_bytes, self._staging = shard_bytes, staging
    self._sizes: dict[str, int] = {}
    super().__init__(data_dir=folder, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self._about['dataset']} in the order of its files, by scripts/prepare_data.py of vpd_jax.",
      features=tfds.features.FeaturesDict(self._features),
      metadata=tfds.core.MetadataDict(self._about),
    )

  def _example_writer(self) -> tfds.core.ExampleWriter:
    return _Writer(self._staging)

  def _shard_iterators_per_split(self, dl_manager: object) -> dict[str, Sequence[Callable[[], Iterator[object]]]]:
    return {split: self._shards(split, source) for split, source in self._sources.items()}

  def _shards(self, split: str, source: Source) -> Sequence[Callable[[], Iterator[object]]]:
    """One function per shard, which yields (index, record) for a range of records."""
    count = min(-(-self.size(split) // self._shard_bytes), len(source))
    bounds = [len(source) * number // count for number in range(count + 1)]
    template = self._get_filename_template(split_name=split)
    progress: list[tqdm] = []

    def shard(number: int) -> Iterator[object]:
      if not progress:
        every = 1.0 if sys.stderr.isatty() else 10.0  # seconds
        progress.append(tqdm(total=len(source), desc=f"writing {split}", unit=" records", mininterval=every))
      path = self._staging / template.sharded_filepath(shard_index=number, num_shards=count).name
      finished = path.exists()
      for index in range(bounds[number], bounds[number + 1]):
        # tfds counts the records of every shard; those of a finished one are not read again.
        yield index, None if finished else source.record(index)
        progress[0].update()
      if number + 1 == count:
        progress[0].close()

    return [lambda number=number: shard(number) for number in range(count)]

  def size(self, split: str) -> int:
    """The approximate size of a split in bytes, from some of its records."""
    if split not in self._sizes:
      source = self._sources[split]
      chosen = sorted({len(source) * step // SAMPLES for step in range(SAMPLES)})
      features: Any = self.info.features
      encoded = [features.serialize_example(source.record(index)) for index in chosen]
      self._sizes[split] = max(sum(map(len, encoded)) * len(source) // len(chosen), 1)
    return self._sizes[split]


class _Writer(tfds.core.ExampleWriter):
  """Writes a shard to a temporary file, renames it on completion, and links it to the path that tfds expects."""

  def __init__(self, staging: Path):
    super().__init__(tfds.core.FileFormat.ARRAY_RECORD)
    self._staging = staging

  def write(self, path: os.PathLike, examples: Iterator[tuple[int, bytes]]) -> None:
    finished = self._staging / Path(path).name
    if not finished.exists():
      part = finished.with_name(finished.name + ".part")
      # Images are already compressed; one record per group, for random access.
      writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1,uncompressed")
      for _, serialized in examples:
        writer.write(serialized)
      writer.close()
      atomic.sync(part)  # a finished shard is not looked at again, not even after the machine has crashed
      part.replace(finished)
      atomic.sync(self._staging)
    try:
      os.link(finished, path)
    except OSError:  # a file system without links
      shutil.copyfile(finished, path)


def describe(dataset: Dataset, source: Source) -> Fields:
  """tfds features by key: those of `dataset.stored`, or else of the first Example, with its exact dtypes.

  Raises:
    ValueError: if `stored` has an unknown feature, or an Example contains unsupported values.
  """
  stored = dataset.stored
  if stored is None:
    return {key: _feature(key, value) for key, value in source[0].items()}
  unknown = sorted(set(stored.values()) - set(FEATURES))
  if unknown:
    raise UserError(f"stored={stored} names {unknown}; choose among {sorted(FEATURES)}.")
  return {key: FEATURES[feature]() for key, feature in stored.items()}


def prepare(
  dataset: Dataset,
  output: str | Path,
  *,
  name: str,
  splits: Sequence[str] = ("train", "eval"),
  shard_bytes: int = SHARD_BYTES,
  say: Callable[[str], None] = print,
) -> None:
  """Writes the shards of a data set; `output` appears when all of them are complete.

  Until then, files are written to `<output>.partial`. The same call resumes an interrupted run: finished shards are
  kept, others are written again. The files of the data set are not modified.

  Args:
    dataset: see types.Dataset.
    output: local folder, which must not exist or be empty.
    name: of the data set.
    splits: to write.
    shard_bytes: approximate size of a shard.
    say: called with one line if a run is resumed.

  Raises:
    ValueError: if the output cannot be written or has other files, the disk is too small, or a record cannot be read.
  """
  output = check_output(output)
  made_with = reader.plain(dataset.made_with)
  if (output / reader.INFO).exists():
    for split in splits:
      reader.Shards(str(output), name, split, made_with=made_with)
    shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
    say(f"{output} is prepared already; remove it to write it again")
    return
  partial = output.with_name(output.name + ".partial")
  staging = partial / "shards"
  sources = {split: dataset.source(split) for split in splits}
  state = {
    "name": name,
    "made_with": made_with,
    "shard_bytes": shard_bytes,
    "sources": {
      split: hashlib.sha256(json.dumps(_identity(source)).encode()).hexdigest() for split, source in sources.items()
    },
  }
  try:
    _continue(staging, state, say)
    builder = VpdJax(
      name=name,
      sources=sources,
      features=describe(dataset, next(iter(sources.values()))),
      made_with=made_with,
      shard_bytes=shard_bytes,
      staging=staging,
      folder=partial / "tfds",
    )
    done = sum(path.stat().st_size for path in staging.glob("*array_record*"))
    copies = 1 if _has_links(staging) else 2
    needed, free = copies * sum(map(builder.size, splits)) - done, shutil.disk_usage(partial).free
    if needed > free:
      raise UserError(f"{output.parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed.")
    # tfds requires a folder for downloads, and prints that it downloads.
    with tempfile.TemporaryDirectory(dir=partial) as downloads, contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_dir=downloads)
    if output.is_dir():
      output.rmdir()
    builder.data_path.rename(output)
  except OSError as error:
    raise UserError(
      f"output={str(output)!r} cannot be written: {error.strerror or error}; what is finished stays in {partial}."
    ) from None
  shutil.rmtree(partial)


def check_output(output: str | Path) -> Path:
  """The absolute path of a folder that is prepared already, or can be written.

  Raises:
    ValueError: for a bucket, or a path with other content.
  """
  if "://" in str(output):
    raise UserError(f"output={str(output)!r} must be a local folder; copy it to the bucket when it is whole.")
  output = Path(output).expanduser().absolute()
  empty = not output.exists() or (output.is_dir() and not any(output.iterdir()))
  if not empty and not (output / reader.INFO).exists():
    raise UserError(f"output={str(output)!r} exists and is not an empty folder; give another one.")
  return output


def _continue(staging: Path, state: Fields, say: Callable[[str], None]) -> None:
  """Keeps the finished shards of an interrupted run with the same state, and removes anything else."""
  state_file = staging / STATE
  if staging.exists():
    finished = sorted(path for path in staging.glob("*array_record*") if path.suffix != ".part")
    stored = _stored_state(state_file)
    if stored == state:
      say(f"continuing: {len(finished)} shards are finished, any other is written again")
    else:
      why = "of what is not known any more" if stored is None else "since when the data set or its options have changed"
      say(f"starting again: {len(finished)} shards were written, {why}")
      shutil.rmtree(staging)
  for leftover in itertools.chain(staging.glob("*.part"), staging.parent.glob("tmp*"), staging.parent.glob("tfds")):
    leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
  staging.mkdir(parents=True, exist_ok=True)
  atomic.write_json(state_file, state)


def _has_links(folder: Path) -> bool:
  """Whether the file system has hard links, without which every finished shard is copied."""
  with tempfile.TemporaryDirectory(dir=folder) as scratch:
    file = Path(scratch) / "file"
    file.touch()
    try:
      os.link(file, file.with_name("link"))
    except OSError:
      return False
    return True


def _stored_state(path: Path) -> object:
  """The content of the state file; None if it is missing or was not written completely."""
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None


def _identity(value: object) -> object:
  """The content of a source as JSON, which, unlike a pickle, is the same in every process."""
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, list | tuple):
    return [_identity(item) for item in value]
  if isinstance(value, set | frozenset):
    return sorted(json.dumps(_identity(item)) for item in value)
  if isinstance(value, dict):
    return sorted([json.dumps(_identity(key)), _identity(item)] for key, item in value.items())
  if isinstance(value, np.ndarray | np.generic):
    return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, functools.partial):
    return _identity([value.func, value.args, value.keywords])
  if inspect.isroutine(value) or inspect.isclass(value):
    return [value.__module__, value.__qualname__]
  return [type(value).__qualname__, _identity(vars(value))]


def _feature(key: str, value: object) -> object:
  """The tfds feature that stores an array exactly, or a string."""
  if isinstance(value, str):
    return tfds.features.Text()
  array = np.asarray(value)
  if array.dtype.kind not in "biuf":
    raise UserError(f"an Example's {key!r} is of {array.dtype}, which shards cannot hold; numbers and text can.")
  # Encoded, because without encoding tfds stores all floats as float32, and slowly.
  encoding = tfds.features.Encoding.ZLIB if array.ndim else tfds.features.Encoding.BYTES
  return tfds.features.Tensor(shape=(None,) * array.ndim, dtype=array.dtype, encoding=encoding)
