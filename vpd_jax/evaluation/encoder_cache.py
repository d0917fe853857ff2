"""Latents of pictures and states of sentences, ahead of the network.

Where a data set only resizes its pictures, what the frozen VAE makes of a picture and the frozen text encoder of a
sentence never changes. Both are computed here, row by row: one program that takes one picture, one that takes one
sentence, each on every device of this process at once. That is so whether or not the results are kept, so that
`data.cache` changes no bit:

  off     what the last batch used: sentences about one picture stand together in evaluation, so that each picture is
          encoded once in a pass (once per process)
  memory  everything, in this process; 64 KiB a picture of 512 x 512 and 120 KiB a sentence of 40 tokens in float32
  disk    everything, as files in `data.cache_folder`, which runs may share

Results are found by the content of the resized picture, or the tokens, so that a changed file meets no old result; on
disk also by the weights, the program, the version of jax and the kind of device. A file is renamed into place when it
is whole, and one that is damaged is made anew.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.data.pipeline import HostBatches
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError
from vpd_jax.experiment import Experiment
from vpd_jax.files import atomic
from vpd_jax.models.parameters import ModelSpec
from vpd_jax.types import Array, Batch, Cache, Dataset, ParamDict

Numpy = dict[str, np.ndarray]
ENCODERS = {"latents": "method/vae/", "text_states": "method/text_encoder/"}  # result: its arrays
READ = {"latents": "image", "text_states": "tokens"}  # result: of what


class Store(Protocol):
  """Where results are kept, by the digest of what they are made of."""

  def get(self, key: str) -> np.ndarray | None: ...
  def put(self, key: str, result: np.ndarray) -> None: ...


class Memory(dict):
  """A Store in this process."""

  put = dict.__setitem__


class Disk:
  """A Store of one file per result: its bytes, then their digest."""

  def __init__(self, folder: Path, result: jax.ShapeDtypeStruct):
    """Makes the folder.

    Raises:
      ValueError: it cannot be made or written to.
    """
    self._folder, self._shape, self._dtype = folder, result.shape, result.dtype
    try:
      folder.mkdir(parents=True, exist_ok=True)
      writable = os.access(folder, os.W_OK)
    except OSError:
      writable = False
    if not writable:
      raise UserError(f"data.cache_folder: {folder} cannot be made or written to; name another folder.")

  def get(self, key: str) -> np.ndarray | None:
    """The result, or None where there is none that is whole."""
    try:
      content = self._path(key).read_bytes()
    except FileNotFoundError:
      return None
    held, digest = content[: -_digest(b"").digest_size], content[-_digest(b"").digest_size :]
    if _digest(held).digest() != digest or len(held) != self._dtype.itemsize * int(np.prod(self._shape)):
      return None
    return np.frombuffer(held, self._dtype).reshape(self._shape)

  def put(self, key: str, result: np.ndarray) -> None:
    """Writes beside and renames.

    Raises:
      ValueError: the disk is full.
    """
    path, held = self._path(key), np.ascontiguousarray(result).tobytes()
    try:
      atomic.write(path, held + _digest(held).digest())
    except OSError as error:
      raise UserError(
        f"{path} cannot be written ({error.strerror}); make room for data.cache_folder, or set data.cache='off'."
      ) from None

  def _path(self, key: str) -> Path:
    return self._folder / key[:2] / key[2:]


class EncoderCache:
  """Adds "latents", and where the method reads sentences "text_states", to the batches of a data set.

  Attributes:
    active: whether it does; else batches stay as they are, and the network encodes its pictures itself, which it must
      where the VAE is trained, or latents are drawn.
  """

  def __init__(self, config: ConfigDict, exp: Experiment, dataset: Dataset, mesh: jax.sharding.Mesh):
    """Takes note of the options; nothing is computed.

    Args:
      config: of the run.
      exp: its method encodes.
      dataset: has an `encoder_cache` where it only resizes its pictures, see types.Cache.
      mesh: over which the weights are spread.

    Raises:
      ValueError: results are to be kept of a VAE that is trained.
    """
    check(exp, dataset)
    self._cache = dataset.encoder_cache or Cache("off", "")
    self._experiment, self._mesh = exp, mesh
    self.active = dataset.encoder_cache is not None and not _latents_change(exp)
    self._local = sharding.make_mesh(devices=[d for d in mesh.devices.flat if d.process_index == jax.process_index()])
    self._size = tuple(config.data.crop)
    self._weights: dict[str, str] = {}
    self._encoders: dict[str, _Encoder] = {}

  def lines(self) -> list[str]:
    """For the start of a run."""
    where = {"off": "computed anew for every batch", "memory": "kept in memory"}
    if not self.active:
      return []
    return [f"latents and text states: {where.get(self._cache.kind, f'kept in {self._cache.folder}')}"]

  def __call__(self, batches: HostBatches, frozen: ParamDict) -> HostBatches:
    """The same batches with the results in them, those for this process' rows; "tokens" are gone.

    Args:
      batches: of {key: [rows, ...]} with "image" uint8 [rows, H, W, 3] and, where they are read, "tokens" int32 [rows,
        N].
      frozen: the arrays that are not trained, on the mesh; every process must call at the same time.
    """
    if not self.active:
      return batches
    names = _results(self._experiment)
    for name in names:
      self._ready(name, {n: x for n, x in frozen.items() if n.startswith(ENCODERS[name])})
    return Encoded(batches, [self._encoders[name] for name in names])

  def _ready(self, name: str, arrays: ParamDict) -> None:
    """Makes an encoder of these weights, where there is none yet."""
    if jax.process_count() > 1:
      arrays = sharding.on_devices_of_one_process(arrays, self._mesh, self._local)
    arrays = {n: np.array(x) for n, x in sorted(arrays.items())}  # copies: a training step donates those of its state
    digest = _digest(b"")
    for n, x in arrays.items():
      digest.update(f"{n} {x.dtype} {x.shape}".encode())
      digest.update(np.ascontiguousarray(x).view(np.uint8).data)
    if self._weights.get(name) == digest.hexdigest():
      return
    self._weights[name] = digest.hexdigest()
    key, spec = READ[name], self._experiment.spec
    shapes = {
      "image": ((*self._size, 3), np.uint8),
      "tokens": ((self._experiment.method.sentence_tokens or (0,))[:1], np.int32),
    }
    row = jax.ShapeDtypeStruct((1, *shapes[key][0]), shapes[key][1])
    encoder = _Encoder(name, functools.partial(_encode, spec, name), arrays, row, self._local)
    if self._cache.kind == "memory":
      encoder.store = cast(Store, Memory())
    elif self._cache.kind == "disk":
      program = f"{encoder.text()} {jax.__version__} {self._local.devices.flat[0].device_kind} {digest.hexdigest()}"
      folder = Path(self._cache.folder).expanduser() / f"{name}-{_digest(program.encode()).hexdigest()}"
      encoder.store = Disk(folder, encoder.result)
    self._encoders[name] = encoder


class Encoded(HostBatches):
  """Iterator of batches with the results in them; the rest is that of the iterator below.

  Attributes:
    computed: rows that had to be computed so far, by name of the result.
  """

  def __init__(self, batches: HostBatches, encoders: "Sequence[_Encoder]"):
    self._batches, self._encoders = batches, encoders
    self._last: dict[str, Numpy] = {encoder.name: {} for encoder in encoders}
    self.computed = dict.fromkeys(self._last, 0)

  def __next__(self) -> Numpy:
    batch = dict(next(self._batches))
    for encoder in self._encoders:
      name, key = encoder.name, READ[encoder.name]
      rows, known = batch[key], self._last[encoder.name]
      keys = [_digest(str(rows.shape[1:]).encode(), np.ascontiguousarray(row).data).hexdigest() for row in rows]
      missing = {}
      for place, k in enumerate(keys):
        if k not in known and (held := encoder.store.get(k)) is not None:
          known[k] = held
        if k not in known:
          missing.setdefault(k, place)
      made = encoder(rows[list(missing.values())])
      for k, result in zip(missing, made, strict=True):
        known[k] = result
        encoder.store.put(k, result)
      self.computed[name] += len(missing)
      self._last[name] = {k: known[k] for k in keys}
      batch[name] = np.stack([known[k] for k in keys])
    batch.pop("tokens", None)  # the image stays: its size is asked for
    return batch

  @property
  def skipped(self) -> int:
    """See pipeline.HostBatches."""
    return self._batches.skipped

  def close(self) -> None:
    """See pipeline.HostBatches."""
    self._batches.close()


class _Nothing:
  """A Store that keeps nothing."""

  def get(self, key: str) -> None: ...
  def put(self, key: str, result: np.ndarray) -> None: ...


class _Encoder:
  """One row to one result, on all devices of this process at once."""

  def __init__(
    self,
    name: str,
    function: Callable[[ParamDict, Array], Array],
    weights: Numpy,
    row: jax.ShapeDtypeStruct,
    mesh: jax.sharding.Mesh,
  ):
    """`row` is [1, ...]: what `function` is given."""
    self.name, self._function, self._row, self._mesh = name, function, row, mesh
    self.store: Store = _Nothing()
    self._weights = jax.device_put(weights, sharding.replicated(mesh))
    result = jax.eval_shape(function, weights, row)
    self.result = jax.ShapeDtypeStruct(result.shape[1:], result.dtype)
    # The same program of one row on each device, whatever their number: the same bits.
    spread = jax.shard_map(
      function, mesh=mesh, in_specs=(P(), P(sharding.AXES)), out_specs=P(sharding.AXES), check_vma=False
    )
    self._run = jax.jit(spread)

  def text(self) -> str:
    """The program for one device, before it is compiled."""
    return jax.jit(self._function).lower(self._weights, self._row).as_text()

  def __call__(self, rows: np.ndarray) -> list[np.ndarray]:
    """Results of the rows, in order."""
    count, waiting = self._mesh.size, []
    for begin in range(0, len(rows), count):
      chosen = rows[np.minimum(np.arange(begin, begin + count), len(rows) - 1)]
      waiting.append(self._run(self._weights, jax.device_put(chosen, sharding.batch_sharding(self._mesh))))
    return [row for made in waiting for row in np.asarray(made)][: len(rows)]


def _encode(spec: ModelSpec, name: str, weights: ParamDict, rows: Array) -> Array:
  """Rows to results of this name, by the method that has these weights."""
  method = spec.partial(weights).method
  return {"latents": method.latents, "text_states": method.text_states}[name]({READ[name]: rows})


def _results(exp: Experiment) -> list[str]:
  """The names of what is made ahead."""
  return [name for name in ENCODERS if name == "latents" or exp.method.sentence_tokens]


def _latents_change(exp: Experiment) -> str:
  """Why a picture has other latents in each step; empty where it has not."""
  if exp.method.samples_latents:
    return "config.method draws it anew in every step; take the mode"
  trained = any(name.startswith(ENCODERS["latents"]) for name in exp.groups.lr)
  return 'config.optim.lr_groups trains it; freeze it with (r"/vae/", None)' if trained else ""


def check(exp: Experiment, dataset: Dataset) -> None:
  """Raises ValueError where results of a VAE are to be kept that change."""
  cache = dataset.encoder_cache
  if cache is not None and cache.kind != "off" and (why := _latents_change(exp)):
    raise UserError(
      f"data.cache={cache.kind!r} keeps what the VAE makes of pictures, but {why}, or set data.cache='off'."
    )


def planned(config: ConfigDict, exp: Experiment, batch: Batch) -> tuple[Batch, int]:
  """What `EncoderCache` would make of a batch, without the data set: for --mode=plan and benchmarks.

  Args:
    config: of the run; its data set says by `only_resizes` whether results are made ahead.
    exp: of it.
    batch: ShapeDtypeStructs of what the pipeline gives.

  Returns:
    ShapeDtypeStructs of what the step is given, and the bytes of the encoders' weights, a copy of which lies on every
    device beside the state.
  """
  if not experiment.only_resizes(config) or _latents_change(exp):
    return batch, 0
  encoded, held = {key: x for key, x in batch.items() if key != "tokens"}, 0
  for name in _results(exp):
    arrays = {n: x for n, x in exp.spec.shapes.items() if n.startswith(ENCODERS[name])}
    encoded[name] = jax.eval_shape(functools.partial(_encode, exp.spec, name), arrays, batch[READ[name]])
    held += sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())
  return encoded, held


def inputs(batch: Batch, exp: Experiment) -> Batch:
  """What the network reads of a batch, ready or not."""
  names = {"image", *exp.method.needs, *ENCODERS}
  return {name: x for name, x in batch.items() if name in names}


def _digest(*parts: bytes | memoryview) -> hashlib.blake2b:
  """A running digest of bytes."""
  made = hashlib.blake2b(digest_size=16)
  for part in parts:
    made.update(part)
  return made
