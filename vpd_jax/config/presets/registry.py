"""The registry of methods and their config sections by task.

A new method needs one row of METHODS: the configs of all tasks then accept its name and use the defaults of its
constructor with VPD's neck and head. SECTIONS holds the settings of the papers.
"""

from collections.abc import Callable

from vpd_jax.config.fields import Section
from vpd_jax.config.presets import depth, pose, referring, segmentation

METHODS = {  # module:class by config name
  "vpd": "vpd_jax.models.methods.vpd:Vpd",
  "meta_prompts": "vpd_jax.models.methods.meta_prompts:MetaPrompts",
  "iedp": "vpd_jax.models.methods.iedp:Iedp",
  "tadp": "vpd_jax.models.methods.tadp:Tadp",
  "eco_depth": "vpd_jax.models.methods.eco_depth:EcoDepth",
}
SECTIONS: dict[str, dict[str, Callable[..., Section]]] = {
  "depth": {
    "vpd": depth.vpd_depth,
    "meta_prompts": depth.meta_prompts_depth,
    "iedp": depth.iedp_depth,
    "tadp": depth.tadp_depth,
    "eco_depth": depth.eco_depth,
  },
  "segmentation": {
    "vpd": segmentation.vpd_segmentation,
    "meta_prompts": segmentation.meta_prompts_segmentation,
    "iedp": segmentation.iedp_segmentation,
    "tadp": segmentation.tadp_segmentation,
    "eco_depth": segmentation.eco_depth_segmentation,
  },
  "referring": {
    "vpd": referring.vpd_referring,
    "meta_prompts": referring.meta_prompts_referring,
    "iedp": referring.iedp_referring,
    "tadp": referring.tadp_referring,
    "eco_depth": referring.eco_depth_referring,
  },
  "pose": {
    "vpd": pose.vpd_pose,
    "meta_prompts": pose.meta_prompts_pose,
    "iedp": pose.iedp_pose,
    "tadp": pose.tadp_pose,
    "eco_depth": pose.eco_depth_pose,
  },
}


def methods(default: str = "vpd") -> tuple[str, ...]:
  """The config words for a method, the default first."""
  return (default, *(name for name in METHODS if name != default))


def sections(task: str, method: str, **options: object) -> Section:
  """The sections method, neck and head of a task, and further sections that the method sets.

  Args:
    task: "depth", "segmentation", "referring" or "pose".
    method: a name of METHODS.
    **options: arguments of the task's functions in SECTIONS: `tiny`, and for depth `head_init`, for segmentation
      `dropout`, for referring `token_length`.
  """
  if method in SECTIONS[task]:
    return SECTIONS[task][method](**options)
  vpd = SECTIONS[task]["vpd"](**options)
  return {name: content for name, content in vpd.items() if name != "init"} | {"method": {"name": method}}
