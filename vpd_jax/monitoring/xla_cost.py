"""What a program costs: floating point operations of a traced one, memory and collectives of a compiled one."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vpd_jax.monitoring import chips

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NO_MODEL = ("_resize",)  # jax.image.resize: it interpolates by products with matrices
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16}  # a name with a number of bits says the rest
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_LOOP = re.compile(r"\bwhile\(.*\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, Any] | None:
  """Of the training step. On CPU alone XLA drops the barriers that keep recomputed activations (backbone.remat) from
  being merged with the first ones, and so saves nothing."""
  return {"xla_disable_hlo_passes": "cse_barrier_expander"} if mesh.devices.flat[0].platform == "cpu" else None


class Memory(NamedTuple):
  """Bytes on one device, by the compiler's account.

  Attributes:
    arguments: state and batch that go in.
    aliased: of them, those whose memory the results take over.
    temporaries: everything in between: activations, gradients, workspace.
    peak: the most at any time; where the compiler does not say, arguments + results - aliased + temporaries.
  """

  arguments: int
  aliased: int
  temporaries: int
  peak: int


def memory(compiled: jax.stages.Compiled) -> Memory | None:
  """None where the compiler gives no account."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
  total = arguments + analysis.output_size_in_bytes - analysis.alias_size_in_bytes + temporaries
  # On CPU the reported peak leaves the temporaries out.
  peak = max(getattr(analysis, "peak_memory_in_bytes", 0), arguments + temporaries) or total
  return Memory(arguments, analysis.alias_size_in_bytes, temporaries, max(peak, total))


def memory_summary(compiled: jax.stages.Compiled) -> str:
  """XLA's own account of a program's memory."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return "unknown memory"
  total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
  return (
    f"{(total - analysis.alias_size_in_bytes) / 2**30:.2f} GiB ({analysis.temp_size_in_bytes / 2**30:.2f} temporary)"
  )


def costs(compiled: jax.stages.Compiled, device_kind: str = "") -> dict[str, float]:
  """The compiler's "flops", "bytes accessed" and "optimal_seconds" on one device, as far as it tells them.

  The body of a loop counts once, and a kernel that is called by name, such as fused attention, may not count.
  """
  found = compiled.cost_analysis() or {}
  told = {name: float(found[name]) for name in ("flops", "bytes accessed") if found.get(name, 0) > 0}
  seconds = whole_seconds(float(found.get("optimal_seconds", 0)), told.get("bytes accessed", 0), chips.of(device_kind))
  return told | ({"optimal_seconds": seconds} if seconds > 0 else {})


def whole_seconds(seconds: float, traffic: float, chip: chips.Chip | None) -> float:
  """XLA's estimate of a program's time with the seconds given back that it took off.

  Each kernel of whose cost it knows nothing counts as -1 second. No program is quicker than its memory traffic, so the
  seconds that are missing there are given back: right where it is less than a second slower than that.

  Args:
    seconds: the estimate; 0 where there is none.
    traffic: bytes to and from memory.
    chip: whose memory it is; None gives nothing back.
  """
  if not seconds or chip is None:
    return seconds
  least = 0.9 * traffic / chip.bandwidth  # the compiler's bandwidth is not quite the maker's
  return seconds + max(0, math.ceil(least - seconds))


def rates(seconds: float, flops: float, model: float) -> dict[str, float]:
  """What a step that took so long says of the devices, as scalars: operations a second, share of the peak, memory.

  Args:
    seconds: of a step.
    flops: of it on one device, by the compiler's count.
    model: of it on one device, by `model_flops`; 0 where nobody counted.

  Returns:
    "perf/tflops_per_sec_per_chip"; "perf/share_of_peak" of chips that the table of chips.py holds;
    "perf/peak_memory_gib" of devices that tell.
  """
  device = jax.local_devices()[0]
  share = chips.share_of_peak(model / seconds, device.device_kind) if model else None
  peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
  found = {
    "perf/tflops_per_sec_per_chip": flops / seconds / 1e12,
    "perf/share_of_peak": share,
    "perf/peak_memory_gib": peak and peak / 2**30,
  }
  return {name: value for name, value in found.items() if value is not None}


def text(compiled: jax.stages.Compiled) -> str:
  """The compiled program in words; empty where jaxlib cannot read it, as of a newer libtpu's."""
  try:
    return compiled.as_text() or ""
  except jax.errors.JaxRuntimeError:
    return ""


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """How often each kind of collective runs on one device, and the bytes of its results there.

  Args:
    text: of a compiled program, see `text`. The body of a loop counts as often as it runs, where the program
      says how often; else once.

  Returns:
    {kind: (number, bytes)} of the kinds of COLLECTIVES that occur. An all-gather's result is the whole array, an
    all-reduce's one is as large as what goes in.
  """
  times = _times(text)
  found: dict[str, tuple[int, int]] = {}
  here = ""
  for line in text.splitlines():
    if header := _COMPUTATION.match(line.strip()):
      here = header[1]
    elif operation := _OPERATION.search(line):
      shapes, kind, begun = operation.groups()
      number, size = found.get(kind, (0, 0))
      count = times.get(here, 1)
      found[kind] = number + count, size + count * _result_bytes(shapes, kind, bool(begun))
  return found


