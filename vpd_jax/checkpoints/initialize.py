"""Initial weights of a run: its own checkpoint, another run, converted weights, or random initialization."""

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
from vpd_jax.checkpoints.checkpointer import Checkpoints, is_workdir, newest_config
from vpd_jax.config import loader, stored
from vpd_jax.convert import finite, load, lora_files
from vpd_jax.convert.tables import clip, stable_diffusion, vit
from vpd_jax.data.shards import reader
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError, check_choice
from vpd_jax.experiment import BackboneSizes, Experiment
from vpd_jax.types import Options, ParamDict, PyTree, TrainState

Gather = Callable[[ParamDict], ParamDict]

CLASS_VECTORS = "method/class_vectors"
TEXT_ENCODER, IMAGE_ENCODER = "method/text_encoder/", "method/image_encoder/"
LAST_BLOCK = "method/unet/out/"
CLASSIFIER = "method/vit_model/"
RANDOM = "randomly initialized"
CLASS_PREDICTOR = "method/class_predictor/"  # not part of the checkpoint of a network trained without it


def source_of(config: ConfigDict, workdir: str = "") -> str:
  """Where the weights come from: the workdir if it has a checkpoint, else `init.run`, else `init.pretrained`.

  Empty if all initial values are random.
  """
  return (workdir if is_workdir(workdir) else "") or config.init.run or config.init.pretrained


def weights(
  config: ConfigDict, exp: Experiment, source: str = "", *, aligned: bool = False
) -> tuple[ParamDict, list[str]]:
  """Loads or initializes every array of the model, and reports the source of each in lines for the log.

  Args:
    config: of the run; if `source` is empty, uses `init.run`, else `init.pretrained`. Merges `init.lora`, unless
      `source` is a workdir, whose run has done so.
    exp: from `assemble`.
    source: a workdir of this package, or any source that `convert.load.load_pretrained` accepts.
    aligned: see `convert.rules.convert`.

  Returns:
    Arrays by name in the dtypes of the model, on the host.

  Raises:
    ValueError: the source cannot be read or does not match the model; class vectors, CLIP encoders or the ImageNet
      classifier have no source.
  """
  shapes = {name: exp.spec.shapes[name] for name in exp.spec.paths}
  extra = "" if source and is_workdir(source) else config.init.get("lora", "")  # a run has merged it
  source = source or source_of(config)
  named, lines = {}, []
  if source and is_workdir(source):
    named, lines = _load_run(config, exp, source)
  elif source:
    expected = {name: shape for name, shape in shapes.items() if not name.startswith(CLASS_PREDICTOR)}
    named, report = load.load_pretrained(source, expected, aligned=aligned)
    lines.append(f"weights: {source}: {report.summary()}")
    if any(name.startswith(LAST_BLOCK) for name in named) and stable_diffusion.predicts_v(source):
      lines.append(f"the UNet's last block was trained to predict v, not noise: {source} says so in scheduler/")
    lines += [f"class vectors: those of {source}"] if CLASS_VECTORS in named else []
  if extra:
    named, line = lora_files.merged(named, extra, config.backbone.unet)
    lines.append(line)
  for arrays, line in _prompt_arrays(config, exp, named, source):
    named |= arrays
    lines.append(line)
  missing = shapes.keys() - named.keys()
  if missing:
    modules = sorted({"/".join(name.split("/")[:2]) for name in missing})
    lines.append(f"{RANDOM} (seed {config.seed}): {len(missing)} arrays in {', '.join(modules)}")
  factors = sorted(exp.spec.shapes.keys() - shapes.keys())
  lines += [f"LoRA: {len(factors) // 2} kernels of the UNet, which begins as it is"] if factors else []
  named |= exp.spec.initialize([*sorted(missing), *factors])
  return {name: x.astype(exp.spec.shapes[name].dtype, copy=False) for name, x in named.items()}, lines


