"""Cost of programs: operations of traced ones, memory and collectives of compiled ones."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vpd_jax.monitoring import chips
from vpd_jax.types import Fields

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_MODEL = ("_resize",)  # jax.image.resize and that of clip_image.py, which interpolate with matrix products
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16}  # other sizes are part of the name
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_LOOP = re.compile(r"\bwhile\(.*\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")


def compiler_options(mesh: jax.sharding.Mesh) -> Fields | None:
  """Compiler options of the training step.

  On CPU, XLA drops the barriers that keep recomputed activations (backbone.remat) from being merged with the original
  ones, so that recomputation would save no memory.
  """
  return {"xla_disable_hlo_passes": "cse_barrier_expander"} if mesh.devices.flat[0].platform == "cpu" else None


class Memory(NamedTuple):
  """Bytes on one device, as reported by the compiler.

  Attributes:
    arguments: state and batch.
    aliased: donated arguments, whose memory the results reuse.
    temporaries: activations, gradients, workspace.
    peak: at any time; at least arguments + temporaries + results - aliased.
  """

  arguments: int
  aliased: int
  temporaries: int
  peak: int


def memory(compiled: jax.stages.Compiled) -> Memory | None:
  """The memory of a compiled program; None if the compiler does not report it."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
  aliased = analysis.alias_size_in_bytes
  total = arguments + temporaries + analysis.output_size_in_bytes - aliased
  # On CPU the reported peak does not include the temporaries.
  peak = max(getattr(analysis, "peak_memory_in_bytes", 0), arguments + temporaries, total)
  return Memory(arguments, aliased, temporaries, peak)


def memory_summary(compiled: jax.stages.Compiled) -> str:
  """The memory of a compiled program in one phrase."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return "unknown memory"
  total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
  return (
    f"{(total - analysis.alias_size_in_bytes) / 2**30:.2f} GiB ({analysis.temp_size_in_bytes / 2**30:.2f} temporary)"
  )


def costs(compiled: jax.stages.Compiled, device_kind: str = "") -> dict[str, float]:
  """The compiler's "flops", "bytes accessed" and "optimal_seconds" on one device, as far as reported.

  The body of a loop is counted once; kernels in custom calls, such as fused attention, may not be counted.
  """
  analysis = compiled.cost_analysis() or {}
  reported = {name: float(analysis[name]) for name in ("flops", "bytes accessed") if analysis.get(name, 0) > 0}
  seconds = corrected_seconds(
    float(analysis.get("optimal_seconds", 0)), reported.get("bytes accessed", 0), chips.chip_for(device_kind)
  )
  return reported | ({"optimal_seconds": seconds} if seconds > 0 else {})


def corrected_seconds(seconds: float, traffic: float, chip: chips.Chip | None) -> float:
  """XLA's estimate of the time of a program, corrected for kernels of unknown cost.

  XLA counts each such kernel as -1 second. A program takes at least as long as its memory traffic; whole seconds are
  added until the estimate does. This is exact if the program takes less than a second more than its traffic.

  Args:
    seconds: the estimate; 0 if there is none.
    traffic: bytes to and from memory.
    chip: that runs the program; None: no correction.
  """
  if not seconds or chip is None:
    return seconds
  least = 0.9 * traffic / chip.bandwidth  # the compiler assumes slightly more bandwidth than the vendor states
  return seconds + max(0, math.ceil(least - seconds))


def rates(seconds: float, flops: float, model: float) -> dict[str, float]:
  """Utilization of the devices as scalars: operations per second, share of the peak, memory.

  Args:
    seconds: of a step.
    flops: of a step on one device, as counted by the compiler.
    model: of a step on one device, by `model_flops`; 0 if not counted.

  Returns:
    "perf/tflops_per_sec_per_chip"; "perf/share_of_peak" for chips in chips.CHIPS;
    "perf/peak_memory_gib" for devices that report it.
  """
  device = jax.local_devices()[0]
  share = chips.share_of_peak(model / seconds, device.device_kind) if model else None
  peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
  scalars = {
    "perf/tflops_per_sec_per_chip": flops / seconds / 1e12,
    "perf/share_of_peak": share,
    "perf/peak_memory_gib": peak and peak / 2**30,
  }
  return {name: value for name, value in scalars.items() if value is not None}


def text(compiled: jax.stages.Compiled) -> str:
  """The compiled program as text; empty if jaxlib cannot read it, e.g. from a newer libtpu."""
  try:
    return compiled.as_text() or ""
  except jax.errors.JaxRuntimeError:
    return ""


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Number and result bytes of each kind of collective on one device.

  Args:
    text: of a compiled program, see `text`. The body of a loop is counted once per iteration if the program states
      the number of iterations, else once.

  Returns:
    {kind: (number, bytes)} for the kinds of COLLECTIVES that occur. The result of an all-gather is the full array,
    that of an all-reduce has the size of its input.
  """
  times = _times(text)
  totals: dict[str, tuple[int, int]] = {}
  computation = ""
  for line in text.splitlines():
    if header := _COMPUTATION.match(line.strip()):
      computation = header[1]
    elif operation := _OPERATION.search(line):
      shapes, kind, begun = operation.groups()
      number, size = totals.get(kind, (0, 0))
      count = times.get(computation, 1)
      totals[kind] = number + count, size + count * _result_bytes(shapes, kind, bool(begun))
  return totals


