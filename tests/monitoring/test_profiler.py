"""A trace of steps, and the slowest operations in it."""

import types

import jax
import jax.numpy as jnp
import pytest

from vpd_jax.monitoring import profiler as trace_lib


def square(x):
  return jnp.tanh(x @ x).sum()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  """The lines of a Profiler of two of 13 steps, and its folder."""
  lines, folder = [], tmp_path_factory.mktemp("trace")
  x, last = jnp.ones((256, 256)), None
  step = jax.jit(jax.grad(square)).lower(x).compile()
  with trace_lib.Profiler(2, str(folder), lines.append, step.as_text) as trace:
    for number in range(1, 14):
      trace.on_step_start(number, last)
      last = step(x)
  return lines, folder


def test_a_trace_covers_the_steps_asked_for(told):
  lines, folder = told
  assert len(list(folder.glob("plugins/profile/*/*.xplane.pb"))) == 1
  assert lines[0] == f"a trace of 2 steps is in {folder}/plugins/profile" and len(lines) == 2


def test_it_reports_the_slowest_operations(told):
  lines, folder = told
  table = lines[1].splitlines()
  assert table[0] == f"the {len(table) - 1} slowest operations, as a share of the time of all:"
  assert "f32[256,256] dot_general" in lines[1] and "f32[256,256] backward dot_general" in lines[1]
  found = trace_lib.slowest_ops(str(folder), 2, count=100)
  times = [operation.milliseconds for operation in found]
  assert times == sorted(times, reverse=True) and min(times) >= 0
  assert sum(operation.share for operation in found) == pytest.approx(1)
  assert trace_lib.slowest_ops(str(folder), 1, count=1)[0].milliseconds == pytest.approx(2 * times[0])


def test_a_trace_that_is_cut_short_is_written_all_the_same(tmp_path):
  lines = []
  with trace_lib.Profiler(2, str(tmp_path), lines.append) as trace:
    for step in range(1, 12):
      trace.on_step_start(step)
  assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
  assert lines == [f"a trace of fewer than 2 steps is in {tmp_path}/plugins/profile"]


def test_a_run_too_short_for_a_trace_says_so(tmp_path):
  lines = []
  with trace_lib.Profiler(2, str(tmp_path), lines.append) as trace:
    for step in range(1, 10):
      trace.on_step_start(step)
  assert lines == ["config.profile=2: no trace, because fewer than 10 steps were left"]


def test_no_trace_without_being_asked(tmp_path):
  lines = []
  with trace_lib.Profiler(0, str(tmp_path), lines.append) as trace:
    for step in range(1, 14):
      trace.on_step_start(step)
  assert not lines and not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match="there is no trace below"):
    trace_lib.slowest_ops(str(tmp_path), 1)


def plane(name, **lines):
  """A plane of a trace: lines of (name, milliseconds, stats) events."""
  event = lambda word, ms, **stats: types.SimpleNamespace(name=word, duration_ns=ms * 1e6, stats=stats.items())
  return types.SimpleNamespace(
    name=name,
    lines=[
      types.SimpleNamespace(name=line.replace("_", " "), events=[event(*e[:2], **e[2]) for e in events])
      for line, events in lines.items()
    ],
  )


def test_kernels_of_a_gpu_count_by_the_operation_they_belong_to(monkeypatch, tmp_path):
  gpu = {
    "Stream_7": [("sm90_gemm", 3, {"hlo_op": "dot.1"}), ("sm90_epilogue", 1, {"hlo_op": "dot.1"})],
    "Stream_8": [("MemcpyH2D", 2, {})],
    "Steps": [("step", 9, {})],
  }
  planes = [plane("/host:CPU", python=[("dot.1", 50, {"hlo_op": "dot.1"})])]
  planes += [plane(f"/device:GPU:{i}", **gpu) for i in range(2)]
  found = _slowest_of(planes, monkeypatch, tmp_path)
  assert [(o.name, o.milliseconds) for o in found] == [("dot.1", 4), ("MemcpyH2D", 2)]
  assert found[0].share == pytest.approx(2 / 3)


def test_operations_of_a_tpu_are_those_of_their_own_line(monkeypatch, tmp_path):
  tpu = {"XLA_Ops": [("%fusion.3 = bf16[8]{0} fusion(%a)", 5, {})], "XLA_Modules": [("jit_step", 6, {})]}
  found = _slowest_of([plane("/device:TPU:0", **tpu)], monkeypatch, tmp_path)
  assert [(o.name, o.milliseconds, o.share) for o in found] == [("fusion.3", 5, 1)]


def _slowest_of(planes, monkeypatch, folder):
  written = folder / "plugins" / "profile" / "now" / "host.xplane.pb"
  written.parent.mkdir(parents=True)
  written.write_bytes(b"")
  data = types.SimpleNamespace(from_serialized_xspace=lambda _: types.SimpleNamespace(planes=planes))
  monkeypatch.setattr(trace_lib.jax.profiler, "ProfileData", data)
  return trace_lib.slowest_ops(str(folder), 1)
