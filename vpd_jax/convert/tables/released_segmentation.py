"""The authors' checkpoints of semantic segmentation: VPD on ADE20K, MetaPrompts on ADE20K and Cityscapes.

mmsegmentation saves them under `state_dict`, with a separate `meta`. The files also contain an "sd_model" of Stable
Diffusion that has only the unused constants of its noise schedule. They are dropped on loading and recomputed on
export.

Source: VPD segmentation/models/vpd_seg.py, class VPDSeg; MetaPrompts segmentation/models/model.py, class
MetaPromptsSeg.
"""

import functools
import re

import numpy as np

from vpd_jax.convert.rules import BATCH_NORM, DROP_COUNTERS, LAYER, Drop, Rule, plain
from vpd_jax.convert.tables import stable_diffusion
from vpd_jax.types import Fields, Options

WRAPPER = "state_dict"  # the key of the weights in mmsegmentation's files
# Prefixes that no other release has.
SIGNATURES = {"meta_prompts_segmentation": "upconv1.", "vpd_segmentation": "class_embeddings"}
MAX_STEPS = 9  # of refinement; each has its own rules
_UNET = "unet.unet.diffusion_model"
_LAST_BLOCK = f"{_UNET}.out"
# The UNet's last block, and a pattern of its other names.
SHARED = (_LAST_BLOCK, rf"cross_unet_conv\d+|{re.escape(_LAST_BLOCK)}")
_SD_MODEL = "sd_model"

# The registration order of the children of the models and of mmseg's heads.
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


def _dropped() -> list[Drop]:
  return [
    Drop(rf"{_SD_MODEL}\..*", "constants of the noise schedule", optional=True),
    DROP_COUNTERS,
  ]


def vpd_segmentation() -> list[Rule | Drop]:
  """VPD on ADE20K. The UNet's last block is in the files, but unused."""
  return [
    Rule("gamma", "method/gamma", (plain,)),
    Rule("class_embeddings", "method/class_vectors", (plain,)),
    *stable_diffusion.first_stage("encoder_vq"),
    *stable_diffusion.unet(_UNET, out=True),
    Rule("text_adapter", "method/text_adapter"),
    Rule("neck", "neck"),
    _mmseg_head("decode_head"),
    *_dropped(),
  ]


def meta_prompts_segmentation() -> list[Rule | Drop]:
  """MetaPrompts on ADE20K and Cityscapes, of any number of refinement steps.

  The steps are numbered from 1 and share their prompts. The UNet's last block is repeated as "cross_unet_conv<i>" for
  every step after the first; it is read by the UNet's name, which files of one step also have. The time embedding is in
  the files, but unused.
  """
  return [
    *(Rule(f"t{i}", f"method/t/{i - 1}", (plain,), optional=i > 1) for i in range(1, MAX_STEPS + 1)),
    Rule("meta_prompts", "method/meta_prompts/0", (plain,)),
    Drop(r"cross_unet_conv\d+\..*", "the same module as the UNet's last block", optional=True),
    *stable_diffusion.first_stage("encoder_vq"),
    *stable_diffusion.unet(_UNET, out=True),
    *(Rule(f"upconv{i}", f"neck/upconv{i}") for i in range(1, 5)),
    _mmseg_head("decode_head"),
    _mmseg_head("auxiliary_head"),
    *_dropped(),
  ]


def repeated(entries: Options) -> dict[str, Fields]:
  """Entries of a segmentation release that correspond to no array of ours: repeated tensors and constants.

  Args:
    entries: {shape, dtype} by name of the other entries; the result is empty for other releases.
  """
  if not any(name.startswith("decode_head.") for name in entries):
    return {}
  steps = sum(f"t{i}" in entries for i in range(1, MAX_STEPS + 1))
  result = {name: {"shape": list(value.shape), "dtype": value.dtype.name} for name, value in constants().items()}
  for name in [name for name in entries if name.startswith(f"{_LAST_BLOCK}.")]:
    for step in range(2, steps + 1):
      other = name.replace(_LAST_BLOCK, f"cross_unet_conv{step}")
      result[other] = entries[name] | {"alias_of": name}
  return result


def resolved(entry: Options) -> Options:
  """An entry {name, shape, dtype} with the correct "alias_of", independent of the one in the list."""
  if entry["name"].startswith(f"{_LAST_BLOCK}."):
    return {key: value for key, value in entry.items() if key != "alias_of"}
  block, _, leaf = entry["name"].partition(".")
  return {**entry, "alias_of": f"{_LAST_BLOCK}.{leaf}"} if re.fullmatch(r"cross_unet_conv\d+", block) else entry


@functools.cache
def constants() -> dict[str, np.ndarray]:
  """The noise schedule of Stable Diffusion 1.x by the names in the files: float32 [1000] each.

  Its 1000 steps have square roots of beta that grow linearly from 0.00085^(1/2) to 0.012^(1/2); computed in float64.

  Source: CompVis ldm/models/diffusion/ddpm.py DDPM.register_schedule, ldm/modules/diffusionmodules/util.py
  make_beta_schedule; configs/stable-diffusion/v1-inference.yaml.
  """
  betas = np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2
  alphas_cumprod = np.cumprod(1 - betas)
  alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
  variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
  values = {
    "betas": betas,
    "alphas_cumprod": alphas_cumprod,
    "alphas_cumprod_prev": alphas_cumprod_prev,
    "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
    "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
    "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
    "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
    "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
    "posterior_variance": variance,
    "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
    "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
    "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
  }
  return {f"{_SD_MODEL}.{name}": value.astype(np.float32) for name, value in values.items()}
