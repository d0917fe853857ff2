"""Runs the frozen encoders ahead of the network, and caches latents of images and encoded sentences.

If a data set only resizes its images, the output of the frozen VAE for an image and of the frozen text encoder for a
sentence never changes. Both are computed here, row by row: one program encodes one image, another one sentence, each on
all devices of this process in parallel. The programs are the same with and without caching, so that results are
bit-identical for all values of `data.cache`:

  off     keeps the results of the last batch: sentences about the same image are consecutive in evaluation, so that
          each image is encoded once per pass (and process)
  memory  keeps all results in this process; 64 KiB per image of 512 x 512 and 120 KiB per sentence of 40 tokens in
          float32
  disk    keeps all results as files in `data.cache_folder`, which several runs can share

Results are keyed by the content of the resized image, or the tokens, so that changed files are encoded again; on disk
also by the weights, the program, the version of jax and the device kind. Files are renamed when they are complete, and
damaged files are recomputed.
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
ENCODERS = {"latents": "method/vae/", "text_states": "method/text_encoder/"}  # prefix of the arrays by result
ENCODER_INPUTS = {"latents": "image", "text_states": "tokens"}  # key of the batch by result


class Store(Protocol):
  """A key-value store of results, keyed by the digest of their inputs."""

  def get(self, key: str) -> np.ndarray | None: ...
  def put(self, key: str, result: np.ndarray) -> None: ...


class Memory(dict):
  """A Store in this process."""

  put = dict.__setitem__


class Disk:
  """A Store with one file per result: its bytes, then their digest."""

  def __init__(self, folder: Path, result: jax.ShapeDtypeStruct):
    """Creates the folder.

    Raises:
      ValueError: it cannot be created or written to.
    """
    self._folder, self._shape, self._dtype = folder, result.shape, result.dtype
    try:
      folder.mkdir(parents=True, exist_ok=True)
      writable = os.access(folder, os.W_OK)
    except OSError:
      writable = False
    if not writable:
      raise UserError(f"data.cache_folder: {folder} cannot be created or written to; choose another folder.")

  def get(self, key: str) -> np.ndarray | None:
    """The result; None if it is missing or damaged."""
    try:
      content = self._path(key).read_bytes()
    except FileNotFoundError:
      return None
    size = _digest().digest_size
    data, digest = content[:-size], content[-size:]
    if _digest(data).digest() != digest or len(data) != self._dtype.itemsize * int(np.prod(self._shape)):
      return None
    return np.frombuffer(data, self._dtype).reshape(self._shape)

  def put(self, key: str, result: np.ndarray) -> None:
    """Writes a temporary file and renames it.

    Raises:
      ValueError: the disk is full.
    """
    path, data = self._path(key), np.ascontiguousarray(result).tobytes()
    try:
      atomic.write(path, data + _digest(data).digest())
    except OSError as error:
      raise UserError(
        f"{path} cannot be written ({error.strerror}); make room for data.cache_folder, or set data.cache='off'."
      ) from None

  def _path(self, key: str) -> Path:
    return self._folder / key[:2] / key[2:]


class EncoderCache:
  """Adds "latents", and "text_states" if the method reads sentences, to the batches of a data set.

  Attributes:
    active: whether it adds them; otherwise batches are unchanged, and the network itself encodes the images, as
      required if the VAE is trained or latents are sampled.
  """

  def __init__(self, config: ConfigDict, exp: Experiment, dataset: Dataset, mesh: jax.sharding.Mesh):
    """Stores the options; computes nothing.

    Args:
      config: of the run.
      exp: contains the encoders in its method.
      dataset: has an `encoder_cache` if it only resizes its images, see types.Cache.
      mesh: over which the weights are sharded.

    Raises:
      ValueError: caching is requested for a trained VAE.
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
    """Lines for the start-up report."""
    where = {"off": "computed for every batch", "memory": "cached in memory"}
    if not self.active:
      return []
    return [f"latents and text states: {where.get(self._cache.kind, f'cached in {self._cache.folder}')}"]

  def __call__(self, batches: HostBatches, frozen: ParamDict) -> HostBatches:
    """Adds the results for the rows of this process to the batches, and removes "tokens".

    Args:
      batches: of {key: [rows, ...]} with "image" uint8 [rows, H, W, 3] and, if they are read, "tokens" int32 [rows, N].
      frozen: the frozen arrays on the mesh; all processes must call at the same time.
    """
    if not self.active:
      return batches
    names = _results(self._experiment)
    for name in names:
      self._prepare_encoder(name, {n: x for n, x in frozen.items() if n.startswith(ENCODERS[name])})
    return Encoded(batches, [self._encoders[name] for name in names])

  def _prepare_encoder(self, name: str, arrays: ParamDict) -> None:
    """Creates the encoder with these weights unless it already exists."""
    if jax.process_count() > 1:
      arrays = sharding.on_devices_of_one_process(arrays, self._mesh, self._local)
    # Copies, since the training step donates the arrays of its state.
    arrays = {n: np.array(x) for n, x in sorted(arrays.items())}
    digest = _digest()
    for n, x in arrays.items():
      digest.update(f"{n} {x.dtype} {x.shape}".encode())
      digest.update(np.ascontiguousarray(x).view(np.uint8).data)
    if self._weights.get(name) == digest.hexdigest():
      return
    self._weights[name] = digest.hexdigest()
    key, spec = ENCODER_INPUTS[name], self._experiment.spec
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
  """Iterator that adds the results to the batches of another iterator.

  Attributes:
    computed: number of rows computed so far, by name of the result.
  """

  def __init__(self, batches: HostBatches, encoders: "Sequence[_Encoder]"):
    self._batches, self._encoders = batches, encoders
    self._last: dict[str, Numpy] = {encoder.name: {} for encoder in encoders}
    self.computed = dict.fromkeys(self._last, 0)

  def __next__(self) -> Numpy:
    batch = dict(next(self._batches))
    for encoder in self._encoders:
      name = encoder.name
      rows, results = batch[ENCODER_INPUTS[name]], self._last[name]
      keys = [_digest(str(rows.shape[1:]).encode(), np.ascontiguousarray(row).data).hexdigest() for row in rows]
      missing = {}  # index of the row by key
      for i, key in enumerate(keys):
        if key not in results and (stored := encoder.store.get(key)) is not None:
          results[key] = stored
        if key not in results:
          missing.setdefault(key, i)
      computed = encoder(rows[list(missing.values())])
      for key, result in zip(missing, computed, strict=True):
        results[key] = result
        encoder.store.put(key, result)
      self.computed[name] += len(missing)
      self._last[name] = {key: results[key] for key in keys}
      batch[name] = np.stack([results[key] for key in keys])
    batch.pop("tokens", None)  # the image is kept, since its size is needed
    return batch

  @property
  def skipped(self) -> int:
    """See pipeline.HostBatches."""
    return self._batches.skipped

  def close(self) -> None:
    """See pipeline.HostBatches."""
    self._batches.close()


