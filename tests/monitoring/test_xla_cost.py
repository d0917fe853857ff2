"""Operations, memory and collectives of programs, against numbers known by hand."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vpd_jax.distributed import sharding
from vpd_jax.monitoring import chips, xla_cost

HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body.7 (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %all-gather.2 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=1, dimensions={0}
  ROOT %t = (s32[], bf16[8,4]) tuple(%i, %all-gather.2)
}

%cond.7 (state: (s32[], bf16[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main.9 (a: f32[2,4]) -> f32[2,4] {
  %ar = (f32[2,4]{1,0}, f32[]) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %ags = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%a), channel_id=3, dimensions={0}
  %agd = f32[8,4]{1,0} all-gather-done(%ags)
  %cps = (f32[2,4]{1,0}, f32[2,4]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %w = (s32[], bf16[8,4]) while(%init), condition=%cond.7, body=%body.7, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %a2a = f32[2,4]{1,0} all-to-all(%ar), channel_id=4, dimensions={0}
}
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
  assert xla_cost.collectives(HLO) == {
    "all-reduce": (1, 4 * 8 + 4),
    "all-gather": (1 + 5, 4 * 32 + 5 * 2 * 32),  # the loop runs five times; "-done" is no second one
    "collective-permute": (1, 4 * 8),
    "all-to-all": (1, 4 * 8),
  }


@pytest.mark.multidevice
def test_collectives_of_a_compiled_program():
  mesh = sharding.make_mesh(2, 4)
  rows, weights = (
    jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    for spec in (P(("data", "fsdp")), P(None, "fsdp"))
  )
  gathered = lambda x, w: x @ jax.lax.with_sharding_constraint(w.T[:, :16], NamedSharding(mesh, P()))
  spread = jax.jit(gathered, out_shardings=NamedSharding(mesh, P(("data", "fsdp"))))
  found = xla_cost.collectives(spread.lower(rows, weights).compile().as_text())
  assert found == {"all-gather": (1, 64 * 16 * 4)}


def arrays(*shapes):
  return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def test_operations_of_products_with_their_gradients():
  product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b).sum()
  a, b = arrays((3, 4, 5), (3, 5, 7))
  assert xla_cost.model_flops(product, a, b) == 2 * 3 * 4 * 5 * 7
  assert xla_cost.model_flops(jax.grad(product, argnums=(0, 1)), a, b) == pytest.approx(3 * 2 * 3 * 4 * 5 * 7)


@pytest.mark.parametrize("stride, side", [(1, 8), (2, 4)])
def test_operations_of_convolutions_with_their_gradients(stride, side):
  def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers)

  x, kernel = arrays((2, 8, 8, 3), (3, 3, 3, 5))
  one = 2 * 2 * side * side * 9 * 3 * 5
  assert xla_cost.model_flops(convolve, x, kernel) == one
  gradients = jax.grad(lambda x, kernel: convolve(x, kernel).sum(), argnums=(0, 1))
  # Both gradients cost what the convolution does: the zeros between the strides do not count.
  assert xla_cost.model_flops(gradients, x, kernel) == pytest.approx(3 * one)


def test_a_loop_counts_as_often_as_it_runs_and_a_branch_once():
  def loop(x):
    return jax.lax.scan(lambda c, _: (jax.checkpoint(jnp.dot)(c, x), None), x, length=7)[0]

  (x,) = arrays((4, 4))
  assert xla_cost.model_flops(jax.jit(loop), x) == 7 * 2 * 64
  either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)
  assert xla_cost.model_flops(either, x) == 2 * 2 * 64


def test_interpolation_is_no_work_of_the_model():
  bigger = lambda x: (jax.image.resize(x, (1, 8, 8, 3), "linear") ** 2).sum()
  assert xla_cost.model_flops(jax.grad(bigger), *arrays((1, 4, 4, 3))) == 0


def test_memory_counts_what_goes_in_and_what_is_between():
  work = jax.jit(lambda x: jnp.sin(x @ x) @ x, donate_argnums=0)
  memory = xla_cost.memory(work.lower(*arrays((256, 256))).compile())
  assert memory.arguments == memory.aliased == 256 * 256 * 4
  assert memory.peak >= memory.arguments + memory.temporaries > memory.arguments


@pytest.mark.parametrize(
  "kind, name",
  [
    ("TPU v4", "TPU v4"),
    ("TPU v5 lite", "TPU v5e"),
    ("TPU v5", "TPU v5p"),
    ("TPU v6 lite", "TPU v6e"),
    ("NVIDIA H200", "H200"),
    ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
    ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
    ("NVIDIA L4", "L4"),
    ("Tesla T4", "T4"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("Tesla V100-SXM2-16GB", "V100"),
  ],
)
def test_every_chip_is_found_under_the_name_it_gives_itself(kind, name):
  assert chips.chip_for(kind).name == name


def test_an_unknown_device_has_no_peak():
  assert chips.chip_for("cpu") is None and chips.share_of_peak(1e12, "NVIDIA L40S") is None
  assert chips.share_of_peak(98.5e12, "TPU v5 lite") == pytest.approx(0.5)


def test_rates_of_a_step_tell_what_the_device_does(monkeypatch):
  found = xla_cost.rates(0.5, 1e12, 0)
  assert found == {"perf/tflops_per_sec_per_chip": 2}  # a CPU knows neither its peak nor its memory
  device = types.SimpleNamespace(device_kind="NVIDIA H200", memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30})
  monkeypatch.setattr(xla_cost.jax, "local_devices", lambda: [device])
  found = xla_cost.rates(0.5, 1e12, 989e12 / 4)
  assert found == {"perf/tflops_per_sec_per_chip": 2, "perf/share_of_peak": 0.5, "perf/peak_memory_gib": 3}


@pytest.mark.parametrize(
  "seconds, traffic, expected",
  [
    (0.25, 0.2 * 819e9, 0.25),  # nothing is missing
    (-2.75, 0.2 * 819e9, 0.25),  # three kernels of unknown cost
    (-0.5, 1.2 * 819e9, 1.5),
    (0.3, 1.2 * 819e9, 1.3),
    (0.0, 1e9, 0.0),  # no estimate at all
  ],
)
def test_seconds_that_the_compiler_took_off_are_given_back(seconds, traffic, expected):
  v5e = chips.chip_for("TPU v5 lite")
  assert xla_cost.corrected_seconds(seconds, traffic, v5e) == pytest.approx(expected)
  assert xla_cost.corrected_seconds(seconds, traffic, None) == seconds
