"""The authors' fine-tuned checkpoints: Stable Diffusion's table under a prefix, plus adapter, neck and head."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vpd_jax.convert.formats.lazy_tensor import LazyTensor
from vpd_jax.convert.rules import (
  BATCH_NORM,
  COUNTER,
  DROP_COUNTERS,
  LAYER,
  Drop,
  Rule,
  Shaped,
  bias,
  conv,
  deconv,
  export,
  norm,
  plain,
  to_source,
)
from vpd_jax.convert.tables import released_referring, released_segmentation, released_tadp, stable_diffusion, vit
from vpd_jax.errors import UserError
from vpd_jax.types import Fields, Options

AnyShaped = TypeVar("AnyShaped", bound=Shaped)
_UNET = "encoder.unet.unet.diffusion_model"
_BARE_UNET = "encoder.unet"
_CIDE = "encoder.cide_module"
_LAST_BLOCK = "encoder.cross_unet_conv2"  # the first name of the last block of MetaPrompts' UNet
MAX_STEPS = released_segmentation.MAX_STEPS


def _deconvolutions(source: str, target: str) -> list[Rule]:
  """Transposed convolutions followed by convolutions, all with batch normalization."""
  return [
    Rule(f"{source}.deconv_layers", f"{target}/deconv_layers", (deconv, norm, bias, *BATCH_NORM)),
    Rule(f"{source}.conv_layers", f"{target}/conv_layers", (conv, norm, bias, *BATCH_NORM)),
  ]


def _depth_head() -> list[Rule]:
  return [*_deconvolutions("decoder", "head"), Rule("last_layer_depth", "head/last_layer_depth")]


def vpd_depth() -> list[Rule | Drop]:
  """VPD on NYU Depth v2. Source: VPD depth/models_depth/model.py, class VPDDepth."""
  return [
    Rule("encoder.gamma", "method/gamma", (plain,)),
    Rule("encoder.class_embeddings", "method/class_vectors", (plain,)),
    Rule("encoder.layer1", "neck/layer1"),
    Rule("encoder.layer2", "neck/layer2"),
    Rule("encoder.out_layer", "neck/out_layer"),
    *stable_diffusion.first_stage("encoder.encoder_vq"),
    *stable_diffusion.unet(_UNET, out=False),
    Rule("encoder.text_adapter", "method/text_adapter"),
    *_depth_head(),
    DROP_COUNTERS,
  ]


def tadp_depth() -> list[Rule | Drop]:
  """TADP on NYU Depth v2: VPD's table without its context, and the complete Stable Diffusion."""
  context = ("encoder.gamma", "encoder.class_embeddings", "encoder.text_adapter")
  rest = [rule for rule in vpd_depth() if isinstance(rule, Drop) or rule.source not in context]
  return [*rest, *released_tadp.depth_alone()]


def eco_depth_depth(unet: str = _UNET) -> list[Rule | Drop]:
  """EcoDepth on NYU Depth v2 and KITTI. Source: EcoDepth depth/models/model.py, class EcoDepth (v1.0.0).

  The classifier of ImageNet is part of the file.

  Args:
    unet: prefix of the UNet's names.
  """
  return [
    *(Rule(f"{_CIDE}.{name}", f"method/{name}", (plain,), optional=True) for name in ("embeddings", "gamma")),
    *vit.classifier(f"{_CIDE}.vit_model.", "method/vit_model/"),
    # Missing from files whose context is the class token.
    Rule(f"{_CIDE}.fc", "method/fc", optional=True),
    Rule(f"{_CIDE}.embedding_adapter", "method/text_adapter", optional=True),
    Rule("encoder.layer1", "neck/layer1"),
    Rule("encoder.layer2", "neck/layer2"),
    Rule("encoder.out_layer", "neck/out_layer"),
    *stable_diffusion.first_stage("encoder.encoder_vq"),
    *stable_diffusion.unet(unet, out=False),
    *_depth_head(),
    DROP_COUNTERS,
  ]


def eco_depth_v2_depth() -> list[Rule | Drop]:
  """EcoDepth's later files, whose UNet has no wrapper. Source: EcoDepth model.py (v2.0.0)."""
  return eco_depth_depth(unet=_BARE_UNET)


