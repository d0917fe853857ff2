"""Method, neck, head, task and optimizer for human pose, by method.

No paper has published its pose code. The recipe is that of ViTPose, which the MetaPrompts authors cite. Whatever they
leave open is an assumption, and each assumption is an option.
"""

from vpd_jax.config.fields import Section
from vpd_jax.config.presets.depth import eco_depth, iedp_depth, meta_prompts_depth, tadp_depth, vpd_depth
from vpd_jax.config.presets.recipe import adamw, no_decay_for_vectors


def pose_task(*, sigma: int) -> Section:
  """The section task: mmpose's loss, decoding and scores.

  Args:
    sigma: standard deviation of the targets, in heatmap pixels. Release: 2 at 256 x 192, proportional to the size.
  """
  return {
    "name": "pose",
    "sigma": sigma,
    "blur": 0,  # kernel size before decoding; 0: 6 sigma - 1, i.e. 11 and 17 for the released 2 and 3
    "shift_flipped": False,  # True if data.udp is False
    "score_above": 0.2,
    "nms": 0.9,
  }


def vpd_pose(*, tiny: bool, head_init: str = "released") -> Section:
  """The sections method, neck and head of VPD for pose: the UNet attends to the names of all keypoints.

  Args:
    tiny: random class vectors instead of those of the weights.
    head_init: see heads/keypoints.py; "released" suits pretrained weights, "fan_in" training from scratch.
  """
  method = vpd_depth(tiny=tiny, head_init="released")["method"]
  return {
    "method": method | {"prompt": "all_classes", "templates": "a photo of a {}"},
    "neck": {"name": "none"},
    "head": {"name": "simple", "stride": 8, "init": head_init},  # the finest map; that of ViTPose has stride 16
  }


def meta_prompts_pose(*, tiny: bool, head_init: str = "released") -> Section:
  """The sections method, neck and head of MetaPrompts for pose: segmentation's prompts and neck, with a custom head.

  Args:
    tiny: width of the small head.
    head_init: see `vpd_pose`.
  """
  # The image is not resized: if a side is not a multiple of 64, the UNet resizes the maps that it concatenates.
  method = meta_prompts_depth(tiny=tiny, head_init="released", resize_scale=-1)["method"]
  return {
    "method": method
    | {
      "prompts": 150,  # as in segmentation; 17 for the head "direct"
      "share_prompts": True,
      "adapt_prompts": False,
    },
    "neck": {"name": "einsum_levels"},
    "head": {"name": "fused", "width": 32 if tiny else 256, "init": head_init},  # "simple", "classic", "direct"
  }


def iedp_pose(*, tiny: bool, head_init: str = "released") -> Section:
  """The sections method, neck and head of IEDP for pose, and its options of init; one sentence for all crops.

  Args:
    tiny: random CLIP towers.
    head_init: see `vpd_pose`.
  """
  depth, vpd = iedp_depth(tiny=tiny, head_init="released"), vpd_pose(tiny=tiny, head_init=head_init)
  return {
    "init": depth["init"],
    "method": depth["method"] | {"sentence": "a photo of a person"},
    "neck": vpd["neck"],
    "head": vpd["head"],
  }


def eco_depth_pose(*, tiny: bool, head_init: str = "released") -> Section:
  """EcoDepth's context with VPD's head for pose; see `depth.eco_depth`.

  Args:
    tiny: a random classifier.
    head_init: see `vpd_pose`.
  """
  vpd = vpd_pose(tiny=tiny, head_init=head_init)
  return {**eco_depth(tiny=tiny, head_init="released"), "neck": vpd["neck"], "head": vpd["head"]}


def tadp_pose(*, tiny: bool, head_init: str = "released") -> Section:
  """TADP's context, a caption of the picture of each person, with VPD's head for pose; see `depth.tadp_depth`.

  Args:
    tiny: a random text encoder and a placeholder tokenizer.
    head_init: see `vpd_pose`.
  """
  vpd = vpd_pose(tiny=tiny, head_init=head_init)
  return {**tadp_depth(tiny=tiny, head_init="released"), "neck": vpd["neck"], "head": vpd["head"]}


def pose_optimizer(*, lr: float, drops: tuple[int, ...], warmup: int = 500) -> Section:
  """AdamW as in ViTPose's recipes, with a learning rate for the UNet instead of layer-wise decay.

  Args:
    lr: largest learning rate. Release: 5e-4 at a global batch of 512.
    drops: steps at which the rate is divided by 10. Release: after 170 and 200 of 210 epochs.
    warmup: steps. Release: 500.

  Source: ViTPose configs/body/2d_kpt_sview_rgb_img/topdown_heatmap/coco/ViTPose_base_coco_256x192.py.
  """
  section = adamw(
    lr=lr,
    decay=0.1,
    schedule={"name": "step", "drops": drops, "factor": 0.1, "warmup": warmup, "warmup_ratio": 1e-3},
    lr_groups=((r"/vae/", None), (r"/unet/", 0.1), (r"", 1.0)),
    decay_groups=no_decay_for_vectors(),
  )
  return section | {"clip_norm": 1.0}
