"""Speed and memory of a config's training step, and of what one would take in its place.

python scripts/benchmark.py --config=configs/nyu_depth.py:vpd --synthetic --batch=24 --config.dtype=bfloat16 \
    [--steps=30] [--forward] [--versus=torch] [--top=10] [--json=FILE] [--report=WORK] [--config.mesh.fsdp=8 ...]

Prints compile seconds, step time (median, p95), images and model TFLOP per second and chip, share of the chip's peak,
peak memory, and the time a step waits for its input. Batches are read from the config's data set, or generated with
--synthetic, which needs no files. The step is the same as that of a run: precomputed latents and text states are inputs
where the run caches them. Weights are random, since they do not affect the time. --top traces three more steps and
prints the slowest operations. --versus=torch first runs the same work with benchmarks/torch_depth.py on the same
device, in a separate process, and prints the ratio. --report=nyu_vpd writes all of it, with the command, commit and
versions, to benchmarks/results/nyu_vpd_<device>_<date>.md.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmark_page
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.data import pipeline
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError, one_line
from vpd_jax.evaluation import encoder_cache, evaluate
from vpd_jax.experiment import Experiment
from vpd_jax.files import atomic
from vpd_jax.monitoring import chips, profiler, xla_cost
from vpd_jax.planning import plan
from vpd_jax.training import compilation, session

FLAGS = flags.FlagValues()  # separate, because vpd_jax.main has flags of the same names
CONFIG = config_flags.DEFINE_config_file("config", None, "config file and words", flag_values=FLAGS)
BATCH = flags.DEFINE_integer(
  "batch", 0, "images, all devices together; 0: config.data.batch_size", lower_bound=0, flag_values=FLAGS
)
STEPS = flags.DEFINE_integer("steps", 30, "number of timed steps", lower_bound=2, flag_values=FLAGS)
WARM_UP = flags.DEFINE_integer("warm_up", 3, "number of steps before", lower_bound=1, flag_values=FLAGS)
SYNTHETIC = flags.DEFINE_bool("synthetic", False, "batches of noise, in place of the data set", flag_values=FLAGS)
FORWARD = flags.DEFINE_bool("forward", False, "also the forward pass alone", flag_values=FLAGS)
VERSUS = flags.DEFINE_enum("versus", "", ["", "torch"], "implementation to compare with", flag_values=FLAGS)
COMPILE = flags.DEFINE_enum(
  "torch_compile", "auto", ["auto", "on", "off"], "torch.compile; auto: on a GPU", flag_values=FLAGS
)
TOP = flags.DEFINE_integer("top", 0, "number of slowest operations to print", lower_bound=0, flag_values=FLAGS)
REPORT = flags.DEFINE_string("report", "", "name of a page in benchmarks/results", flag_values=FLAGS)
JSON = flags.DEFINE_string("json", "", "file for the numbers", flag_values=FLAGS)

Result = dict[str, Any]


def timed(work: Callable[[Any], Any], batches: Iterator[Any], steps: int, warm_up: int) -> list[float]:
  """Milliseconds between the ends of consecutive calls, after the warm-up; the device is never idle."""
  times, last, before = [], None, None
  for _ in range(warm_up + steps + 1):
    result = work(next(batches))
    if before is not None:
      jax.block_until_ready(before)
      now = time.perf_counter()
      times.append(1e3 * (now - last) if last else 0.0)
      last = now
    before = result
  jax.block_until_ready(before)
  return times[warm_up:]


def random_state(config: ConfigDict, exp: Experiment, mesh: Any) -> Any:
  """A random TrainState on the mesh that preserves the scale of activations."""
  shapes, where = initialize.state_shapes(config, exp), initialize.state_shardings(config, exp, mesh)
  block = np.random.default_rng(0).standard_normal(2**16).astype(np.float32)

  def value(name: str, x: Any) -> np.ndarray:
    if len(x.shape) < 2:
      return np.full(x.shape, 0 if name.endswith(("bias", "mean")) else 1, x.dtype)
    return (np.resize(block, x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype(x.dtype)

  def place(named: Any, target: Any) -> Any:
    return {name: jax.device_put(value(name, x), target[name]) for name, x in named.items()}

  params, frozen, stats = (place(getattr(shapes, part), getattr(where, part)) for part in ("params", "frozen", "stats"))
  opt_state = jax.jit(exp.optimizer.init, out_shardings=where.opt_state)(params)
  ema = place(shapes.ema, where.ema) if shapes.ema else None
  step = jax.device_put(np.zeros((), np.int32), where.step)
  return shapes.replace(step=step, params=params, frozen=frozen, stats=stats, opt_state=opt_state, ema=ema)


def step_shapes(config: ConfigDict, exp: Experiment) -> dict[str, Any]:
  """The batch of a training step of this config, as ShapeDtypeStructs."""
  return encoder_cache.encoded_batch_shapes(config, exp, plan.step_shapes(config, exp, "train"))[0]


def synthetic_batch(config: ConfigDict, exp: Experiment, mesh: Any) -> dict[str, Any]:
  """A batch on the mesh: noise, depth of 0.5 to 9.5 m, classes 0 and 1."""
  rng, batch = np.random.default_rng(0), {}
  for key, x in step_shapes(config, exp).items():
    if np.issubdtype(x.dtype, np.integer):
      batch[key] = rng.integers(0, 256 if key == "image" else 2, x.shape, x.dtype)
    elif key in encoder_cache.ENCODERS:
      batch[key] = rng.standard_normal(x.shape, np.float32).astype(x.dtype)
    else:
      batch[key] = rng.uniform(0.5, 9.5, x.shape).astype(x.dtype)
    if key == "valid_size":
      batch[key] = np.broadcast_to(np.array(config.data.crop, x.dtype), x.shape)
  return pipeline.to_mesh(batch, sharding.batch_sharding(mesh))


def read(config: ConfigDict, exp: Experiment, mesh: Any, state: Any) -> pipeline.Prefetch:
  """The training batches of a run."""
  dataset = experiment.dataset(config, exp)
  encodings = encoder_cache.EncoderCache(config, exp, dataset, mesh)
  return session.training_batches(config, exp, dataset, mesh, 0, lambda local: encodings(local, state.frozen))


def slowest(step: Callable[[Any], Any], batches: Iterator[Any], text: str, steps: int = 3) -> list[dict[str, Any]]:
  """The slowest operations of `steps` steps, see profiler.Operation."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        result = step(next(batches))
      jax.block_until_ready(result)
    return [operation._asdict() for operation in profiler.slowest_ops(folder, steps, text, TOP.value)]


