"""Where the arrays of a run come from: its own checkpoint, another run, converted weights, or random initialization."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vpd_jax import experiment, optim
from vpd_jax.checkpoints import class_name_encoding, clip_towers, vit_tower
from vpd_jax.checkpoints.checkpointer import Checkpoints, is_workdir
from vpd_jax.config import loader, stored
from vpd_jax.convert import finite, load, lora_files
from vpd_jax.convert.tables import clip, stable_diffusion, vit
from vpd_jax.data.shards import reader
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError
from vpd_jax.experiment import Experiment
from vpd_jax.types import ParamDict, PyTree, TrainState

Gather = Callable[[ParamDict], ParamDict]

BACKBONES = ("unet", "vae", "text", "image", "vit")  # of which a workdir states the sizes
CLASS_VECTORS = "method/class_vectors"
TEXT_ENCODER, IMAGE_ENCODER = "method/text_encoder/", "method/image_encoder/"
LAST_BLOCK = "method/unet/out/"
CLASSIFIER = "method/vit_model/"
RANDOM = "randomly initialized"
CLASS_PREDICTOR = "method/class_predictor/"  # never in a checkpoint of the network that was trained without it


def weights(config: ConfigDict, exp: Experiment, source: str = "") -> tuple[ParamDict, list[str]]:
  """Every array of the model, and lines that say where each came from.

  Args:
    config: of the run; where `source` is empty, `init.run`, then `init.pretrained` is used, `init.lora` merged into it.
    exp: of `assemble`.
    source: a workdir of ours, or anything `convert.load.load_pretrained` takes.

  Returns:
    Arrays by name in the dtypes of the model, on the host.

  Raises:
    ValueError: a source that cannot be read or does not fit; no source of class vectors, of CLIP's towers or of the
      classifier of ImageNet.
  """
  shapes = {name: exp.spec.shapes[name] for name in exp.spec.paths}
  extra = "" if source else config.init.get("lora", "")
  source = source or config.init.run or config.init.pretrained
  named, lines = {}, []
  if source and is_workdir(source):
    named, lines = _load_run(config, exp, source)
  elif source:
    held = {name: shape for name, shape in shapes.items() if not name.startswith(CLASS_PREDICTOR)}
    named, report = load.load_pretrained(source, held)
    lines.append(f"weights: {source}: {report.summary()}")
    if any(name.startswith(LAST_BLOCK) for name in named) and stable_diffusion.predicts_v(source):
      lines.append(f"the UNet's last block was trained to predict v, not noise: {source} says so in scheduler/")
    lines += [f"class vectors: those of {source}"] if CLASS_VECTORS in named else []
  if extra:
    named, line = lora_files.merged(named, extra, config.backbone.unet)
    lines.append(line)
  for found, line in _prompts(config, exp, named, source):
    named |= found
    lines.append(line)
  rest = shapes.keys() - named.keys()
  if rest:
    tops = sorted({"/".join(name.split("/")[:2]) for name in rest})
    lines.append(f"{RANDOM} (seed {config.seed}): {len(rest)} arrays in {', '.join(tops)}")
  more = sorted(exp.spec.shapes.keys() - shapes.keys())
  lines += [f"LoRA: {len(more) // 2} kernels of the UNet, which begins as it is"] if more else []
  named |= exp.spec.initialize([*sorted(rest), *more])
  return {name: x.astype(exp.spec.shapes[name].dtype, copy=False) for name, x in named.items()}, lines


def _prompts(config: ConfigDict, exp: Experiment, named: ParamDict, source: str) -> Iterator[tuple[ParamDict, str]]:
  """What prompts are made of and the weights do not bring: arrays by name, and a line that says where from."""
  shapes, classes, text = exp.spec.shapes, exp.classes, experiment.sizes(config)[2]
  pretrained, chosen = "" if source and is_workdir(source) else source, config.init.get("clip", "")
  missing = shapes.keys() - named.keys()
  if CLASS_VECTORS in missing:
    rows, width = shapes[CLASS_VECTORS].shape
    vectors, line = class_name_encoding.resolve(
      setting=config.method.class_vectors,
      classes=classes[:rows],
      width=width,
      pretrained=source,
      dtype=experiment.dtype(config, "param_dtype"),
      sizes=text,
      tokenizer=config.method.tokenizer,
      templates=config.method.get("templates", "imagenet_80"),
    )
    yield {CLASS_VECTORS: vectors.astype(shapes[CLASS_VECTORS].dtype)}, line
  makers = {
    TEXT_ENCODER: functools.partial(clip_towers.text_encoder, pretrained=pretrained, source=chosen),
    IMAGE_ENCODER: functools.partial(clip_towers.image_encoder, source=chosen),
    CLASSIFIER: functools.partial(vit_tower.classifier, source=config.init.get("vit", "")),
    CLASS_PREDICTOR: lambda wanted: clip_towers.class_predictor(
      wanted,
      source=chosen,
      classes=classes,
      templates=class_name_encoding.read_templates("imagenet_80"),
      words=config.method.tokenizer,
      sizes=text,
    ),
  }
  for prefix, make in makers.items():
    wanted = {name.removeprefix(prefix): shapes[name] for name in missing if name.startswith(prefix)}
    if wanted:
      found, line = make(wanted)
      yield {prefix + name: value for name, value in found.items()}, line


def best_metric(config: ConfigDict, exp: Experiment) -> str:
  """Full name of the score that chooses the best checkpoint, e.g. "eval/nyu/rmse"."""
  return f"eval/{config.data.name}/{exp.task.best[0]}"


def with_backbone_sizes(config: ConfigDict, source: str) -> ConfigDict:
  """The config with the backbones' sizes as the source of the weights states them, where it does.

  Those of CLIP's image encoder are stated by a folder in `init.clip`, those of the classifier by one in `init.vit`. A
  workdir also states how many refinement steps its
  weights hold, so that `method.refine_steps` can be chosen anew.

  Args:
    config: of a file.
    source: a workdir of ours, whose checkpoint holds its config; a diffusers folder; or anything else, which states
      nothing.
  """
  steps = 0
  if source and is_workdir(source):
    with Checkpoints(source, read_only=True) as held:
      stored = held.restore_config(cast(int, held.latest_step()))
    stated = {part: stored["backbone"][part] for part in BACKBONES if part in stored["backbone"]}
    steps = stored["method"].get("trained_steps") or stored["method"].get("refine_steps", 0)
  else:
    stated = (stable_diffusion.sizes(source) if source else None) or {}
  chosen = config.init.get("clip", "")
  if chosen and class_name_encoding.random_seed(chosen, clip_towers.OPTION) is None:
    stated |= {part: values for part, values in clip.sizes(chosen).items() if part == "image"}
  classifier = config.init.get("vit", "")
  if classifier and class_name_encoding.random_seed(classifier, vit_tower.OPTION) is None:
    stated |= {"vit": vit.sizes(classifier)}
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for part, values in stated.items():
      plain = {key: tuple(x) if isinstance(x, list) else 0 if x is None else x for key, x in values.items()}
      config.backbone[part] = dict(config.backbone.get(part, {})) | plain
    # As many as the config has anyway are left unsaid: a run that resumes compares its config with the stored one.
    if steps and not config.method.get("trained_steps", 1) and steps != config.method.refine_steps:
      config.method.trained_steps = steps
  return config.lock()


def check_training(config: ConfigDict) -> None:
  """Raises ValueError for what can be evaluated, but would not be trained as it is told.

  An unknown word of data.on_bad_record; a schedule that ends before the run does; parameters in bfloat16, of whose 8
  bits most updates are rounded away: those of parameters, of their moments and of a moving average alike.
  """
  reader.check_on_bad_record(config.data.on_bad_record)
  optim.check_length(config.num_steps, **loader.schedule(config))
  if config.param_dtype == "bfloat16":
    raise UserError(
      "config.param_dtype='bfloat16' cannot be trained: small updates of parameters, of their moments and of a moving "
      "average would be rounded away. Set config.dtype='bfloat16', which computes in it, and "
      "config.param_dtype='float32'."
    )


def with_predicted_class(config: ConfigDict) -> ConfigDict:
  """The config for images whose class is not given: `init.clip`, where there is one, predicts it.

  A class that is given still counts, see `method.prompt`.
  """
  if config.method.get("prompt", "") != "scene_class" or not config.init.get("clip", ""):
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.method.prompt = "predicted"
  return config.lock()


def checkpoints(config: ConfigDict, exp: Experiment, workdir: str, *, read_only: bool = False) -> Checkpoints:
  """The checkpoints of a workdir, with what the config says about keeping them."""
  return Checkpoints(
    workdir,
    keep=config.keep,
    keep_best=config.keep_best,
    best_metric=best_metric(config, exp),
    best_mode=exp.task.best[1],
    read_only=read_only,
  )


def _load_run(config: ConfigDict, exp: Experiment, workdir: str) -> tuple[dict[str, np.ndarray], list[str]]:
  """Parameters and statistics of a run's newest or best checkpoint; its EMA in place of the parameters where kept.

  What the method has for training only is left out where the model does. What predicts the class may be missing.

  Returns:
    Arrays by name, and lines: the checkpoint, and where its config differs in what is seen in predictions.

  Raises:
    ValueError: the names or shapes are not those of the model, with the options that differ; NaN or infinity.
  """
  which, shapes = config.eval.checkpoint, {n: exp.spec.shapes[n] for n in exp.spec.paths}
  if which not in ("newest", "best"):
    raise UserError(f"config.eval.checkpoint={which!r} is unknown; choose 'newest' or 'best'.")
  parts = tuple(f"method/{part}" for part in exp.method.training_only)
  absent = tuple(part for part in parts if not any(name.startswith(part) for name in shapes))
  with checkpoints(config, exp, workdir, read_only=True) as held:
    best = held.best_step() if which == "best" else None
    step = held.latest_step() if best is None else best
    saved = held.restore_weights(cast(int, step), skip=absent)
    differing = stored.differing(held.restore_config(cast(int, step)), config)
    named = held.evaluated(cast(int, step), saved)
  needed = {n for n in shapes if not n.startswith(CLASS_PREDICTOR)}
  wrong = sorted(
    n for n in needed | named.keys() if n not in named or n not in shapes or named[n].shape != shapes[n].shape
  )
  if wrong:
    raise UserError(
      f"checkpoint {step} of {workdir} is not of this config: {differing or 'the options are the same, but the code'}, "
      f"and {len(wrong)} arrays are missing, unknown or of another shape, like {wrong[0]}; give the config it was "
      "trained with, or no config, which takes that of the run."
    )
  named = {n: x.astype(shapes[n].dtype, copy=False) for n, x in named.items()}
  finite.check(named, f"checkpoint {step} of {workdir}")
  lines = [f"weights: {workdir}, checkpoint of step {step}" + (", moving average" if saved.get("ema") else "")]
  lines += [f"not as in the run: {differing}"] if differing else []
  return named, lines


def new_state(config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh) -> tuple[TrainState, list[str]]:
  """A state before the first step, on the mesh, and lines that say where its arrays came from."""
  check_training(config)
  named, lines = weights(config, exp)
  where = state_shardings(config, exp, mesh)
  fields = split(exp, named) | {"step": np.zeros((), np.int32)}
  del named  # so that nothing holds what has been placed
  placed = sharding.place(fields, {field: vars(where)[field] for field in fields}, emptied=True)
  # A moving average of its own memory: the step donates both.
  copied = lambda n, x: jax.device_put(jnp.copy(x), cast(ParamDict, where.ema)[n])
  ema = {n: copied(n, x) for n, x in placed["params"].items()} if config.optim.ema_decay else None
  opt_state = jax.jit(exp.optimizer.init, out_shardings=where.opt_state)(placed["params"])
  return TrainState(**placed, opt_state=opt_state, ema=ema), lines


def split(exp: Experiment, named: ParamDict) -> dict[str, ParamDict]:
  """The arrays of a model as the fields of a TrainState: trained, frozen, statistics."""
  trained, stats = exp.groups.lr, exp.spec.stats
  return {
    "params": {n: x for n, x in named.items() if n in trained},
    "frozen": {n: x for n, x in named.items() if n not in trained and n not in stats},
    "stats": {n: x for n, x in named.items() if n in stats},
  }


def state_shapes(config: ConfigDict, exp: Experiment) -> TrainState:
  """The TrainState as ShapeDtypeStructs."""
  fields = split(exp, exp.spec.shapes)
  opt_state = _optimizer_state(exp.optimizer.init, tuple(fields["params"].items()))
  ema = dict(fields["params"]) if config.optim.ema_decay else None
  return TrainState(cast(Any, jax.ShapeDtypeStruct((), jnp.int32)), **fields, opt_state=opt_state, ema=ema)


@functools.lru_cache(maxsize=4)
def _optimizer_state(init: Callable[[ParamDict], PyTree], params: tuple[tuple[str, jax.ShapeDtypeStruct], ...]) -> Any:
  """Shapes of the state that `init` makes: asked for several times at a start, and a tenth of its tracing."""
  return jax.eval_shape(init, dict(params))


def state_shardings(config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh) -> TrainState:
  """Where each array of the state lies."""
  return sharding.state_shardings(mesh, state_shapes(config, exp), rules=config.mesh.rules)


def gather(config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh) -> Gather:
  """Makes the model's arrays whole where a program for this mesh uses them, see sharding.gathered."""
  where = state_shardings(config, exp, mesh)
  lying = {**where.params, **where.frozen, **where.stats}
  return lambda named: sharding.gathered(named, lying, experiment.dtype(config, "dtype"))


