"""Functions that return the sections of a config, shared by the config files."""

from vpd_jax.config.presets.backbones import backbone, clip_image, rooms_small, sd21, sd_tiny, sd_v1, sizes, vit
from vpd_jax.config.presets.depth import (
  eco_depth,
  eco_depth_recipe,
  iedp_assumptions,
  iedp_depth,
  meta_prompts_depth,
  vpd_depth,
)
from vpd_jax.config.presets.recipe import adamw, evaluation, no_decay_for_vectors, run, sliding_window_evaluation
from vpd_jax.config.presets.referring import (
  eco_depth_referring,
  iedp_referring,
  meta_prompts_referring,
  referring_optimizer,
  vpd_referring,
)
from vpd_jax.config.presets.registry import methods, sections
from vpd_jax.config.presets.segmentation import (
  eco_depth_segmentation,
  iedp_segmentation,
  meta_prompts_segmentation,
  segmentation_optimizer,
  vpd_segmentation,
)

__all__ = [
  "adamw",
  "backbone",
  "clip_image",
  "eco_depth",
  "eco_depth_recipe",
  "eco_depth_referring",
  "eco_depth_segmentation",
  "evaluation",
  "iedp_assumptions",
  "iedp_depth",
  "iedp_referring",
  "iedp_segmentation",
  "meta_prompts_depth",
  "meta_prompts_referring",
  "meta_prompts_segmentation",
  "methods",
  "no_decay_for_vectors",
  "referring_optimizer",
  "rooms_small",
  "run",
  "sd21",
  "sd_tiny",
  "sd_v1",
  "sections",
  "segmentation_optimizer",
  "sizes",
  "sliding_window_evaluation",
  "vit",
  "vpd_depth",
  "vpd_referring",
  "vpd_segmentation",
]