class _NullStore:
  """A Store that discards all results."""

  def get(self, key: str) -> None: ...
  def put(self, key: str, result: np.ndarray) -> None: ...


class _Encoder:
  """Encodes rows one by one, on all devices of this process in parallel."""

  def __init__(
    self,
    name: str,
    function: Callable[[ParamDict, Array], Array],
    weights: Numpy,
    row: jax.ShapeDtypeStruct,
    mesh: jax.sharding.Mesh,
  ):
    """`row`: shape [1, ...] and dtype of the input of `function`."""
    self.name, self._function, self._row, self._mesh = name, function, row, mesh
    self.store: Store = _NullStore()
    self._weights = jax.device_put(weights, sharding.replicated(mesh))
    result = jax.eval_shape(function, weights, row)
    self.result = jax.ShapeDtypeStruct(result.shape[1:], result.dtype)
    # Each device runs the same program on one row, so that results do not depend on the number of devices.
    spread = jax.shard_map(
      function, mesh=mesh, in_specs=(P(), P(sharding.AXES)), out_specs=P(sharding.AXES), check_vma=False
    )
    self._run = jax.jit(spread)

  def text(self) -> str:
    """The program for one device, before compilation."""
    return jax.jit(self._function).lower(self._weights, self._row).as_text()

  def __call__(self, rows: np.ndarray) -> list[np.ndarray]:
    """Results of the rows, in order."""
    count, pending = self._mesh.size, []
    for begin in range(0, len(rows), count):
      chosen = rows[np.minimum(np.arange(begin, begin + count), len(rows) - 1)]
      pending.append(self._run(self._weights, jax.device_put(chosen, sharding.batch_sharding(self._mesh))))
    return [row for results in pending for row in np.asarray(results)][: len(rows)]


