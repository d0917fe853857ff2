"""--mode=plan: does a run fit, and what does a step cost, known before the first one and without the devices.

Compiles the real steps of training and evaluation for a named slice of TPUs or GPUs of a machine, which can be done on
any machine, or for the devices at hand, and reads what the compiler says of them. No array is allocated and no data set
is opened.
"""

import hashlib
import inspect
import json
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

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
from vpd_jax.errors import UserError
from vpd_jax.evaluation import encoder_cache, evaluate
from vpd_jax.files import atomic
from vpd_jax.monitoring import chips, progress, writers, xla_cost
from vpd_jax.planning import report as plan_report
from vpd_jax.planning import search as plan_search
from vpd_jax.planning import topologies
from vpd_jax.planning.report import Report
from vpd_jax.training import compilation
from vpd_jax.types import Batch, Device

# Of an Example, by key of a Batch: shape, where words stand for sizes that the config says, and dtype.
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
CROPPED = ("squeezed", "crops")  # ways of a task whose pictures are crops in evaluation, too


def run(config: ConfigDict, topology: str = "", *, workdir: str = "", effort: str = "low", limit: int = 0) -> Report:
  """--mode=plan: compiles, prints, and where training does not fit tries the nearest settings that may.

  The order of what is tried is that of plan_search.candidates.

  Args:
    config: of the run.
    topology: of devices that are not there, see topologies.of, or empty for the devices at hand.
    workdir: where plan.json keeps every finished compilation, so that the same command goes on; empty: nowhere.
    effort: of the compiler for a slice of TPUs: "low", or "default" as in a run, which takes ten times as long and
      mostly ends with a little less memory.
    limit: bytes of memory of a device; 0: those of the device.

  Returns:
    the reports by name: "train", "eval", and "fitting", the settings that fit, where the config's own do not and
    others were found.

  Raises:
    ValueError: in one line: anything that training refuses but for files of the data set, batches that do not divide,
      an unknown topology, or what compiles for it is not installed.
  """
  if effort not in topologies.EFFORTS:
    raise UserError(f"--effort={effort!r} is unknown; choose one of {sorted(topologies.EFFORTS)}.")
  effort = topologies.effort(topology, effort)
  config = initialize.with_backbone_sizes(config, config.init.run or config.init.pretrained)
  initialize.check_training(config)
  check_data(config, experiment.assemble(config))
  devices = topologies.of(topology) if topology else jax.devices()
  limit = limit or memory_of(devices[0])
  kept = _Kept(workdir)
  measure = lambda config, step: kept.report(config, step, devices, topology, effort, limit)
  reports = {}
  for step in ("train", "eval"):
    reports[step] = measure(config, step)
    writers.log(plan_report.describe(reports[step]))
  if reports["train"]["fits"] is False:
    state = _states(config, devices)
    writers.log(plan_report.describe_states(config, plan_search.less_memory(config), state))
    found = plan_search.nearest(
      config, reports["train"], lambda changed: measure(changed, "train"), state, len(devices)
    )
    for words, report in found.tried:
      writers.log(f"tried {words}: {plan_report.in_short(report)}")
    writers.log(
      f"fits with {found.words}" if found.report else "nothing that was tried fits: take more or larger devices"
    )
    if found.report:
      reports["fitting"] = found.report
      writers.log(writers.table(plan_search.costs(config, found.fields)))
      writers.log(plan_report.describe(found.report))
  return reports


def check_data(config: ConfigDict, exp: experiment.Experiment) -> None:
  """Raises ValueError for options of the data set that training would refuse; its files need not be there."""
  maker = experiment.DATASETS[config.data.name]
  needed = inspect.signature(maker.__init__).parameters["root"].default is inspect.Parameter.empty
  with tempfile.TemporaryDirectory() as empty:
    there = config.data.get("root", "") and epath.Path(config.data.root).expanduser().is_dir()
    lent = {"data.root": empty} if needed and not there else {}
    encoder_cache.check(exp, experiment.dataset(loader.changed(config, lent), exp))


def memory_of(device: Device) -> int:
  """Bytes that a program can use on a device, as it says or else as the table does; 0 where neither says."""
  try:
    reported = int((device.memory_stats() or {}).get("bytes_limit", 0))
  except (jax.errors.JaxRuntimeError, NotImplementedError):  # it is not there
    reported = 0
  chip = chips.chip_for(device.device_kind)
  return reported or int((chip and chip.memory) or 0)


def mesh_for(config: ConfigDict, devices: list[Device]) -> jax.sharding.Mesh:
  """The mesh of the config over these devices."""
  return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices=devices)


def step_shapes(config: ConfigDict, exp: experiment.Experiment, step: str) -> Batch:
  """`batch_shapes` of all that a step reads, "train" or "eval"."""
  held = experiment.DATASETS[config.data.name].provides & {"valid_size"}  # as experiment.batch_keys, without the files
  scored = exp.task.eval_needs if step == "eval" else ()
  return batch_shapes(config, (*exp.keys, *sorted({*held, *scored})), step)