def ours(config: ConfigDict) -> Result:
  """Times and memory of the step that `train.run` compiles, on the devices at hand; see `report`."""
  exp = experiment.assemble(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  state = random_state(config, exp, mesh)
  input_ = None if SYNTHETIC.value else read(config, exp, mesh, state)
  batch = next(input_) if input_ else synthetic_batch(config, exp, mesh)
  again = iter(lambda: batch, None)
  result: Result = {"side": f"vpd_jax, jax {jax.__version__}, attention {config.backbone.attention}"}
  result |= {"device": jax.devices()[0].device_kind, "devices": mesh.size, "mesh": dict(mesh.shape)}
  if FORWARD.value:
    weights = state.params, state.frozen, state.stats
    forward = evaluate.on_mesh(evaluate.make_scores(exp), config, exp, mesh)
    forward = jax.jit(forward).lower(weights, batch).compile()
    times = timed(lambda b: forward(weights, b), again, STEPS.value, WARM_UP.value)
    result["forward_ms"] = statistics.median(times)
    del forward, weights  # their memory is donated to the step
  begin = time.perf_counter()
  compiled = compilation.compile_step(config, exp, mesh, batch)
  result["compile_s"] = time.perf_counter() - begin
  losses = []

  def step(batch: Any) -> Any:
    nonlocal state
    state, logs = compiled(state, batch)
    losses.append(logs["train/loss"])
    return losses[-1]

  result["step_times_ms"] = timed(step, input_ or again, STEPS.value, WARM_UP.value)
  if input_:
    result["input_wait_ms"] = input_.mean_wait_ms()
  if TOP.value:
    result["longest"] = slowest(step, input_ or again, xla_cost.text(compiled))
  if input_:
    input_.close()
  memory, used = xla_cost.memory(compiled), jax.local_devices()[0].memory_stats() or {}
  return result | {
    "losses": [float(loss) for loss in losses],
    "peak_bytes": used.get("peak_bytes_in_use"),
    "compiler_peak_bytes": memory.peak if memory else None,
    "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    "trained_parameters": sum(x.size for x in state.params.values()),
  }


def with_rates(result: Result, batch: int, flops: float) -> Result:
  """Adds the numbers that are computed from the step times."""
  times, devices = result["step_times_ms"], result.get("devices", 1)
  median = statistics.median(times)
  rate = flops / devices / median * 1e3
  return result | {
    "batch": batch,
    "step_ms": median,
    "step_ms_p95": float(np.percentile(times, 95)),
    "images_per_sec_per_chip": batch / devices / median * 1e3,
    "model_tflop_per_image": flops / batch / 1e12,
    "model_tflops_per_sec_per_chip": rate / 1e12,
    "share_of_peak": chips.share_of_peak(rate, result["device"]),
  }


def torch_side(config: ConfigDict) -> Result:
  """The same work in PyTorch, in a separate process."""
  settings = {"config": config.to_dict(), "batch": config.data.batch_size, "steps": STEPS.value}
  settings |= {"warm_up": WARM_UP.value, "forward": FORWARD.value, "compile": COMPILE.value}
  script = loader.PROJECT / "benchmarks" / "torch_depth.py"
  with tempfile.TemporaryDirectory() as folder:
    given, written = Path(folder) / "settings.json", Path(folder) / "result.json"
    given.write_text(json.dumps(settings))
    subprocess.run([sys.executable, script, f"--settings={given}", f"--output={written}"], check=True)
    return json.loads(written.read_text())


def report(result: Result) -> str:
  """One result as text."""
  gib = lambda value: "-" if value is None else f"{value / 2**30:.2f} GiB"
  share = result["share_of_peak"]
  lines = {
    "": f"{result['side']}, {result.get('devices', 1)} x {result['device']}, batch {result['batch']}",
    "compile": f"{result['compile_s']:.1f} s"
    if "compile_s" in result
    else f"first step {result['first_step_s']:.1f} s",
    "step": f"{result['step_ms']:.1f} ms median, {result['step_ms_p95']:.1f} ms p95",
    "images": f"{result['images_per_sec_per_chip']:.3g} per second and chip",
    "model": f"{result['model_tflops_per_sec_per_chip']:.3g} TFLOP per second and chip, "
    + (f"{100 * share:.1f} % of its peak" if share is not None else "peak not known")
    + f" ({result['model_tflop_per_image']:.3g} TFLOP an image)",
    "memory": f"{gib(result['peak_bytes'])} at the peak on a device; compiler's account "
    f"{gib(result.get('compiler_peak_bytes'))}; process {gib(result['resident_bytes'])}",
  }
  if "forward_ms" in result:
    lines["forward"] = f"{result['forward_ms']:.1f} ms"
  if "input_wait_ms" in result:
    lines["input"] = f"waited {result['input_wait_ms']:.1f} ms a step"
  text = "\n".join(f"{name:8} {line}" for name, line in lines.items())
  if "longest" in result:
    text += "\n" + profiler.table([profiler.Operation(**operation) for operation in result["longest"]])
  return text


def main() -> None:
  parse(sys.argv)
  config = CONFIG.value.copy_and_resolve_references()
  if BATCH.value:
    config.data.batch_size = BATCH.value
  config = initialize.with_backbone_sizes(config, initialize.source_of(config))
  groups = {name: config.optim[name] for name in ("loss_group", "norm_group") if config.optim.get(name)}
  if wrong := [f"config.optim.{name}={n}" for name, n in groups.items() if config.data.batch_size % n]:
    print(
      f"error: a batch of {config.data.batch_size} is not cut by {', '.join(wrong)}; 0 is one group", file=sys.stderr
    )
    sys.exit(2)
  around = benchmark_page.surroundings() if REPORT.value else {}
  # PyTorch first: on a GPU, JAX preallocates most of the memory at its first use.
  sides = {"torch": torch_side(config)} if VERSUS.value else {}
  sides["ours"] = ours(config)
  flops = compilation.model_flops(config, step_shapes(config, experiment.assemble(config)))
  results: Result = {name: with_rates(side, config.data.batch_size, flops) for name, side in sides.items()}
  lines = "\n".join(report(result) for result in results.values())
  print(lines, flush=True)
  if VERSUS.value:
    words = {"step_ms": "training step", "forward_ms": "forward pass"}
    ratios = {
      name: sides_of[0] / sides_of[1] for name in words if all(sides_of := [r.get(name) for r in results.values()])
    }
    compared = "\n".join(f"{words[name]}: ours is {ratio:.2f} times as fast" for name, ratio in ratios.items())
    print(compared, flush=True)
    lines += f"\n{compared}"
    results["ratio"] = ratios
  if JSON.value:
    atomic.write_json(Path(JSON.value).expanduser(), results)
  if REPORT.value:
    print(benchmark_page.write(REPORT.value, results, sys.argv, around, lines))


def parse(arguments: list[str]) -> None:
  """Parses the command line; an error is printed as one line, with exit code 2."""
  try:
    words = FLAGS(loader.resolve_argv(arguments))[1:]
    if words or CONFIG.value is None:
      raise UserError(f"unexpected positional arguments: {words}" if words else "give a --config=FILE")
    if FLAGS["torch_compile"].present and not VERSUS.value:
      raise UserError("--torch_compile has no effect without --versus=torch; leave it out")
    if REPORT.value:
      benchmark_page.check_work(REPORT.value)
  except (flags.Error, ValueError, AttributeError, KeyError, TypeError) as error:
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
