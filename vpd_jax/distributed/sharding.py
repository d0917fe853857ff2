"""Sharding of the training state: one mesh, one rule."""

import contextlib
import gc
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vpd_jax import moments
from vpd_jax.errors import UserError
from vpd_jax.models import parameters as params_lib
from vpd_jax.types import Device, ParamDict, PyTree

AXES = ("data", "fsdp")
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence[Device] | None = None) -> Mesh:
  """A mesh with the axes ('data', 'fsdp'): the batch is split over both, large arrays of the state over 'fsdp'.

  Args:
    data: number of copies of the state; -1 uses all remaining devices.
    fsdp: number of devices that share a copy of the state; -1 uses all remaining devices.
    devices: default: all devices of all processes, ordered for their network.

  Raises:
    ValueError: the product is not the number of devices, or a copy of the state would be shared by two TPU slices.
  """
  count = len(devices) if devices is not None else jax.device_count()
  sizes = {"data": data, "fsdp": fsdp}
  known = [size for size in sizes.values() if size != -1]
  if not known or any(size < 1 for size in known):
    raise UserError(f"mesh data={data}, fsdp={fsdp}: give positive sizes, at most one of them -1.")
  if len(known) == 1:
    sizes = {axis: count // known[0] if size == -1 else size for axis, size in sizes.items()}
  if sizes["data"] * sizes["fsdp"] != count:
    raise UserError(
      f"mesh data={data}, fsdp={fsdp} does not cover the {count} devices exactly; use data=-1 and an fsdp that "
      f"divides {count}."
    )
  placed = arranged(devices if devices is not None else jax.devices(), sizes["data"], sizes["fsdp"])
  # Flax's convolutions do not support explicit axes.
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 2)


def arranged(devices: Sequence[Device], data: int, fsdp: int) -> np.ndarray:
  """The devices as an array [data, fsdp], ordered for their network; each TPU slice has whole rows.

  Raises:
    ValueError: `data` is not a multiple of the number of slices.
  """
  tpu = devices[0].platform == "tpu"  # hosts of GPUs also have the attribute
  slices = len({device.slice_index for device in devices}) if tpu else 1  # pyright: ignore[reportAttributeAccessIssue]
  if data % slices:
    raise UserError(f"mesh data={data}, fsdp={fsdp}: data must be a multiple of the {slices} TPU slices; reduce fsdp.")
  # jax.make_mesh splits an axis of the network on v5e only: fsdp=8 on a v6e of 16 x 16 would fail.
  if slices == 1:
    return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
  shapes = (data // slices, fsdp), (slices, 1)
  return mesh_utils.create_hybrid_device_mesh(*shapes, devices, allow_split_physical_axes=True)


def array_spec(shape: Sequence[int], itemsize: int, fsdp_size: int, *, min_bytes: int = 2**20) -> P:
  """The sharding rule: an array of `min_bytes` or more is split over 'fsdp' along its largest divisible axis.

  Of equally large axes the last one is split. Smaller arrays, and those without a divisible axis, are replicated.

  Args:
    shape: of the array.
    itemsize: bytes per element.
    fsdp_size: size of the mesh axis 'fsdp'.
    min_bytes: smaller arrays cost more time to gather than they save memory.
  """
  divisible = [axis for axis, size in enumerate(shape) if size and size % fsdp_size == 0]
  if fsdp_size == 1 or math.prod(shape) * itemsize < min_bytes or not divisible:
    return P()
  chosen = max(divisible, key=lambda axis: (shape[axis], axis))
  return P(*(None,) * chosen, "fsdp")


def state_shardings(mesh: Mesh, state: PyTree, *, rules: Rules = (), min_bytes: int = 2**20) -> PyTree:
  """A NamedSharding for every array of a TrainState, optimizer state included.

  The rule depends on the shape only, and of arrays of one name and shape on the widest, so that moments are sharded
  like their parameters; the scales of moments in int8 like the axis that their blocks do not extend along. Pass the
  result as `out_shardings` of `jax.jit(optimizer.init)`, which would replicate them otherwise.

  Args:
    mesh: of `make_mesh`.
    state: arrays or ShapeDtypeStructs.
    rules: (pattern, spec) pairs that override the rule. Patterns are searched in "/" + full name, and the first match
      wins; a spec is a tuple of 'data', 'fsdp' or None per axis. Parameters and their moments share a name. Rules may
      match no name here, see `check_rules`.
    min_bytes: see `array_spec`.

  Raises:
    ValueError: the spec of a rule does not fit an array that it matches; moments in int8 would be split inside their
      blocks.
  """
  first, _ = _first_rules(state, rules)
  widest: dict[tuple[str, tuple[int, ...]], int] = {}
  for path, leaf in jax.tree.leaves_with_path(state):
    key = array_name(path), leaf.shape
    widest[key] = max(leaf.dtype.itemsize, widest.get(key, 0))

  def spec_of(name: str, shape: tuple[int, ...]) -> P:
    if shape and name in first:
      pattern, spec = rules[first[name]]
      _check_fits(mesh, name, shape, pattern, spec)
      return P(*spec)
    return array_spec(shape, widest[name, shape], mesh.shape["fsdp"], min_bytes=min_bytes)

  def place(path: Any, leaf: PyTree) -> PyTree:
    if not isinstance(leaf, moments.Blocks):
      return NamedSharding(mesh, spec_of(array_name(path), leaf.shape))
    name, shape = array_name(path), leaf.codes.shape
    spec = spec_of(name, shape)
    axis, split = moments.axis(shape), [i for i, part in enumerate(spec) if part is not None and mesh.shape[part] > 1]
    if split and split != [axis]:
      raise UserError(
        f"config.optim.moments='int8' keeps blocks along every axis but {axis} of {name} of shape {shape}, which is "
        f"split along {split}; add (r'/{name}$', ()) in front of config.mesh.rules, or choose other moments."
      )
    scales = P(None, spec[axis]) if split else P()
    return moments.Blocks(NamedSharding(mesh, spec), NamedSharding(mesh, scales))  # pyright: ignore[reportArgumentType]

  return jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda x: isinstance(x, moments.Blocks))