def batch_shapes(config: ConfigDict, keys: tuple[str, ...], step: str) -> Batch:
  """A Batch as ShapeDtypeStructs, as the pipeline would give it, by the config alone.

  Args:
    config: of the run.
    keys: of Experiment.keys.
    step: "train": `data.batch_size` crops; "eval": `eval.batch_size` pictures, see `picture_size`.

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
    named, dtype = KEYS[key]
    shape = [n for side in named for n in (sides[side] if isinstance(side, str) else (side,))]
    shapes[key] = jax.ShapeDtypeStruct((rows, *shape), dtype)
  return shapes


def picture_size(config: ConfigDict) -> tuple[int, int]:
  """(H, W) of a picture in evaluation.

  The first that is there: the window it is cut into, `data.resize`, `data.size`, `data.kb_crop`, the size of the
  published data, `data.crop`; the last alone where the task looks at crops in evaluation, too.
  """
  if experiment.TASKS[config.task.name].test_time_protocol in CROPPED:
    return tuple(config.data.crop)
  windows = [tuple(map(int, word.split(":")[1:])) for word in config.eval.test_time if word.startswith("slide:")]
  if windows:
    return windows[0][0], windows[0][0]
  published = experiment.DATASETS[config.data.name].published
  given = [config.data.get(name, ()) for name in ("resize", "size", "kb_crop")]
  height, width = next(size for size in (*given, published.size, config.data.crop) if size)
  return height, width


def state_bytes(config: ConfigDict, exp: experiment.Experiment, mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Bytes on one device of each part of the state."""
  shapes, where = initialize.state_shapes(config, exp), initialize.state_shardings(config, exp, mesh)

  def total(part: str) -> int:
    pairs = zip(jax.tree.leaves(vars(shapes)[part]), jax.tree.leaves(vars(where)[part]), strict=True)
    return sum(int(np.prod(spread.shard_shape(x.shape))) * x.dtype.itemsize for x, spread in pairs)

  return {part: total(part) for part in ("params", "frozen", "stats", "opt_state", "ema")}


def _states(config: ConfigDict, devices: list[Device]) -> Callable[[ConfigDict], dict[str, int]]:
  """`state_bytes` of the config with settings of plan_search.candidates, each made once."""
  made: dict[tuple, experiment.Experiment] = {}
  held: dict[tuple, dict[str, int]] = {}

  def state(changed: ConfigDict) -> dict[str, int]:
    arrays = {name: plan_search.value(changed, name) for name in plan_search.less_memory(config)[0]}
    key, spread = tuple(arrays.values()), (changed.mesh.data, changed.mesh.fsdp)
    if key not in made:
      made[key] = experiment.assemble(loader.changed(config, arrays))
    if (key, spread) not in held:
      held[key, spread] = state_bytes(changed, made[key], mesh_for(changed, devices))
    return held[key, spread]

  return state


def compiled_report(
  config: ConfigDict, step: str, devices: list[Device], topology: str, effort: str, limit: int
) -> Report:
  """Compiles one step and says what it costs on one device; numbers are bytes, operations and seconds.

  Args:
    config: of the run.
    step: "train" or "eval".
    devices: to compile for.
    topology: their name; empty for those at hand.
    effort: key of topologies.OPTIONS.
    limit: bytes of memory of a device; 0 judges nothing.

  Returns:
    "fits" is None where there is no limit. Where the compiler ran out of memory, what it would have told is missing
    and "peak" is what it asked for.
  """
  exp = experiment.assemble(config, training=step == "train")
  mesh = mesh_for(config, devices)
  accumulation = config.optim.accumulation if step == "train" else 1
  rows = config.data.batch_size // accumulation if step == "train" else config.eval.batch_size
  pipeline.check_batch_size(rows, mesh.size, "devices")
  batch, encoders = encoder_cache.planned(config, exp, step_shapes(config, exp, step))
  begin = time.perf_counter()
  lower = compilation.lower_step if step == "train" else evaluate.lower_step
  lowered = lower(config, exp, mesh, batch)
  traced = time.perf_counter()
  report = {
    **{"step": step, "devices": len(devices), "kind": devices[0].device_kind, "topology": topology, "effort": effort},
    "compiler": topologies.compiler(topology),
    **{"mesh": dict(mesh.shape), "batch": rows * accumulation, "accumulation": accumulation, "limit": limit or None},
    **{"attention": config.backbone.attention, "remat": config.backbone.remat, "dtype": config.dtype},
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
    asked = asked_for(str(error), sum(report["state"].values()))
    return report | {
      "compile_seconds": round(time.perf_counter() - traced, 1),
      "peak": asked and asked + encoders,
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


def asked_for(message: str, arguments: int) -> int | None:
  """Bytes that a program needed, by the compiler's message that it does not fit; None where it does not say.

  `arguments`, the bytes of the state, are added where the message is about the rest.
  """
  found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|HLO temporaries \(([\d.]+)([KMGT])\)", message)
  if not found:
    return None
  number, unit = (word for word in found.groups() if word)
  return int(float(number) * 2 ** (10 * " KMGT".index(unit))) + (0 if found[1] else arguments)


class _Kept:
  """The finished compilations of a workdir, in plan.json, by what they depend on."""

  def __init__(self, workdir: str):
    self._path = epath.Path(workdir) / "plan.json" if workdir else None
    self._held = _read(self._path) if self._path and self._path.exists() else {}

  def report(self, config: ConfigDict, step: str, devices: list[Device], *facts: Any) -> Report:
    """The report of an earlier command, or a new one, which is kept."""
    words = [initialize.to_json(config), step, devices[0].device_kind, len(devices), jax.__version__, *facts]
    words.append(topologies.compiler(facts[0]))
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
    if key not in self._held:
      self._held[key] = compiled_report(config, step, devices, *facts)
      if self._path is not None:
        atomic.write_json(self._path, self._held)
    return self._held[key]


def _read(path: epath.Path) -> dict[str, Report]:
  """What plan.json holds; nothing, and a line, where it is damaged: all of it can be compiled again."""
  try:
    held = json.loads(path.read_text())
    if isinstance(held, dict):
      return held
  except ValueError:  # no JSON, or no text
    pass
  writers.log(f"{path} is damaged: what it held is compiled again")
  return {}