def _prompt_arrays(
  config: ConfigDict, exp: Experiment, named: ParamDict, source: str
) -> Iterator[tuple[ParamDict, str]]:
  """Arrays for prompts that the weights do not contain, by name, and a line that states their source."""
  shapes, classes, text = exp.spec.shapes, exp.classes, experiment.sizes(config).text
  pretrained, clip_source = "" if source and is_workdir(source) else source, config.init.get("clip", "")
  missing = shapes.keys() - named.keys()
  if CLASS_VECTORS in missing:
    rows, width = shapes[CLASS_VECTORS].shape
    vectors, line = class_name_encoding.resolve(
      setting=config.method.get("class_vectors", ""),
      classes=classes[:rows],
      width=width,
      pretrained=source,
      dtype=experiment.dtype(config, "param_dtype"),
      sizes=text,
      tokenizer=config.method.get("tokenizer", ""),
      templates=config.method.get("templates", "imagenet_80"),
    )
    yield {CLASS_VECTORS: sharding.of_first_process(vectors).astype(shapes[CLASS_VECTORS].dtype)}, line
  loaders = {
    TEXT_ENCODER: functools.partial(clip_towers.text_encoder, pretrained=pretrained, source=clip_source),
    IMAGE_ENCODER: functools.partial(clip_towers.image_encoder, source=clip_source),
    CLASSIFIER: functools.partial(vit_tower.classifier, source=config.init.get("vit", "")),
    CLASS_PREDICTOR: lambda predictor_shapes: clip_towers.class_predictor(
      predictor_shapes,
      source=clip_source,
      classes=classes,
      templates=class_name_encoding.read_templates("imagenet_80"),
      tokenizer_folder=config.method.get("tokenizer", ""),
      sizes=text,
    ),
  }
  for prefix, load_module in loaders.items():
    module_shapes = {name.removeprefix(prefix): shapes[name] for name in missing if name.startswith(prefix)}
    if module_shapes:
      arrays, line = load_module(module_shapes)
      yield {prefix + name: value for name, value in arrays.items()}, line


def best_metric(config: ConfigDict | Options, exp: Experiment) -> str:
  """Full name of the metric that selects the best checkpoint of a run with this config, e.g. "eval/nyu/rmse"."""
  return f"eval/{config['data']['name']}/{exp.task.best_metric}"


def with_backbone_sizes(config: ConfigDict, source: str) -> ConfigDict:
  """The config with the backbone sizes that the source of the weights states, if it does.

  The sizes of CLIP's image encoder are read from a folder in `init.clip`, those of the classifier from one in
  `init.vit`. From a workdir, the number of trained refinement steps is read too, so that `method.refine_steps` can be
  changed.

  Args:
    config: from a config file.
    source: a workdir of this package, whose checkpoint contains its config; a diffusers folder; or any other source,
      which states no sizes.
  """
  steps, own = 0, {}
  if source and is_workdir(source):
    run_config = newest_config(source)
    own = run_config["init"]
    stated = {part: run_config["backbone"][part] for part in BackboneSizes._fields if part in run_config["backbone"]}
    steps = run_config["method"].get("trained_steps") or run_config["method"].get("refine_steps", 0)
  else:
    stated = (stable_diffusion.sizes(source) if source else None) or {}
  # The run's own towers are in its checkpoint, and need not be where they were.
  other = lambda name: "" if config.init.get(name, "") == own.get(name) else config.init.get(name, "")
  clip_source, classifier = other("clip"), other("vit")
  if clip_source and class_name_encoding.random_seed(clip_source, clip_towers.OPTION) is None:
    stated |= {part: values for part, values in clip.sizes(clip_source).items() if part == "image"}
  if classifier and class_name_encoding.random_seed(classifier, vit_tower.OPTION) is None:
    stated |= {"vit": vit.sizes(classifier)}
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for part, values in stated.items():
      plain = {key: tuple(x) if isinstance(x, list) else 0 if x is None else x for key, x in values.items()}
      config.backbone[part] = dict(config.backbone.get(part, {})) | plain
    # Not set if equal to refine_steps: a resumed run compares its config with the stored one.
    if steps and not config.method.get("trained_steps", 1) and steps != config.method.refine_steps:
      config.method.trained_steps = steps
  return config.lock()


def check_training(config: ConfigDict, exp: Experiment) -> None:
  """Raises ValueError for options that are valid for evaluation but not for training.

  These are an unknown data.on_bad_record, a schedule that ends before the run, parameters in bfloat16, and rules in
  mesh.rules that match none of the arrays in training, of which an evaluation has only a part. With the 8 bits of
  bfloat16, most updates of parameters, moments and the moving average would be lost by rounding.
  """
  check_choice("on_bad_record", config.data.on_bad_record, reader.ON_BAD_RECORD)
  optim.check_length(config.num_steps, **loader.schedule(config))
  if config.param_dtype == "bfloat16":
    raise UserError(
      "config.param_dtype='bfloat16' cannot be trained: small updates of parameters, of their moments and of a moving "
      "average would be rounded away. Set config.dtype='bfloat16', which computes in it, and "
      "config.param_dtype='float32'."
    )
  if config.mesh.rules:  # the shapes are slow to trace
    sharding.check_rules(state_shapes(config, exp), config.mesh.rules)


