"""The mesh, and where each array of a state lives."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vpd_jax.distributed import sharding
from vpd_jax.types import TrainState


def state(kernel=(512, 1024)):
  params = {
    "method/unet/a/kernel": jnp.arange(np.prod(kernel), dtype=jnp.float32).reshape(kernel),
    "neck/b/bias": jnp.ones(8),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
  return TrainState(
    step=jnp.int32(0),
    params=params,
    frozen={"method/vae/c/kernel": jnp.zeros((1024, 512))},
    stats={"head/bn/mean": jnp.zeros(8)},
    opt_state=optimizer.init(params),
  )


@pytest.mark.parametrize(
  "shape, fsdp, expected",
  [
    ((512, 1024), 4, P(None, "fsdp")),  # the largest axis
    ((1024, 512), 4, P("fsdp")),
    ((3, 3, 320, 320), 4, P(None, None, None, "fsdp")),  # of equal ones the last
    ((1026, 512), 4, P(None, "fsdp")),  # the largest does not divide
    ((513, 1025), 4, P()),  # none divides
    ((512, 511), 4, P()),  # just below 1 MiB
    ((512, 512), 4, P(None, "fsdp")),  # 1 MiB
    ((512, 1024), 1, P()),
    ((), 4, P()),
    ((0, 4), 4, P()),
  ],
)
def test_the_largest_divisible_axis_of_large_arrays_is_split(shape, fsdp, expected):
  assert sharding.array_spec(shape, 4, fsdp) == expected


def test_bytes_count_not_numbers():
  assert sharding.array_spec((512, 512), 2, 4) == P()
  assert sharding.array_spec((512, 512), 2, 4, min_bytes=2**19) == P(None, "fsdp")


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a TPU with several slices."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  platform: str = "tpu"
  device_kind: str = "TPU v4"
  core_on_chip: int = 0
  process_index: int = 0


def chips(platform="tpu"):
  """Two slices of 2 x 2 chips, whose coordinates repeat."""
  places = [(x, y, 0) for y in range(2) for x in range(2)]
  return [Chip(4 * s + i, s, place, platform) for s in range(2) for i, place in enumerate(places)]


@pytest.mark.parametrize("data, fsdp", [(8, 1), (4, 2), (2, 4)])
def test_the_copies_of_the_state_are_not_shared_by_tpu_slices(data, fsdp):
  placed = sharding.arranged(chips(), data, fsdp)
  assert placed.shape == (data, fsdp) and {chip.id for chip in placed.flat} == set(range(8))
  assert [{chip.slice_index for chip in row} for row in placed] == [{0}] * (data // 2) + [{1}] * (data // 2)


def test_a_copy_over_two_tpu_slices_is_refused_and_over_two_machines_of_gpus_is_not():
  with pytest.raises(ValueError, match="data=1, fsdp=8: data must be a multiple of the 2 TPU slices; reduce fsdp"):
    sharding.arranged(chips(), 1, 8)
  assert sharding.arranged(chips("gpu"), 1, 8).shape == (1, 8)


def test_a_mesh_covers_all_devices_or_says_why_not():
  device = jax.devices()[:1]
  assert dict(sharding.make_mesh(devices=device).shape) == {"data": 1, "fsdp": 1}
  for data, fsdp in ((2, 1), (-1, 2), (1, 3)):
    with pytest.raises(ValueError, match="does not cover the 1 devices exactly"):
      sharding.make_mesh(data, fsdp, devices=device)
  for data, fsdp in ((-1, -1), (0, 1), (-2, 1)):
    with pytest.raises(ValueError, match="give positive sizes"):
      sharding.make_mesh(data, fsdp, devices=device)


def test_one_device_replicates_everything():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert {s.spec for s in jax.tree.leaves(sharding.state_shardings(mesh, state()))} == {P()}


def test_a_rule_without_effect_or_with_a_wrong_spec_fails():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=r"mesh\.rules: rules that match no array: \['/clip/'\]"):
    sharding.check_rules(state(), (("/clip/", ("fsdp",)),))
  with pytest.raises(ValueError, match=r"rules that never apply .*: '/unet/' behind '', '/unet/a' behind ''"):
    sharding.check_rules(state(), ((r"", ()), ("/unet/", ("fsdp",)), ("/unet/a", ())))
  with pytest.raises(ValueError, match=r"does not fit neck/b/bias of shape \(8,\)"):
    sharding.state_shardings(mesh, state(), rules=(("/neck/", (None, "fsdp")),))
  with pytest.raises(ValueError, match=r"names the axes \['model'\]"):
    sharding.state_shardings(mesh, state(), rules=(("/neck/", ("model",)),))


@pytest.mark.multidevice
def test_moments_lie_where_their_parameters_lie():
  mesh = sharding.make_mesh(fsdp=4)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
  placed = sharding.state_shardings(mesh, jax.eval_shape(state))
  adam = placed.opt_state[1]
  assert placed.params["method/unet/a/kernel"].spec == P(None, "fsdp")
  assert placed.frozen["method/vae/c/kernel"].spec == P("fsdp")
  assert placed.params == adam.mu == adam.nu
  assert {s.spec for s in (placed.step, adam.count, placed.stats["head/bn/mean"])} == {P()}
  moved = jax.jit(state, out_shardings=placed)()
  assert moved.opt_state[1].mu["method/unet/a/kernel"].addressable_shards[0].data.shape == (512, 256)


@pytest.mark.multidevice
def test_a_rule_goes_before_the_default_and_holds_for_moments():
  mesh = sharding.make_mesh(fsdp=4)
  placed = sharding.state_shardings(mesh, jax.eval_shape(state), rules=(("/unet/", ("fsdp",)), (r"kernel$", ())))
  assert placed.params["method/unet/a/kernel"].spec == placed.opt_state[1].nu["method/unet/a/kernel"].spec == P("fsdp")
  assert placed.frozen["method/vae/c/kernel"].spec == P()
  with pytest.raises(ValueError, match="split only axes that divide"):
    sharding.state_shardings(mesh, jax.eval_shape(lambda: state((6, 1024))), rules=(("/unet/", ("fsdp",)),))


@pytest.mark.multidevice
def test_a_batch_is_split_over_all_devices():
  batch = jax.device_put(jnp.zeros((16, 2)), sharding.batch_sharding(sharding.make_mesh(fsdp=2)))
  assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 2)] * 8


def test_checksums_tell_arrays_of_any_type_and_shape_apart():
  for kind in (np.float32, np.int32, np.bool_, ml_dtypes.bfloat16):
    zero, one = np.zeros((), kind), np.ones((), kind)
    assert sharding._checksum(zero) == sharding._checksum(jnp.asarray(zero)) != sharding._checksum(one)
    matrix = np.arange(6).reshape(2, 3).astype(kind)
    assert sharding._checksum(matrix.T) == sharding._checksum(np.ascontiguousarray(matrix.T))


def test_dicts_are_emptied_while_their_arrays_are_placed():
  arrays = {"params": {"a": np.ones(3, np.float32), "b": np.zeros((2, 2), np.int32)}, "step": np.zeros((), np.int32)}
  where = sharding.replicated(sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
  placed = sharding.place(arrays, {"params": {"a": where, "b": where}, "step": where}, emptied=True)
  assert arrays == {} and placed["params"]["b"].shape == (2, 2) and placed["step"].sharding == where
  np.testing.assert_array_equal(placed["params"]["a"], 1)