def _result_bytes(shapes: str, kind: str, begun: bool) -> int:
  """Bytes of the results; the start of an asynchronous operation also lists its inputs."""
  sizes = [
    _bytes(dtype) * math.prod(map(int, filter(None, sides.split(",")))) for dtype, sides in _SHAPE.findall(shapes)
  ]
  if begun and kind == "collective-permute":
    return sizes[1]  # input, result, two context values
  if begun and kind != "all-reduce":
    return sum(sizes[len(sizes) // 2 :])
  return sum(sizes)


def _bytes(dtype: str) -> int:
  bits = re.search(r"\d+", dtype)
  return _BYTES.get(dtype) or max(int(bits[0]) // 8 if bits else 0, 1)


def _times(text: str) -> dict[str, int]:
  """Number of runs of each computation that is the body of a loop or called from one."""
  computation, called, loops = "", {}, {}
  for line in text.splitlines():
    if header := _COMPUTATION.match(line.strip()):
      computation = header[1]
      continue
    loop, trips = _LOOP.search(line), _TRIPS.search(line)
    if loop:
      loops[loop[1]] = int(trips[1]) if trips else 1
    for several, one in _CALLED.findall(line):
      called.update({name.strip(" %"): computation for name in (several or one).split(",")})

  def times(name: str) -> int:
    return loops.get(name, 1) * (times(called[name]) if name in called else 1)

  return {name: times(name) for name in called}


def model_flops(function: Callable[..., Any], *arguments: object) -> float:
  """Floating point operations of all matrix products and convolutions, 2 per multiplication.

  Counted in the traced program, hence the same on all devices. Elementwise operations and interpolation are not
  counted, nor are the zeros between the elements in the gradient of a strided convolution. Recomputed operations
  (remat, chunked attention) are counted again, and Pallas kernels are not: count a program without them.

  Args:
    function: to be traced.
    *arguments: arrays or ShapeDtypeStructs.
  """
  return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> float:
  return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    spec = params["dimension_numbers"].rhs_spec  # (output channels, input channels of a group, sides...)
    taps = math.prod(kernel[axis] for axis in spec[1:])
    return 2.0 * equation.outvars[0].aval.size * taps / math.prod(params["lhs_dilation"])
  if params.get("name") in _NO_MODEL:
    return 0.0
  inner = [_jaxpr_flops(part) for part in _inner(params)]
  if name == "cond":
    return max(inner)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def _inner(params: Fields) -> list[Any]:
  """The jaxprs that an equation runs."""
  values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
  return [getattr(v, "jaxpr", v) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]
