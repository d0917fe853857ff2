"""Builds the objects of a run from its config: method, neck, head, task, data set and optimizer.

ConfigDicts are not passed any further: sections become keyword arguments.
"""

import pkgutil
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from vpd_jax import optim
from vpd_jax.config import fields, loader
from vpd_jax.config.presets import registry
from vpd_jax.convert.tokenizer import Tokenize
from vpd_jax.data import captions
from vpd_jax.data.datasets import (
  ade20k,
  cityscapes,
  coco_pose,
  depth_list,
  keypoint_list,
  kitti,
  mapillary,
  mask_folder,
  nyu,
  refcoco,
  refer_list,
  room_figures,
  rooms,
)
from vpd_jax.errors import UserError, check_choice
from vpd_jax.inference import blending, sliding_window, tta
from vpd_jax.models import lora
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones.attention import IMPLEMENTATIONS
from vpd_jax.models.backbones.clip_image import ImageSizes
from vpd_jax.models.backbones.clip_text import TextSizes
from vpd_jax.models.backbones.unet import REMAT_POLICIES, UNetSizes
from vpd_jax.models.backbones.vae import VaeSizes
from vpd_jax.models.backbones.vit import VitSizes
from vpd_jax.models.heads import deconv, fpn, keypoints, lavt, upernet
from vpd_jax.models.initializers import InitKeys
from vpd_jax.models.layer_options import Common
from vpd_jax.models.methods.diffusion import MethodSetup
from vpd_jax.models.necks import unet_features
from vpd_jax.models.perception_model import ModelBuilder, Part
from vpd_jax.tasks.depth import task as depth_task
from vpd_jax.tasks.pose import task as pose_task
from vpd_jax.tasks.referring import task as referring_task
from vpd_jax.tasks.segmentation import task as segmentation_task
from vpd_jax.types import Dataset, DatasetInfo, Fields, Method, Task