def check_rules(state: PyTree, rules: Rules) -> None:
  """Raises ValueError if a rule of `state_shardings` matches no array, or none that earlier rules leave.

  For the state of training: an evaluation has neither the training-only parts of a method nor the factors of LoRA.
  """
  _, idle = _first_rules(state, rules)
  if idle:
    raise UserError(f"config.mesh.rules: {idle}; remove or correct them.")


def _first_rules(state: PyTree, rules: Rules) -> tuple[dict[str, int], str]:
  """See parameters.first_rules."""
  names = {array_name(path) for path, leaf in jax.tree.leaves_with_path(state) if leaf.ndim}
  return params_lib.first_rules(names, rules, field="config.mesh.rules")


def abstract(state: PyTree, shardings: PyTree) -> PyTree:
  """The state as ShapeDtypeStructs with shardings, as needed to restore it."""
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, shardings)


def place(arrays: PyTree, shardings: PyTree, *, emptied: bool = False) -> PyTree:
  """Transfers arrays from the host, or from one device, to the mesh.

  Args:
    arrays: a tree; with several processes, each of them has full copies of all arrays.
    shardings: a tree of NamedShardings; all processes whose devices they include must call this function.
    emptied: whether `arrays`, nested dicts, may be emptied during the transfer, so that their memory is freed early.

  Raises:
    ValueError: the arrays differ between the processes, e.g. because of different files.
  """
  if all(where.is_fully_addressable for where in jax.tree.leaves(shardings)):
    return _moved(arrays, shardings) if emptied else jax.tree.map(jax.device_put, arrays, shardings)
  named = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(arrays)]
  # jax.device_put would send every array to every process for a comparison.
  sums = np.array([_checksum(x) for _, x in named], np.uint32)
  everywhere = multihost_utils.process_allgather(sums)  # [P, arrays]
  if different := [name for (name, _), same in zip(named, (everywhere == sums).all(0), strict=True) if not same]:
    raise UserError(
      f"the processes begin with different arrays, {len(different)} of {len(named)}, like {different[:3]}; give all "
      "processes the same weights, config and version of this program."
    )
  return jax.tree.map(
    lambda x, where: jax.make_array_from_callback(np.shape(x), where, np.asarray(x).__getitem__), arrays, shardings
  )