def resume_or_start(
  config: ConfigDict,
  exp: Experiment,
  mesh: jax.sharding.Mesh,
  checkpoints: Checkpoints,
  *,
  accept_changes: bool = False,
) -> tuple[TrainState, list[str]]:
  """The state to go on from, by the first that applies, and lines that say which it was.

  1. the newest checkpoint of the workdir; 2. `init.run`; 3. `init.pretrained`; 4. random parameters.

  Args:
    config, exp, mesh: of the run.
    checkpoints: of its workdir.
    accept_changes: go on although the config differs from the checkpoint's where it matters.

  Raises:
    ValueError: the workdir was made with another method, neck, head, task, data, optim or backbone; its checkpoint
      holds NaN or infinity.
  """
  step = checkpoints.latest_step()
  if step is None:
    return new_state(config, exp, mesh)
  held = checkpoints.restore_config(step)
  changed = loader.differences(held, json.loads(to_json(config)))
  if changed and not accept_changes:
    raise UserError(
      f"the workdir was made with another config: {'; '.join(changed)}. Choose another --workdir, or "
      "go on all the same with --accept_config_changes."
    )
  state, more = _restored(config, exp, mesh, checkpoints, step, held["optim"].get("moments", "float32"))
  named = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}
  finite.check(named, f"checkpoint {step} of the workdir")
  return state, [f"resumed: checkpoint of step {step}", *(f"changed: {c}" for c in changed), *more]


