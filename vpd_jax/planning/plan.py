"""--mode=plan: estimates the memory and cost of a run before it starts, without access to the devices.

Compiles the actual training and evaluation steps for a named TPU slice or GPUs, which is possible on any machine, or
for the local devices, and reads the compiler's analysis. Allocates no arrays and does not open the data set.
"""

import hashlib
import inspect
import json
import re
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.data import pipeline
from vpd_jax.data.readers import referring
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError, check_choice, one_line
from vpd_jax.evaluation import encoder_cache, evaluate
from vpd_jax.files import atomic
from vpd_jax.monitoring import chips, progress, writers, xla_cost
from vpd_jax.planning import report as plan_report
from vpd_jax.planning import search as plan_search
from vpd_jax.planning import topologies
from vpd_jax.planning.search import Report
from vpd_jax.training import compilation
from vpd_jax.types import Batch, Device

# Shape and dtype of the entries of an Example by key; strings stand for sizes from the config.
KEYS = {
  "image": (("HW", 3), np.uint8),
  "depth": (("HW",), np.float32),
  "label": (("HW",), np.uint8),
  "mask": (("HW",), np.uint8),
  "class_id": ((), np.int32),
  "index": ((), np.int32),
  "valid_size": ((2,), np.int32),
  "tokens": (("tokens",), np.int32),
  "keypoints": (("keypoints", 3), np.float32),
  "center": ((2,), np.float32),
  "extent": ((2,), np.float32),
  "box_score": ((), np.float32),
  "image_index": ((), np.int32),
  "full_mask": (("canvas",), np.uint8),
  "full_size": ((2,), np.int32),
}
CROPPED = ("squeezed", "crops")  # test-time protocols that evaluate on crops


def run(config: ConfigDict, topology: str = "", *, workdir: str = "", effort: str = "low", limit: int = 0) -> Report:
  """--mode=plan: compiles and prints reports; if training does not fit, searches for settings that do.

  Settings are tried in the order of plan_search.candidates.

  Args:
    config: of the run.
    topology: of the devices to compile for, see topologies.topology_devices; empty for the local devices.
    workdir: where plan.json stores finished compilations, so that the same command can continue; empty: not stored.
    effort: of the compiler for a TPU slice: "low", or "default" as in a run, which takes ten times as long and usually
      results in slightly less memory.
    limit: bytes of memory of a device; 0: the memory of the device.

  Returns:
    the reports by name: "train", "eval", and "fitting" with the settings that fit, if those of the config do not and
    others were found.

  Raises:
    ValueError: in one line, for errors that training raises too (except for missing data files), batches that do not
      divide, an unknown topology, or a missing compiler.
  """
  check_choice("--effort", effort, sorted(topologies.EFFORTS))
  effort = topologies.effort(topology, effort)
  config = initialize.with_backbone_sizes(config, initialize.source_of(config))
  exp = experiment.assemble(config)
  initialize.check_training(config, exp)
  check_data(config, exp)
  devices = topologies.topology_devices(topology) if topology else jax.devices()
  limit = limit or memory_of(devices[0])
  cache = _ReportCache(workdir)
  measure = lambda config, step: cache.report(config, step, devices, topology, effort, limit)
  reports = {}
  for step in ("train", "eval"):
    reports[step] = measure(config, step)
    writers.log(plan_report.describe(reports[step]))
  if reports["train"]["fits"] is False:
    state = _state_bytes_by_config(config, devices)
    writers.log(plan_report.describe_states(config, plan_search.less_memory(config), state))
    result = plan_search.find_fitting_settings(
      config, reports["train"], lambda changed: measure(changed, "train"), state, len(devices)
    )
    for flags, report in result.tried:
      writers.log(f"tried {flags}: {plan_report.in_short(report)}")
    writers.log(
      f"fits with {result.flags}" if result.report else "nothing that was tried fits: take more or larger devices"
    )
    if result.report:
      reports["fitting"] = result.report
      writers.log(writers.table(plan_search.costs(config, result.fields)))
      writers.log(plan_report.describe(result.report))
  return reports


def check_data(config: ConfigDict, exp: experiment.Experiment) -> None:
  """Raises ValueError for invalid options of the data set; its files do not have to exist."""
  cls = experiment.DATASETS[config.data.name]
  needs_root = inspect.signature(cls.__init__).parameters["root"].default is inspect.Parameter.empty
  exists = lambda path: path and epath.Path(path).expanduser().exists()
  # Only named files of captions are read where a data set, like the rooms, needs no files and may write its own.
  reads_captions = "sentence" in exp.method.prepare_inputs and "captions" in config.data
  reads_captions = reads_captions and (needs_root or config.data.captions)
  with tempfile.TemporaryDirectory() as empty:
    overrides = {"data.root": empty} if needs_root and not exists(config.data.get("root", "")) else {}
    if config.data.get("depth_root", "") and not exists(config.data.depth_root):
      overrides["data.depth_root"] = empty
    if reads_captions and not exists(config.data.captions):
      overrides["data.captions"] = f"{empty}/captions.json"
      atomic.write_json(epath.Path(overrides["data.captions"]), {"image": "caption"})
    encoder_cache.check(exp, experiment.dataset(loader.changed(config, overrides), exp))