def _encode(spec: ModelSpec, name: str, weights: ParamDict, rows: Array) -> Array:
  """Encodes rows with the given weights of the method."""
  method = spec.partial(weights).method
  return {"latents": method.latents, "text_states": method.text_states}[name]({ENCODER_INPUTS[name]: rows})


def _results(exp: Experiment) -> list[str]:
  """The names of the results that are computed ahead of the network."""
  return [name for name in ENCODERS if name == "latents" or exp.method.sentence_tokens]


def _latents_change(exp: Experiment) -> str:
  """Why the latents of an image differ between steps; empty if they are constant."""
  if exp.method.samples_latents:
    return "config.method samples new latents in every step; use the mode"
  trained = any(name.startswith(ENCODERS["latents"]) for name in exp.groups.lr)
  return 'config.optim.lr_groups trains the VAE; freeze it with (r"/vae/", None)' if trained else ""


def check(exp: Experiment, dataset: Dataset) -> None:
  """Raises ValueError if caching is requested for latents that change."""
  cache = dataset.encoder_cache
  if cache is not None and cache.kind != "off" and (why := _latents_change(exp)):
    raise UserError(f"data.cache={cache.kind!r} caches the latents of images, but {why}, or set data.cache='off'.")


def encoded_batch_shapes(config: ConfigDict, exp: Experiment, batch: Batch) -> tuple[Batch, int]:
  """Shapes of a batch after `EncoderCache`, without opening the data set: for --mode=plan and benchmarks.

  Args:
    config: of the run; `only_resizes` of its data set determines whether images are encoded ahead of the network.
    exp: of the config.
    batch: ShapeDtypeStructs of a batch of the pipeline.

  Returns:
    ShapeDtypeStructs of the batch that the step receives, and the bytes of the encoders' weights, of which every device
    has a copy in addition to the state.
  """
  if not experiment.only_resizes(config) or _latents_change(exp):
    return batch, 0
  encoded, weight_bytes = {key: x for key, x in batch.items() if key != "tokens"}, 0
  for name in _results(exp):
    arrays = {n: x for n, x in exp.spec.shapes.items() if n.startswith(ENCODERS[name])}
    encoded[name] = jax.eval_shape(functools.partial(_encode, exp.spec, name), arrays, batch[ENCODER_INPUTS[name]])
    weight_bytes += sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())
  return encoded, weight_bytes


def inputs(batch: Batch, exp: Experiment) -> Batch:
  """The entries of a batch that the network reads, including precomputed ones."""
  names = {"image", *exp.method.needs, *ENCODERS}
  return {name: x for name, x in batch.items() if name in names}


def _digest(*parts: bytes | memoryview) -> hashlib.blake2b:
  """An incremental digest that already contains the given bytes."""
  digest = hashlib.blake2b(digest_size=16)
  for part in parts:
    digest.update(part)
  return digest