def _restored(
  config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh, checkpoints: Checkpoints, step: int, moments: str
) -> tuple[TrainState, list[str]]:
  """The state of a checkpoint whose moments are kept as this word says, and a line where they are converted."""
  shapes, where = state_shapes(config, exp), state_shardings(config, exp, mesh)
  if moments == config.optim.moments:
    return checkpoints.restore(step, sharding.abstract(shapes, where)), []
  recode = lambda kind: lambda opt_state, params: optim.with_moments(opt_state, kind, params)
  before = jax.eval_shape(recode(moments), shapes.opt_state, shapes.params)
  before = dataclasses.replace(shapes, opt_state=before)
  placed = sharding.state_shardings(mesh, before, rules=config.mesh.rules)
  state = checkpoints.restore(step, sharding.abstract(before, placed))
  convert = jax.jit(recode(config.optim.moments), out_shardings=where.opt_state)
  opt_state = convert(state.opt_state, state.params)
  return dataclasses.replace(state, opt_state=opt_state), [
    f"moments converted from {moments} to {config.optim.moments}"
  ]


def to_json(config: ConfigDict) -> str:
  """The config as JSON, tuples as lists."""
  return json.dumps(config.to_dict(), indent=1)


def weights_on_mesh(
  config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh, source: str = "", *, complete: bool
) -> tuple[tuple[ParamDict, ParamDict, ParamDict], list[str]]:
  """(params, frozen, stats) on the mesh, for evaluation and prediction, and lines that say where they came from.

  Args:
    config, exp, mesh: what to fill.
    source: as in `weights`.
    complete: refuse weights that leave arrays fresh.

  Raises:
    ValueError: as `weights`; something is left fresh.
  """
  named, lines = weights(config, exp, source)
  fresh = [line for line in lines if line.startswith(RANDOM)]
  if complete and fresh:
    raise UserError(
      f"no trained weights to evaluate: {fresh[0]}. Give a workdir with a checkpoint, or a released "
      "checkpoint as config.init.pretrained."
    )
  where, fields = state_shardings(config, exp, mesh), split(exp, named)
  del named  # so that nothing holds what has been placed
  placed = sharding.place(fields, {field: vars(where)[field] for field in fields}, emptied=True)
  return (placed["params"], placed["frozen"], placed["stats"]), lines