def memory_of(device: Device) -> int:
  """Bytes that a program can use on a device, as reported or from the table of chips; 0 if unknown."""
  try:
    reported = int((device.memory_stats() or {}).get("bytes_limit", 0))
  except (jax.errors.JaxRuntimeError, NotImplementedError):  # a device of a topology
    reported = 0
  chip = chips.chip_for(device.device_kind)
  return reported or int((chip and chip.memory) or 0)


def mesh_for(config: ConfigDict, devices: list[Device]) -> jax.sharding.Mesh:
  """The mesh of the config over these devices."""
  return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=devices)


def step_shapes(config: ConfigDict, exp: experiment.Experiment, step: str) -> Batch:
  """`batch_shapes` of all keys that a step reads, "train" or "eval"."""
  # As experiment.batch_keys, without opening the data set.
  optional = experiment.DATASETS[config.data.name].provides & {"valid_size"}
  eval_keys = exp.task.eval_needs if step == "eval" else ()
  return batch_shapes(config, (*exp.keys, *sorted({*optional, *eval_keys})), step)


def batch_shapes(config: ConfigDict, keys: tuple[str, ...], step: str) -> Batch:
  """A Batch of the pipeline as ShapeDtypeStructs, determined from the config.

  Args:
    config: of the run.
    keys: from Experiment.keys.
    step: "train": `data.batch_size` crops; "eval": `eval.batch_size` images, see `picture_size`.

  Raises:
    ValueError: a key that is not in KEYS.
  """
  if unknown := [key for key in keys if key not in KEYS]:
    raise UserError(f"the shapes of {unknown} in a batch are not known to --mode=plan; add them to plan.KEYS.")
  size = tuple(config.data.crop) if step == "train" else picture_size(config)
  rows = config.data.batch_size if step == "train" else config.eval.batch_size
  canvas = config.data.get("canvas", ()) or config.data.get("size", ()) or referring.Transforms.canvas
  sides = {
    "HW": size,
    "canvas": tuple(canvas),
    "tokens": (config.method.get("token_length", config.backbone.text.positions),),
  }
  if "keypoints" in keys:
    sides["keypoints"] = (len(experiment.DATASETS[config.data.name].info(config.data).classes),)
  shapes = {}
  for key in keys:
    dims, dtype = KEYS[key]
    shape = [n for side in dims for n in (sides[side] if isinstance(side, str) else (side,))]
    shapes[key] = jax.ShapeDtypeStruct((rows, *shape), dtype)
  return shapes


def picture_size(config: ConfigDict) -> tuple[int, int]:
  """(H, W) of an image in evaluation.

  The first of these that is set: the sliding window, `data.resize`, `data.size`, `data.kb_crop`, the size of the
  published images, `data.crop`; always `data.crop` for tasks that evaluate on crops.
  """
  if experiment.TASKS[config.task.name].test_time_protocol in CROPPED:
    return tuple(config.data.crop)
  windows = [tuple(map(int, word.split(":")[1:])) for word in config.eval.test_time if word.startswith("slide:")]
  if windows:
    return windows[0][0], windows[0][0]
  published = experiment.DATASETS[config.data.name].published
  sizes = [config.data.get(name, ()) for name in ("resize", "size", "kb_crop")]
  height, width = next(size for size in (*sizes, published.size, config.data.crop) if size)
  return height, width