def meta_prompts_depth() -> list[Rule | Drop]:
  """MetaPrompts on NYU Depth v2 and KITTI. Source: MetaPrompts depth/models_depth/model.py, class VPDDepth.

  The steps are numbered from 1; the parts of later ones are optional. The UNet's last block is one module with several
  names. Its first registered name, "cross_unet_conv2", is the one that is read and that its gradients have; an export
  repeats it under all names, see `manifest`.
  """
  steps = [
    Rule(f"encoder.{name}{i}", f"method/{name}/{i - 1}", leaves, optional=i > 1)
    for i in range(1, MAX_STEPS + 1)
    for name, leaves in (("t", (plain,)), ("meta_prompts", (plain,)), ("text_adapter", LAYER))
  ]
  repeated = "the same module as cross_unet_conv2"
  return [
    *steps,
    Rule("encoder.layer1", "neck/layer1"),
    *(rule for name in ("layer2", "layer3", "layer4") for rule in _deconvolutions(f"encoder.{name}", f"neck/{name}")),
    Rule("encoder.out_layer", "neck/out_layer"),
    *stable_diffusion.first_stage("encoder.encoder_vq"),
    *(Rule(f"{_UNET}.{part}", f"method/unet/{part}") for part in ("input_blocks", "middle_block", "output_blocks")),
    Rule(_LAST_BLOCK, "method/unet/out", optional=True),
    Drop(r"encoder\.cross_unet_conv([3-9]|[1-9]\d+)\..*", repeated, optional=True),
    Drop(rf"{re.escape(_UNET)}\.out\..*", repeated, optional=True),
    *_depth_head(),
    DROP_COUNTERS,
  ]


# For modules with several names: the name in the table, and a pattern of the others. A file may have any one of them.
SHARED = {
  "meta_prompts_depth": (_LAST_BLOCK, rf"encoder\.cross_unet_conv\d+|{re.escape(_UNET)}\.out"),
  "meta_prompts_segmentation": released_segmentation.SHARED,
}
TABLES = {
  "eco_depth_depth": eco_depth_depth,
  "eco_depth_v2_depth": eco_depth_v2_depth,
  "meta_prompts_depth": meta_prompts_depth,
  "vpd_depth": vpd_depth,
  "meta_prompts_segmentation": released_segmentation.meta_prompts_segmentation,
  "vpd_segmentation": released_segmentation.vpd_segmentation,
  "vpd_refer": released_referring.vpd_refer,
  "tadp_depth": tadp_depth,
  "tadp_segmentation": released_tadp.tadp_segmentation,
}
TASKS = {"referring": "refer"}  # Task names in TABLES that differ from ours.
# A name prefix that identifies a release; the first match counts.
SIGNATURES = {
  **released_tadp.SIGNATURES,  # before VPD's, whose prefix the one for depth also has
  "eco_depth_v2_depth": f"{_BARE_UNET}.input_blocks.",
  "eco_depth_depth": f"{_CIDE}.",
  "meta_prompts_depth": "encoder.meta_prompts1",
  "vpd_depth": f"{_UNET}.",
  **released_segmentation.SIGNATURES,
  "vpd_refer": released_referring.SIGN,
}
# Arrays that a released file need not contain, as patterns for "/" + name: CLIP's towers, which are loaded from CLIP.
CLIP = (r"^/method/text_encoder/", r"^/method/class_predictor/")
# The key of the weights in a .pth of the authors, if it is not "model".
WRAPPERS = dict.fromkeys(
  (*released_segmentation.SIGNATURES, "tadp_segmentation", "eco_depth_v2_depth"), released_segmentation.WRAPPER
)

# The registration order of the children of the authors' modules. One list suffices, because no two modules conflict.
_ORDER = (
  "embeddings gamma vit_model fc embedding_adapter vit encoder decoder last_layer_depth "
  + "".join(f"t{i} meta_prompts{i} " for i in range(1, MAX_STEPS + 1))
  + "meta_prompts class_embeddings layer1 layer2 layer3 layer4 out_layer cide_module text_adapter1 "
  + "".join(f"cross_unet_conv{i} text_adapter{i} " for i in range(2, MAX_STEPS + 1))
  + f"encoder_vq unet {released_segmentation.ORDER} "
  "conv_in down mid norm_out conv_out quant_conv post_quant_conv "
  "block attn downsample block_1 attn_1 block_2 "
  "time_embed input_blocks middle_block output_blocks out "
  "in_layers emb_layers out_layers skip_connection "
  "norm q k v proj_in transformer_blocks proj_out "
  "attn1 ff attn2 norm1 conv1 norm2 conv2 norm3 nin_shortcut to_q to_k to_v to_out "
  "deconv_layers conv_layers "
  "cls_token position_embeddings patch_embeddings query key value "
  "attention intermediate output layernorm_before layernorm_after layernorm "
  f"{released_referring.ORDER} {released_tadp.ORDER} "
  "weight bias running_mean running_var num_batches_tracked "
)
_RANK = {word: rank for rank, word in enumerate(_ORDER.split())}