def _moved(arrays: dict[str, PyTree], shardings: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Transfers the arrays of nested dicts one by one, and removes each from its dict to free its memory."""
  transfer = lambda x, where: _moved(x, where) if isinstance(x, dict) else jax.device_put(x, where)
  return {name: transfer(arrays.pop(name), shardings[name]) for name in list(arrays)}


def _checksum(x: object) -> int:
  """A checksum of an array on the host or on a device of this process."""
  return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def tracing(mesh: Mesh) -> Iterator[None]:
  """A context for tracing a program for this mesh, from which layers read their platform and devices.

  Disables Python's garbage collector: tracing creates millions of live objects, whose repeated inspection takes an
  eighth of the time.
  """
  enabled = gc.isenabled()
  gc.disable()
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      yield
  finally:
    if enabled:
      gc.enable()


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the first axis of every array of a Batch over all devices."""
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """A full copy on every device."""
  return NamedSharding(mesh, P())


def on_devices_of_one_process(arrays: PyTree, mesh: Mesh, local: Mesh) -> PyTree:
  """Replicates arrays that are sharded over all processes on each device of this process.

  Args:
    arrays: a tree; all processes must call with the same one.
    mesh: of the arrays.
    local: mesh of the devices of this process.
  """
  full = jax.jit(lambda x: x, out_shardings=replicated(mesh))(arrays)
  here = lambda x: jax.make_array_from_single_device_arrays(
    x.shape, replicated(local), [shard.data for shard in x.addressable_shards]
  )
  return jax.tree.map(here, full)  # no second copy


def of_first_process(array: np.ndarray) -> np.ndarray:
  """The array of process 0, of one that all processes computed: on GPUs, the last bits may differ."""
  return multihost_utils.broadcast_one_to_all(array) if jax.process_count() > 1 else array


def gathered(arrays: ParamDict, shardings: Mapping[str, NamedSharding], dtype: DTypeLike) -> ParamDict:
  """All-gathers the arrays that are split, in the dtype of computation; returns the others unchanged.

  Call it where a step uses the arrays. Without it, the partitioner would split activations along the axes of the
  weights, and communicate activations between the layers in place of weights. Gradients are split again.

  Args:
    arrays: by name, in a traced function.
    shardings: of the arrays, by name.
    dtype: of computation: wider arrays are cast before the communication.
  """
  split = {name: where for name, where in shardings.items() if any(axis is not None for axis in where.spec)}
  return {name: _all_gather(x, split[name], dtype) if name in split else x for name, x in arrays.items()}


def _all_gather(x: jax.Array, where: NamedSharding, dtype: DTypeLike) -> jax.Array:
  """All-gathers one array."""
  dtype_in = x.dtype
  gather_dtype = min(dtype_in, jnp.dtype(dtype), key=lambda dtype: dtype.itemsize)

  @jax.custom_vjp
  def gather(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x.astype(gather_dtype), replicated(where.mesh))

  def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, where).astype(dtype_in),)

  gather.defvjp(lambda x: (gather(x), None), backward)
  return gather(x) if jnp.issubdtype(dtype_in, jnp.floating) else x


def array_name(path: Any) -> str:
  """The full name in a path of the state: the last string key of a dict, or else the whole path."""
  keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str)]
  return keys[-1] if keys else jax.tree_util.keystr(path)


def _check_fits(mesh: Mesh, name: str, shape: Sequence[int], pattern: str, spec: Sequence[str | None]) -> None:
  """Raises if the spec of a rule cannot split an array of this shape."""
  if unknown := [axis for axis in spec if axis is not None and axis not in AXES]:
    raise UserError(f"mesh rule {pattern!r} names the axes {unknown}; choose from {AXES} and None.")
  fits = len(spec) <= len(shape) and all(
    axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=False)
  )
  if not fits:
    raise UserError(
      f"mesh rule {pattern!r} with {tuple(spec)} does not fit {name} of shape {tuple(shape)} on a mesh of "
      f"{dict(mesh.shape)}; give one entry per axis, and split only axes that divide."
    )
