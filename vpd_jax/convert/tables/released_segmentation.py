"""The authors' checkpoints of semantic segmentation: VPD on ADE20K, MetaPrompts on ADE20K and Cityscapes.

mmsegmentation saves them, wrapped in `state_dict` beside a `meta`. The files also hold a shell of Stable Diffusion,
"sd_model", with the constants of its noise schedule, which no computation uses: they are left out on reading and
written anew on export.

Source: VPD segmentation/models/vpd_seg.py, class VPDSeg; MetaPrompts segmentation/models/model.py, class
MetaPromptsSeg.
"""

import functools
import re

import numpy as np

from vpd_jax.convert.rules import BATCH_NORM, DROP_COUNTERS, LAYER, Drop, Rule, drop, plain
from vpd_jax.convert.tables import stable_diffusion
from vpd_jax.types import Fields, Options

WRAPPER = "state_dict"  # under which mmsegmentation looks for weights
# Prefixes that no other release has.
SIGNATURES = {"meta_prompts_segmentation": "upconv1.", "vpd_segmentation": "class_embeddings"}
MOST_STEPS = 9  # of refinement; each has a rule of its own
_UNET = "unet.unet.diffusion_model"
_LAST_BLOCK = f"{_UNET}.out"
# The UNet's last block, and its further names.
SHARED = (_LAST_BLOCK, rf"cross_unet_conv\d+|{re.escape(_LAST_BLOCK)}")
_SHELL = "sd_model"

# The order in which the models and mmseg's heads register their children.
ORDER = (
  "sd_model "
  "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
  "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod "
  "posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 "
  "text_adapter upconv1 upconv2 upconv3 upconv4 neck decode_head auxiliary_head "
  "conv_seg psp_modules bottleneck lateral_convs fpn_convs fpn_bottleneck convs scale_heads conv bn"
)


def _mmseg_head(name: str) -> Rule:
  return Rule(name, f"head/{name}", (*LAYER, *BATCH_NORM))


def _not_ours() -> list[Drop]:
  return [
    drop(rf"{_SHELL}\..*", "constants of the noise schedule", optional=True),
    DROP_COUNTERS,
  ]


def vpd_segmentation() -> list[Rule | Drop]:
  """VPD on ADE20K. The UNet's last block is in the files and used by nothing."""
  return [
    Rule("gamma", "method/gamma", (plain,)),
    Rule("class_embeddings", "method/class_vectors", (plain,)),
    *stable_diffusion.first_stage("encoder_vq"),
    *stable_diffusion.unet(_UNET, out=True),
    Rule("text_adapter", "method/text_adapter"),
    Rule("neck", "neck"),
    _mmseg_head("decode_head"),
    *_not_ours(),
  ]


def meta_prompts_segmentation() -> list[Rule | Drop]:
  """MetaPrompts on ADE20K and Cityscapes, of any number of refinement steps.

  The steps are numbered from 1 and share their prompts. The UNet's last block is repeated as "cross_unet_conv<i>" for
  every step after the first: the UNet's own name for it, which files of one step have too, is the one that is read.
  The layers for the time are in the files and used by nothing.
  """
  return [
    *(Rule(f"t{i}", f"method/t/{i - 1}", (plain,), optional=i > 1) for i in range(1, MOST_STEPS + 1)),
    Rule("meta_prompts", "method/meta_prompts/0", (plain,)),
    drop(r"cross_unet_conv\d+\..*", "the same module as the UNet's last block", optional=True),
    *stable_diffusion.first_stage("encoder_vq"),
    *stable_diffusion.unet(_UNET, out=True),
    *(Rule(f"upconv{i}", f"neck/upconv{i}") for i in range(1, 5)),
    _mmseg_head("decode_head"),
    _mmseg_head("auxiliary_head"),
    *_not_ours(),
  ]


def repeated(entries: Options) -> dict[str, Fields]:
  """Entries of a release of segmentation that stand for no array of ours: repeated ones, and the constants.

  Args:
    entries: {shape, dtype} by name of all that do; of any release, there are none for the others.
  """
  if not any(name.startswith("decode_head.") for name in entries):
    return {}
  steps = sum(f"t{i}" in entries for i in range(1, MOST_STEPS + 1))
  found = {name: {"shape": list(value.shape), "dtype": value.dtype.name} for name, value in constants().items()}
  for name in [name for name in entries if name.startswith(f"{_LAST_BLOCK}.")]:
    for step in range(2, steps + 1):
      other = name.replace(_LAST_BLOCK, f"cross_unet_conv{step}")
      found[other] = entries[name] | {"alias_of": name}
  return found


def resolved(entry: Options) -> Options:
  """An entry of a list of names, shapes and dtypes, told of which array of ours it is, whatever the list says."""
  if entry["name"].startswith(f"{_LAST_BLOCK}."):
    return {key: value for key, value in entry.items() if key != "alias_of"}
  block, _, leaf = entry["name"].partition(".")
  return {**entry, "alias_of": f"{_LAST_BLOCK}.{leaf}"} if re.fullmatch(r"cross_unet_conv\d+", block) else entry


@functools.cache
def constants() -> dict[str, np.ndarray]:
  """What the shell of Stable Diffusion 1.x holds, by the names in the files: float32 [1000] each.

  1000 steps of noise whose deviations grow linearly, from 0.00085^(1/2) to 0.012^(1/2); computed in float64.

  Source: CompVis ldm/models/diffusion/ddpm.py DDPM.register_schedule, ldm/modules/diffusionmodules/util.py
  make_beta_schedule; configs/stable-diffusion/v1-inference.yaml.
  """
  betas = np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2
  kept = np.cumprod(1 - betas)
  before = np.append(1.0, kept[:-1])
  variance = betas * (1 - before) / (1 - kept)
  values = {
    "betas": betas,
    "alphas_cumprod": kept,
    "alphas_cumprod_prev": before,
    "sqrt_alphas_cumprod": np.sqrt(kept),
    "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - kept),
    "log_one_minus_alphas_cumprod": np.log(1 - kept),
    "sqrt_recip_alphas_cumprod": np.sqrt(1 / kept),
    "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / kept - 1),
    "posterior_variance": variance,
    "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
    "posterior_mean_coef1": betas * np.sqrt(before) / (1 - kept),
    "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - kept),
  }
  return {f"{_SHELL}.{name}": value.astype(np.float32) for name, value in values.items()}