def of(method: str, task: str, version: str = "") -> str:
  """The key of TABLES for a config.

  Args:
    method, task: of the config.
    version: of the release, such as "v2"; empty for the first.

  Raises:
    ValueError: if the method has no release for this task.
  """
  release = "_".join(filter(None, (method, version, TASKS.get(task, task))))
  if release not in TABLES:
    raise UserError(f"there is no released checkpoint of {release!r}; there is one of each of {sorted(TABLES)}.")
  return release


def inside(named: Mapping[str, AnyShaped], rules: list[Rule | Drop]) -> dict[str, AnyShaped]:
  """The arrays of a model, or their shapes, that a released file contains according to its table."""
  clip = lambda name: any(re.search(pattern, "/" + name) for pattern in CLIP)
  in_table = lambda name, x: any(isinstance(rule, Rule) and rule.to_source(name, len(x.shape)) for rule in rules)
  return {name: x for name, x in named.items() if not clip(name) or in_table(name, x)}


def named_for(release: str, source: Mapping[str, LazyTensor], targets: Iterable[str]) -> dict[str, LazyTensor]:
  """The tensors of a file, with the name in the table added for modules with several names.

  Args:
    release: key of TABLES.
    source: tensors by name.
    targets: our names of the model's arrays; a model without the module needs no such name.
  """
  name, others = SHARED.get(release, ("", ""))
  if not name or not any(target.startswith("method/unet/out/") for target in targets):
    return dict(source)
  renamed = {f"{name}.{match[2]}": x for n, x in source.items() if (match := re.fullmatch(rf"({others})\.(.+)", n))}
  return renamed | dict(source)


def manifest(shapes: Mapping[str, Shaped], rules: list[Rule | Drop]) -> list[Fields]:
  """Entries {name, shape, dtype} of the authors' state dict, in its order, for a model of the given shapes.

  Args:
    shapes: all arrays of the model by our names; anything with `.shape`.
    rules: the table.

  Returns:
    The entries; one that repeats another has its name in "alias_of".
  """
  phantoms = {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in shapes.items()}
  entries = {
    name: {"shape": list(array.shape), "dtype": "float32"} for name, array in to_source(phantoms, rules).items()
  }
  for name in [name for name in entries if name.endswith(".running_var")]:
    entries[f"{name.removesuffix('running_var')}{COUNTER}"] = {"shape": [], "dtype": "int64"}
  steps = sum(f"encoder.t{i}" in entries or f"encoder.meta_prompts{i}" in entries for i in range(1, MAX_STEPS + 1))
  others = (*(f"encoder.cross_unet_conv{i}" for i in range(3, steps + 1)), f"{_UNET}.out")
  for name in [name for name in entries if name.startswith(f"{_LAST_BLOCK}.")]:
    entries |= {name.replace(_LAST_BLOCK, other): entries[name] | {"alias_of": name} for other in others}
  entries |= released_segmentation.repeated(entries) | released_tadp.repeated(entries)
  return [{"name": name, **entries[name]} for name in sorted(entries, key=_place)]


def state_dict(
  named: Mapping[str, npt.ArrayLike], rules: list[Rule | Drop], entries: Sequence[Options], step: int
) -> dict[str, np.ndarray]:
  """The authors' state dict of our arrays: `rules.export`, with the constants that some releases also contain.

  Args:
    named: all arrays of the model by our names: trained, frozen and statistics.
    rules: the table.
    entries: of `manifest`, or of another list in this format.
    step: number of finished steps.

  Raises:
    ConversionError: for unfilled entries, arrays without an entry and wrong shapes; lists all problems.
  """
  constants = released_segmentation.constants() | released_tadp.constants()
  constant_names = {
    e["name"] for e in entries if e["name"] in constants and constants[e["name"]].shape == tuple(e["shape"])
  }
  resolved = lambda entry: released_segmentation.resolved(released_tadp.resolved(entry))
  other_entries = [resolved(entry) for entry in entries if entry["name"] not in constant_names]
  exported = export(named, rules, other_entries, step)
  value = lambda entry: constants[entry["name"]].astype(entry["dtype"], copy=False)
  return {e["name"]: value(e) if e["name"] in constant_names else exported[e["name"]] for e in entries}


def _place(name: str) -> list[tuple[int, int]]:
  """Sort key of a name: numbers by value, words by _RANK, unlisted words last."""
  return [(0, int(part)) if part.isdigit() else (1, _RANK.get(part, len(_RANK))) for part in name.split(".")]