def state_bytes(config: ConfigDict, exp: experiment.Experiment, mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Bytes of each part of the state on one device."""
  shapes, shardings = initialize.state_shapes(config, exp), initialize.state_shardings(config, exp, mesh)

  def total(part: str) -> int:
    pairs = zip(jax.tree.leaves(vars(shapes)[part]), jax.tree.leaves(vars(shardings)[part]), strict=True)
    return sum(int(np.prod(where.shard_shape(x.shape))) * x.dtype.itemsize for x, where in pairs)

  return {part: total(part) for part in ("params", "frozen", "stats", "opt_state", "ema")}


def _state_bytes_by_config(config: ConfigDict, devices: list[Device]) -> Callable[[ConfigDict], dict[str, int]]:
  """A cached function from the config with settings of plan_search.candidates to its `state_bytes`."""
  experiments: dict[tuple, experiment.Experiment] = {}
  sizes: dict[tuple, dict[str, int]] = {}

  def state(changed: ConfigDict) -> dict[str, int]:
    settings = {name: plan_search.value(changed, name) for name in plan_search.less_memory(config)[0]}
    key, mesh_size = tuple(settings.values()), (changed.mesh.data, changed.mesh.fsdp)
    if key not in experiments:
      experiments[key] = experiment.assemble(loader.changed(config, settings))
    if (key, mesh_size) not in sizes:
      sizes[key, mesh_size] = state_bytes(changed, experiments[key], mesh_for(changed, devices))
    return sizes[key, mesh_size]

  return state


def compiled_report(
  config: ConfigDict, step: str, devices: list[Device], topology: str, effort: str, limit: int
) -> Report:
  """Compiles one step and reports its cost on one device in bytes, operations and seconds.

  Args:
    config: of the run.
    step: "train" or "eval".
    devices: to compile for.
    topology: their name; empty for local devices.
    effort: key of topologies.OPTIONS.
    limit: bytes of memory of a device; 0: no limit.

  Returns:
    the report. "fits" is None without a limit. If the compiler ran out of memory, its analysis is missing, and "peak"
    is the memory that it requested.
  """
  exp = experiment.assemble(config, training=step == "train")
  mesh = mesh_for(config, devices)
  accumulation = config.optim.accumulation if step == "train" else 1
  rows = config.data.batch_size // accumulation if step == "train" else config.eval.batch_size
  pipeline.check_batch_size(rows, mesh.size, "devices")
  batch, encoders = encoder_cache.encoded_batch_shapes(config, exp, step_shapes(config, exp, step))
  begin = time.perf_counter()
  lower = compilation.lower_step if step == "train" else evaluate.lower_step
  lowered = lower(config, exp, mesh, batch)
  traced = time.perf_counter()
  report = {
    **{"step": step, "devices": len(devices), "kind": devices[0].device_kind, "topology": topology, "effort": effort},
    "compiler": topologies.compiler(topology),
    **{"mesh": dict(mesh.shape), "batch": rows * accumulation, "accumulation": accumulation, "limit": limit or None},
    **{"attention": config.backbone.attention, "dtype": config.dtype},
    "remat": config.backbone.remat and config.backbone.remat_policy,
    "state": state_bytes(config, exp, mesh),
    "encoders": encoders,
    "trace_seconds": round(traced - begin, 1),
  }
  options = topologies.OPTIONS[effort] if topology else xla_cost.compiler_options(mesh)
  try:
    with progress.phase(f"compile {step}"):
      compiled = lowered.compile(options)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    requested = requested_bytes(str(error), sum(report["state"].values()))
    return report | {
      "compile_seconds": round(time.perf_counter() - traced, 1),
      "peak": requested and requested + encoders,
      "fits": False,
    }
  report["compile_seconds"] = round(time.perf_counter() - traced, 1)
  costs = xla_cost.costs(compiled, devices[0].device_kind)
  report |= {name.replace(" ", "_"): value * accumulation for name, value in costs.items()}
  if text := xla_cost.text(compiled):
    report["collectives"] = xla_cost.collectives(text)
  if (memory := xla_cost.memory(compiled)) is not None:
    peak = memory.peak + encoders
    report |= memory._asdict() | {"peak": peak, "fits": peak <= limit if limit else None}
  return report | {"fits": report.get("fits")}


def requested_bytes(message: str, arguments: int) -> int | None:
  """Bytes that a program needs, parsed from the compiler's out-of-memory message; None if it does not state them.

  `arguments`, the bytes of the state, are added if the message excludes them.
  """
  match = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|HLO temporaries \(([\d.]+)([KMGT])\)", message)
  if not match:
    return None
  number, unit = (group for group in match.groups() if group)
  return int(float(number) * 2 ** (10 * " KMGT".index(unit))) + (0 if match[1] else arguments)


class _ReportCache:
  """Reports of finished compilations in plan.json of a workdir, keyed by config, devices, options and compiler."""

  def __init__(self, workdir: str):
    self._path = epath.Path(workdir).expanduser() / "plan.json" if workdir else None
    self._reports = _read(self._path) if self._path and self._path.exists() else {}

  def report(
    self, config: ConfigDict, step: str, devices: list[Device], topology: str, effort: str, limit: int
  ) -> Report:
    """Returns the stored report of an earlier command, or compiles and stores a new one; see `compiled_report`."""
    inputs = [initialize.to_json(config), step, devices[0].device_kind, len(devices), jax.__version__]
    inputs += [topology, effort, limit, topologies.compiler(topology)]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
    if key not in self._reports:
      self._reports[key] = compiled_report(config, step, devices, topology, effort, limit)
      if self._path is not None:
        try:
          atomic.write_json(self._path, self._reports)
        except OSError as error:
          writers.log(f"{self._path} cannot be written ({one_line(error)}): another command compiles again")
    return self._reports[key]


def _read(path: epath.Path) -> dict[str, Report]:
  """The reports in plan.json; if it is damaged, logs a line and returns none, since they can be compiled again."""
  try:
    reports = json.loads(path.read_text())
    if isinstance(reports, dict):
      return reports
  except ValueError:  # not JSON, or not text
    pass
  writers.log(f"{path} is damaged: its reports are compiled again")
  return {}