def _result_bytes(shapes: str, kind: str, begun: bool) -> int:
  """Bytes of the results; the first half of an asynchronous operation also names what goes in."""
  sizes = [
    _bytes(dtype) * math.prod(map(int, filter(None, sides.split(",")))) for dtype, sides in _SHAPE.findall(shapes)
  ]
  if begun and kind == "collective-permute":
    return sizes[1]  # what goes in, what comes out, and two numbers of the machinery
  if begun and kind != "all-reduce":
    return sum(sizes[len(sizes) // 2 :])
  return sum(sizes)


def _bytes(dtype: str) -> int:
  bits = re.search(r"\d+", dtype)
  return _BYTES.get(dtype) or max(int(bits[0]) // 8 if bits else 0, 1)


def _times(text: str) -> dict[str, int]:
  """How often the computations run that are loops' bodies, or called from one."""
  here, called, loops = "", {}, {}
  for line in text.splitlines():
    if header := _COMPUTATION.match(line.strip()):
      here = header[1]
      continue
    loop, trips = _LOOP.search(line), _TRIPS.search(line)
    if loop:
      loops[loop[1]] = int(trips[1]) if trips else 1
    for several, one in _CALLED.findall(line):
      called.update({name.strip(" %"): here for name in (several or one).split(",")})

  def times(name: str) -> int:
    return loops.get(name, 1) * (times(called[name]) if name in called else 1)

  return {name: times(name) for name in called}


def model_flops(function: Callable[..., Any], *arguments: Any) -> float:
  """Floating point operations of all matrix products and convolutions, 2 per multiplication.

  Counted in the traced program, so the same on every device. Elementwise work and interpolation do not count, nor do
  the zeros that the gradient of a strided convolution is spread with. What is recomputed (remat, chunked attention)
  counts again, and a kernel in Pallas does not: count a program without them.

  Args:
    function: to be traced.
    *arguments: arrays or ShapeDtypeStructs.
  """
  return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> float:
  return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: Any) -> float:
  name, given = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = given["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    spec = given["dimension_numbers"].rhs_spec  # (output channels, input channels of a group, sides...)
    taps = math.prod(kernel[axis] for axis in spec[1:])
    return 2.0 * equation.outvars[0].aval.size * taps / math.prod(given["lhs_dilation"])
  if given.get("name") in _NO_MODEL:
    return 0.0
  inner = [_jaxpr_flops(part) for part in _inner(given)]
  if name == "cond":
    return max(inner)
  return sum(inner) * (given["length"] if name == "scan" else 1)


def _inner(given: dict[str, Any]) -> list[Any]:
  """The programs an operation runs."""
  values = [v for value in given.values() for v in (value if isinstance(value, tuple | list) else (value,))]
  return [getattr(v, "jaxpr", v) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]