def with_predicted_class(config: ConfigDict) -> ConfigDict:
  """The config for images without a class: if `init.clip` is set, CLIP predicts it.

  A given class still has precedence, see `method.prompt`.
  """
  if config.method.get("prompt", "") != "scene_class" or not config.init.get("clip", ""):
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.method.prompt = "predicted"
  return config.lock()


def checkpoints(config: ConfigDict, exp: Experiment, workdir: str) -> Checkpoints:
  """The checkpoints of a workdir, with the options of the config."""
  return Checkpoints(
    workdir,
    keep=config.keep,
    keep_best=config.keep_best,
    best_metric=best_metric(config, exp),
    best_mode=exp.task.best_mode,
  )


def _load_run(config: ConfigDict, exp: Experiment, workdir: str) -> tuple[dict[str, np.ndarray], list[str]]:
  """Parameters and statistics of a run's newest or best checkpoint; the EMA instead of the parameters if saved.

  The best one is that of the run's own metric, also where the config names another data set. Training-only parts are
  omitted if the model omits them. The class predictor may be missing.

  Returns:
    Arrays by name, and lines: the checkpoint, and the differences of its config that affect predictions.

  Raises:
    ValueError: names or shapes do not match the model (states the differing options); NaN or infinity; no checkpoint
      has the score that selects the best one.
  """
  which, shapes = config.eval.checkpoint, {n: exp.spec.shapes[n] for n in exp.spec.paths}
  parts = tuple(f"method/{part}" for part in exp.method.training_only)
  omitted = tuple(part for part in parts if not any(name.startswith(part) for name in shapes))
  metric = best_metric(newest_config(workdir), exp) if which == "best" else None
  with Checkpoints(workdir, best_metric=metric, best_mode=exp.task.best_mode, read_only=True) as run_checkpoints:
    step = run_checkpoints.best_step() if metric else run_checkpoints.latest_step()
    if step is None:
      raise UserError(
        f"config.eval.checkpoint='best' needs a checkpoint with the score {metric}, and {workdir} holds none; set "
        "config.eval.checkpoint='newest'."
      )
    saved = run_checkpoints.restore_weights(step, skip=omitted)
    differing = stored.differing(run_checkpoints.restore_config(step), config)
    named = run_checkpoints.evaluated(step, saved)
  required = {n for n in shapes if not n.startswith(CLASS_PREDICTOR)}
  mismatched = sorted(
    n for n in required | named.keys() if n not in named or n not in shapes or named[n].shape != shapes[n].shape
  )
  if mismatched:
    raise UserError(
      f"checkpoint {step} of {workdir} is not of this config: {differing or 'the options are the same, but the code'}, "
      f"and {len(mismatched)} arrays are missing, unknown or of another shape, like {mismatched[0]}; give the config "
      "it was trained with, or no config, which takes that of the run."
    )
  named = {n: x.astype(shapes[n].dtype, copy=False) for n, x in named.items()}
  finite.check(named, f"checkpoint {step} of {workdir}")
  lines = [f"weights: {workdir}, checkpoint of step {step}" + (", moving average" if saved.get("ema") else "")]
  lines += [f"not as in the run: {differing}"] if differing else []
  return named, lines


def new_state(config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh) -> tuple[TrainState, list[str]]:
  """The initial state on the mesh, and lines that state the sources of its arrays."""
  check_training(config, exp)
  named, lines = weights(config, exp)
  shardings = state_shardings(config, exp, mesh)
  fields = split(exp, named) | {"step": np.zeros((), np.int32)}
  del named  # releases arrays as soon as they are placed
  placed = sharding.place(fields, {field: vars(shardings)[field] for field in fields}, emptied=True)
  # The moving average needs separate buffers: the step donates both.
  copied = lambda n, x: jax.device_put(jnp.copy(x), cast(ParamDict, shardings.ema)[n])
  ema = {n: copied(n, x) for n, x in placed["params"].items()} if config.optim.ema_decay else None
  opt_state = jax.jit(exp.optimizer.init, out_shardings=shardings.opt_state)(placed["params"])
  return TrainState(**placed, opt_state=opt_state, ema=ema), lines