METHODS: dict[str, type] = {name: pkgutil.resolve_name(place) for name, place in registry.METHODS.items()}
NECKS = {
  "fusion": unet_features.Fusion,
  "einsum": unet_features.Einsum,
  "einsum_levels": unet_features.EinsumLevels,
  "fpn": fpn.Fpn,
  "none": unet_features.NoNeck,
}
HEADS = {
  "deconv": deconv.Deconv,
  "fpn": fpn.SemanticFpn,
  "upernet": upernet.UperNet,
  "lavt": lavt.Lavt,
  "fused": keypoints.FusedHead,
  "simple": keypoints.ViTPoseSimpleHead,
  "classic": keypoints.DeconvHead,
  "direct": keypoints.IdentityHead,
}
TASKS: dict[str, type[Task]] = {
  "depth": depth_task.Depth,
  "segmentation": segmentation_task.Segmentation,
  "referring": referring_task.Referring,
  "pose": pose_task.Pose,
}
DATASETS: dict[str, type[Dataset]] = {
  "nyu": nyu.Nyu,
  "kitti": kitti.Kitti,
  "depth_list": depth_list.DepthList,
  "ade20k": ade20k.Ade20k,
  "cityscapes": cityscapes.Cityscapes,
  "mapillary": mapillary.Mapillary,
  "mask_folder": mask_folder.MaskFolder,
  "refcoco": refcoco.RefCoco,
  "refer_list": refer_list.ReferList,
  "coco_pose": coco_pose.CocoPose,
  "keypoint_list": keypoint_list.KeypointList,
  "rooms": rooms.Rooms,
  "room_figures": room_figures.RoomFigures,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
CHECKPOINTS = ("newest", "best")  # of a workdir, values of config.eval.checkpoint
FROZEN_DTYPES = ("float32", "bfloat16")  # the first one means param_dtype
NOT_OF_THE_DATASET = ("name", "batch_size", "workers", "on_bad_record", "reshuffle_each_epoch", "captions")


class BackboneSizes(NamedTuple):
  """Sizes of the backbones, by section of `config.backbone`."""

  unet: UNetSizes
  vae: VaeSizes
  text: TextSizes
  image: ImageSizes
  vit: VitSizes


class Experiment(NamedTuple):
  """The objects described by a config, before any array is allocated.

  Attributes:
    spec: names, shapes and variable types of the model's arrays.
    task: loss and metrics.
    groups: learning-rate and decay multipliers of every trainable array, and the frozen arrays.
    rate: learning rate by optimizer step.
    optimizer: the optax chain.
    classes: class names of the prompt, by class id.
    keys: required keys of a Batch, "image" first.
  """

  spec: params_lib.ModelSpec
  task: Task
  groups: optim.Groups
  rate: optim.Schedule
  optimizer: optax.GradientTransformation
  classes: tuple[str, ...]
  keys: tuple[str, ...]

  @property
  def method(self) -> Method:
    """The method, with shapes instead of arrays."""
    return self.spec.model.method


def _rest(section: ConfigDict, without: tuple[str, ...] = ("name",)) -> Fields:
  return {key: loader.as_tuples(value) for key, value in section.items() if key not in without}


def dtype(config: ConfigDict, field: str) -> DTypeLike:
  """The dtype named by `config.dtype` or `config.param_dtype`.

  Raises:
    ValueError: unknown dtype; float64 without JAX_ENABLE_X64, or for only one of the two.
  """
  name = config[field]
  check_choice(f"config.{field}", name, sorted(DTYPES))
  if "float64" in (config.dtype, config.param_dtype):
    if config.dtype != config.param_dtype:
      raise UserError(
        f"float64 is for both or neither: config.dtype={config.dtype!r}, config.param_dtype={config.param_dtype!r}."
      )
    if not cast(Any, jax.config).jax_enable_x64:
      raise UserError(f"config.{field}='float64' needs JAX_ENABLE_X64=1 in the environment.")
  return DTYPES[name]


def sizes(config: ConfigDict) -> BackboneSizes:
  """The sizes in the config; the number of heads and the head width are None where the config has 0."""
  classes = {"unet": UNetSizes, "vae": VaeSizes, "text": TextSizes, "image": ImageSizes, "vit": VitSizes}
  sections = {part: config.backbone.get(part, {}) for part in classes}
  problems = [fields.misfit(cls, sections[part], f"config.backbone.{part}") for part, cls in classes.items()]
  if problems := list(filter(None, problems)):
    raise UserError("; ".join(problems) + ".")
  arguments = {part: _rest(section, ()) for part, section in sections.items()}
  arguments["unet"] |= {key: arguments["unet"].get(key) or None for key in ("num_heads", "head_width")}
  return BackboneSizes(**{part: cls(**arguments[part]) for part, cls in classes.items()})


def _method_setup(config: ConfigDict, classes: tuple[str, ...], training: bool) -> MethodSetup:
  """The constructor argument shared by all methods."""
  backbones = sizes(config)
  policy = config.backbone.remat_policy
  check_choice("config.backbone.attention", config.backbone.attention, IMPLEMENTATIONS)
  check_choice("config.backbone.remat_policy", policy, tuple(REMAT_POLICIES))
  if not config.backbone.remat and policy != "full":
    raise UserError(
      f"config.backbone.remat_policy={policy!r} has no effect with backbone.remat=False; set one or the other."
    )
  sources = (config.method.get("tokenizer", ""), config.init.pretrained, config.init.get("clip", ""))
  # One additional token shows whether a sentence is truncated.
  length = config.method.get("token_length", backbones.text.positions - 1) + 1
  return MethodSetup(
    **backbones._asdict(),
    common=Common(dtype(config, "dtype"), dtype(config, "param_dtype"), InitKeys(config.seed), config.optim.norm_group),
    class_names=tuple(classes),
    tokenize=Tokenize(sources, backbones.text.vocab_size, length, backbones.text.padding),
    training=training,
    attention=config.backbone.attention,
    remat=policy if config.backbone.remat else None,
  )


def _builder(config: ConfigDict, task: Task, classes: tuple[str, ...], training: bool) -> ModelBuilder:
  """The model with initial values from `config.seed`."""
  setup = _method_setup(config, classes, training)
  known = METHODS.get(config.method.get("name"))
  method = fields.look_up(METHODS, config.method, "method", more=known.text_options if known else ())
  neck = fields.look_up(NECKS, config.neck, "neck")
  head = fields.look_up(HEADS, config.head, "head", required=task.output)
  return ModelBuilder(
    setup,
    Part(method, tuple(_rest(config.method, ("name", *method.text_options)).items())),
    Part(neck, tuple(_rest(config.neck).items())),
    Part(head, tuple((_rest(config.head) | task.output).items())),
  )


def assemble(config: ConfigDict, *, training: bool = True) -> Experiment:
  """Looks up all names, builds the model without arrays, and resolves all rules for parameter names.

  Args:
    config: of the run.
    training: False omits the training-only parts of a method; rules are still resolved with them, and may be unused.

  Raises:
    ValueError: in one line, for an unknown name, an option of the wrong type, a rule without effect, incompatible
      parts, or groups that do not divide the batch.
  """
  loader.check(config)
  fields.check(config)
  fields.look_up(optim.SCHEDULES, config.optim.schedule, "optim.schedule")
  data = fields.look_up(DATASETS, config.data, "data", more=NOT_OF_THE_DATASET)
  info = data.info(config.data)
  classes, task = info.classes, _task(config, info)
  _check_test_time(config, task)
  spec = params_lib.described(_builder(config, task, classes, training=True))
  _check_groups(config, spec)
  _check_unused(config, spec)
  rules = config.optim.lr_groups, config.optim.decay_groups
  groups = optim.groups(spec.params, *rules, allow_unused=not training)
  kernels = lora.targets(groups.lr, spec.shapes, config.lora.rank, tuple(config.lora.targets))
  trained = {f"{lora.PREFIX}{kernel}/{part}": kernel for kernel in kernels for part in "ab"}
  groups = optim.with_lora(groups, lora.UNET, trained, config.lora.lr) if kernels else groups
  rate = optim.schedule(**loader.schedule(config), lr=config.optim.lr)
  options = {k: config.optim[k] for k in ("decay", "b1", "b2", "epsilon", "clip_norm", "moments")}
  optimizer = optim.optimizer(rate, groups, **options, seed=config.seed)
  if not training and spec.model.method.training_only:
    spec = params_lib.described(_builder(config, task, classes, training=False))
  elif training and config.lora.rank:
    spec = _with_lora(config, spec, kernels)
  spec = _with_frozen_dtype(config, spec, groups, excluded=() if training else kernels)
  keys = ("image", *sorted(task.needs | spec.model.method.needs))
  return Experiment(spec, task, groups, rate, optimizer, classes, keys)


def _with_lora(config: ConfigDict, spec: params_lib.ModelSpec, kernels: list[str]) -> params_lib.ModelSpec:
  """The model with the LoRA factors of `config.lora`."""
  options = {"rank": config.lora.rank, "alpha": config.lora.alpha, "seed": config.seed}
  return lora.adapted(spec, kernels, **options, dtype=dtype(config, "param_dtype"))


def _with_frozen_dtype(
  config: ConfigDict, spec: params_lib.ModelSpec, groups: optim.Groups, excluded: Collection[str]
) -> params_lib.ModelSpec:
  """The model with frozen arrays in `config.frozen_dtype`, except for statistics and the `excluded` arrays.

  Kernels into which LoRA is merged are excluded: most of the LoRA update would be lost by rounding.
  """
  check_choice("config.frozen_dtype", config.frozen_dtype, FROZEN_DTYPES)
  if config.frozen_dtype == FROZEN_DTYPES[0]:
    return spec
  frozen = spec.shapes.keys() - groups.lr.keys() - spec.stats - set(excluded)
  return spec.stored_in(DTYPES[config.frozen_dtype], frozen)


def _task(config: ConfigDict, info: DatasetInfo) -> Task:
  """The task, with the arguments that the data set determines."""
  known = TASKS.get(config.task.get("name"))
  determined = known.dataset_options(info, config.data.name) if known else {}
  if overridden := [name for name in determined if name in config.task]:
    raise UserError(f"config.task.{overridden[0]} is determined by data set {config.data.name!r}; leave it out.")
  return fields.look_up(TASKS, config.task, "task", given=determined)(**_rest(config.task), **determined)


def with_chosen_parts(config: ConfigDict, overrides: Collection[str]) -> ConfigDict:
  """Removes options that a neck or head selected on the command line does not accept.

  Args:
    config: with the overrides applied.
    overrides: dotted fields set on the command line; these are kept, and raise later if they are not accepted.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for part, classes in (("neck", NECKS), ("head", HEADS)):
      if f"{part}.name" in overrides and config[part].name in classes:
        accepted = fields.arguments(classes[config[part].name])
        for field in [*config[part]]:
          if field not in ("name", *accepted) and f"{part}.{field}" not in overrides:
            del config[part][field]
  return config.lock()


def _check_test_time(config: ConfigDict, task: Task) -> None:
  """Validates `eval.test_time`, the options that belong to the test-time protocol, and `eval.checkpoint`."""
  if task.test_time_protocol == "sliding":
    sliding_window.parse(config.eval.test_time)
    option, choices = "small_images", sliding_window.SMALL_IMAGE_MODES
  else:
    tta.parse(config.eval.test_time, task.test_time_protocol)
    option, choices = "coverage", tta.COVERAGES
  check_choice(f"eval.{option}", config.eval.get(option), choices)
  check_choice("eval.blend", config.eval.get("blend"), blending.BLENDS)
  check_choice("eval.checkpoint", config.eval.get("checkpoint"), CHECKPOINTS)
  defaults = {} if task.test_time_protocol in ("windows", "sliding") else {"blend": "mean", "coverage": "full"}
  if idle := [f"eval.{name}={config.eval[name]!r}" for name, x in defaults.items() if config.eval[name] != x]:
    raise UserError(f"{', '.join(idle)}: no effect with task {config.task.name!r}; leave it at its default.")
  if unused := [other for other in ("coverage", "small_images") if other != option and other in config.eval]:
    raise UserError(f"config.eval does not take {unused} with task {config.task.name!r}; remove or correct them.")


def _check_groups(config: ConfigDict, spec: params_lib.ModelSpec) -> None:
  """Checks that groups of batch statistics and loss divide every micro-batch."""
  batch, accumulation = config.data.batch_size, config.optim.accumulation
  if accumulation < 1 or batch % accumulation:
    raise UserError(f"config.optim.accumulation={accumulation} must divide config.data.batch_size={batch}.")
  for field in ("norm_group", "loss_group"):
    group = config.optim[field]
    if not group and accumulation > 1 and (field == "loss_group" or spec.stats):
      raise UserError(
        f"config.optim.{field}=0, the whole batch, cannot be accumulated over {accumulation} parts; "
        f"set it to a divisor of {batch // accumulation}, or config.optim.accumulation=1."
      )
    if group and (batch // accumulation) % group:
      raise UserError(
        f"config.optim.{field}={group} must divide the {batch // accumulation} images of "
        f"{'a part of the' if accumulation > 1 else 'the'} batch."
      )


def _check_unused(config: ConfigDict, spec: params_lib.ModelSpec) -> None:
  """Rejects sources of weights and texts that no part of the model uses."""
  has = lambda *prefixes: any(name.startswith(prefixes) for name in spec.shapes)
  has_class_prompt = config.method.get("prompt", "") == "scene_class"  # in prediction CLIP may predict it
  clip = has("method/text_encoder/", "method/image_encoder/", "method/class_predictor/") or has_class_prompt
  used = {
    "data.captions": spec.model.method.sentence_tokens,
    "init.clip": clip or spec.model.method.sentence_tokens,
    "init.vit": has("method/vit_model/"),
    "method.class_vectors": has("method/class_vectors"),
    "method.templates": has("method/class_vectors"),
    "method.tokenizer": clip or has("method/class_vectors") or spec.model.method.sentence_tokens,
  }
  options = {field: config[field.split(".")[0]].get(field.split(".")[1], "") for field in used}
  if unused := [f"config.{field}={value!r}" for field, value in options.items() if value and not used[field]]:
    raise UserError(f"{', '.join(unused)}: nothing of method {config.method.name!r} reads this; leave it out.")


def dataset(config: ConfigDict, exp: Experiment) -> Dataset:
  """Opens the data set.

  Raises:
    ValueError: missing files, or it does not provide what method and task need.
  """
  data = DATASETS[config.data.name](**_rest(config.data, NOT_OF_THE_DATASET))
  if config.data.get("captions"):
    data = captions.Captioned(data, config.data.captions)
  missing = sorted(
    (set(exp.keys) | exp.method.prepare_inputs | exp.task.eval_needs) - data.provides - exp.method.prepare_outputs
  )
  if missing:
    remedy = "Set config.data.scene to one name for all images." if "scene" in config.data else "Choose another."
    if missing == ["sentence"] and "captions" in config.data:
      remedy = "Set config.data.captions to a file of them."
    raise UserError(
      f"method {config.method.name!r} and task {config.task.name!r} need {missing}, but data set "
      f"{config.data.name!r} provides {sorted(data.provides)}. {remedy}"
    )
  return data


def batch_keys(exp: Experiment, data: Dataset) -> tuple[str, ...]:
  """Keys of a Batch: those that the experiment needs, and "valid_size" if the data set pads its images."""
  return (*exp.keys, *sorted(data.provides & {"valid_size"}))


def only_resizes(config: ConfigDict) -> bool:
  """Whether the data set only resizes images to `data.crop`, in training and in evaluation."""
  return DATASETS[config.data.name].info(config.data).only_resizes


def sentence_lines(exp: Experiment, data: Dataset, splits: tuple[str, ...] = ("train", "eval")) -> list[str]:
  """Lines for the start-up report: the number of truncated sentences, for data sets that know all their sentences."""
  summary = exp.method.sentence_summary
  if summary is None:
    return []
  sentences = {split: data.source(split).sentences() for split in splits}
  return [f"{split}: {summary(texts)}" for split, texts in sentences.items() if texts]


def model_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of every array of the model by name, without LoRA factors, in `param_dtype`."""
  spec = assemble(loader.changed(config, {"frozen_dtype": FROZEN_DTYPES[0]})).spec
  return {name: spec.shapes[name] for name in spec.paths}