def split(exp: Experiment, named: ParamDict) -> dict[str, ParamDict]:
  """Splits the arrays of a model into the fields of a TrainState: trained, frozen, statistics."""
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
  """Shapes of the optimizer state; cached, since they are needed several times at startup and slow to trace."""
  return jax.eval_shape(init, dict(params))


def state_shardings(config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh) -> TrainState:
  """The sharding of each array of the state."""
  return sharding.state_shardings(mesh, state_shapes(config, exp), rules=config.mesh.rules)


def gather(config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh) -> Gather:
  """A function that all-gathers the model's arrays in a program for this mesh, see sharding.gathered."""
  state = state_shardings(config, exp, mesh)
  shardings = {**state.params, **state.frozen, **state.stats}
  return lambda named: sharding.gathered(named, shardings, experiment.dtype(config, "dtype"))


def resume_or_start(
  config: ConfigDict,
  exp: Experiment,
  mesh: jax.sharding.Mesh,
  checkpoints: Checkpoints,
  *,
  accept_changes: bool = False,
) -> tuple[TrainState, list[str]]:
  """Restores or initializes the training state, and reports its source in lines for the log.

  Uses the first available of: 1. the newest checkpoint of the workdir; 2. `init.run`; 3. `init.pretrained`; 4. random
  parameters.

  Args:
    config, exp, mesh: of the run.
    checkpoints: of its workdir.
    accept_changes: resume even if the config differs from that of the checkpoint.

  Raises:
    ValueError: the workdir was created with another method, neck, head, task, data, optim or backbone; its checkpoint
      contains NaN or infinity.
  """
  step = checkpoints.latest_step()
  if step is None:
    return new_state(config, exp, mesh)
  saved_config = checkpoints.restore_config(step)
  if saved_config["data"].get("keypoints") == []:  # an earlier version stored no names that the data set reads
    saved_config["data"]["keypoints"] = list(config.data.keypoints)
  changed = loader.differences(saved_config, config)
  if changed and not accept_changes:
    raise UserError(
      f"the workdir was made with another config: {'; '.join(changed)}. Choose another --workdir, or "
      "continue with --accept_config_changes."
    )
  state, conversions = _restored(config, exp, mesh, checkpoints, step, saved_config["optim"].get("moments", "float32"))
  named = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}
  finite.check(named, f"checkpoint {step} of the workdir")
  return state, [f"resumed: checkpoint of step {step}", *(f"changed: {c}" for c in changed), *conversions]


def _restored(
  config: ConfigDict, exp: Experiment, mesh: jax.sharding.Mesh, checkpoints: Checkpoints, step: int, moments: str
) -> tuple[TrainState, list[str]]:
  """Restores a checkpoint whose moments have the format `moments`; returns a line if they are converted."""
  shapes, shardings = state_shapes(config, exp), state_shardings(config, exp, mesh)
  if moments == config.optim.moments:
    return checkpoints.restore(step, sharding.abstract(shapes, shardings)), []
  converter = lambda kind: lambda opt_state, params: optim.with_moments(opt_state, kind, params)
  saved_shapes = jax.eval_shape(converter(moments), shapes.opt_state, shapes.params)
  saved_shapes = dataclasses.replace(shapes, opt_state=saved_shapes)
  saved_shardings = sharding.state_shardings(mesh, saved_shapes, rules=config.mesh.rules)
  state = checkpoints.restore(step, sharding.abstract(saved_shapes, saved_shardings))
  convert = jax.jit(converter(config.optim.moments), out_shardings=shardings.opt_state)
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
  """(params, frozen, stats) on the mesh, for evaluation and prediction, and lines that state their sources.

  Args:
    config, exp, mesh: of the model.
    source: as in `weights`.
    complete: raise if arrays are randomly initialized.

  Raises:
    ValueError: as `weights`; arrays are randomly initialized.
  """
  named, lines = weights(config, exp, source, aligned=True)
  random_lines = [line for line in lines if line.startswith(RANDOM)]
  if complete and random_lines:
    raise UserError(
      f"no trained weights to evaluate: {random_lines[0]}. Give a workdir with a checkpoint, or a released "
      "checkpoint as config.init.pretrained."
    )
  shardings, fields = state_shardings(config, exp, mesh), split(exp, named)
  del named  # releases arrays as soon as they are placed
  placed = sharding.place(fields, {field: vars(shardings)[field] for field in fields}, emptied=True)
  return (placed["params"], placed["frozen"], placed["stats"]), lines
