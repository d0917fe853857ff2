"""Method, neck, head, task and optimizer for semantic segmentation, by method."""

from vpd_jax.config.fields import Section
from vpd_jax.config.presets.depth import eco_depth, iedp_depth, meta_prompts_depth, tadp_depth, vpd_depth
from vpd_jax.config.presets.recipe import adamw

ATTENTION_MAPS = {  # fields of the section method
  "attention_maps": True,
  "attention_max_size": 32,  # as for an image of 512: strides 16 and 32
  "attention_gradient": False,
}


def vpd_segmentation(*, tiny: bool, dropout: float = 0.1) -> Section:
  """The sections method, neck, head and task of VPD's segmentation, as released for ADE20K.

  Args:
    tiny: widths of the tiny network, and random class vectors instead of those of the weights.
    dropout: see heads/fpn.py.
  """
  method = vpd_depth(tiny=tiny, head_init="released")["method"]
  width = 32 if tiny else 256
  return {
    "method": method
    | {
      "prompt": "all_classes",
      "templates": "a photo of a {}",  # for class vectors encoded from the names; "imagenet_80"
      **ATTENTION_MAPS,
      "keep_unused": True,  # the released files hold the UNet's last block
    },
    "neck": {"name": "fpn", "width": width},
    "head": {"name": "fpn", "width": width, "dropout": dropout},
    "task": {"name": "segmentation", "lovasz": 0.0, "auxiliary": 0.0, "avg_non_ignore": False, "merge": ()},
  }


def meta_prompts_segmentation(*, tiny: bool, dropout: float = 0.0, refine_steps: int = 3) -> Section:
  """The sections method, neck, head and task of MetaPrompts' segmentation, as released.

  Args:
    tiny: widths of the tiny network.
    dropout: see heads/upernet.py. Release: 0.0 on ADE20K, 0.1 on Cityscapes.
    refine_steps: passes of the UNet. Release: 3, and 1 for Cityscapes with its extra frames.
  """
  method = meta_prompts_depth(tiny=tiny, head_init="released", resize_scale=-1)["method"]
  return {
    "method": method
    | {
      "prompts": 150,
      "refine_steps": refine_steps,
      "share_prompts": True,
      "adapt_prompts": False,
      "keep_unused": True,  # the released files hold the layers for the time
    },
    "neck": {"name": "einsum_levels"},
    "head": {"name": "upernet", "width": 32 if tiny else 512, "dropout": dropout},
    "task": {"name": "segmentation", "lovasz": 1.0, "auxiliary": 0.4, "avg_non_ignore": False, "merge": ()},
  }


def iedp_segmentation(*, tiny: bool, dropout: float = 0.1) -> Section:
  """The sections method, neck, head and task of IEDP's segmentation, and its options of init; see `iedp_depth`.

  Args:
    tiny: widths of the tiny network, and random CLIP towers.
    dropout: see heads/fpn.py.
  """
  depth, vpd = iedp_depth(tiny=tiny, head_init="released"), vpd_segmentation(tiny=tiny, dropout=dropout)
  return {
    "init": depth["init"],
    "method": depth["method"] | {"sentence": "names"} | ATTENTION_MAPS,  # the names of the classes in the label map
    "neck": vpd["neck"],
    "head": vpd["head"],
    "task": vpd["task"] | {"avg_non_ignore": True},
  }


def tadp_segmentation(*, tiny: bool, dropout: float = 0.1) -> Section:
  """The sections method, neck, head and task of TADP's segmentation, as released, and init; see `tadp_depth`.

  Args:
    tiny: widths of the tiny network.
    dropout: see heads/fpn.py.
  """
  depth, vpd = tadp_depth(tiny=tiny, head_init="released"), vpd_segmentation(tiny=tiny, dropout=dropout)
  return {**vpd, "init": depth["init"], "method": depth["method"] | ATTENTION_MAPS | {"keep_unused": True}}


def eco_depth_segmentation(*, tiny: bool, dropout: float = 0.1) -> Section:
  """EcoDepth's context with VPD's neck, head and task for segmentation, our own extension; see `depth.eco_depth`.

  Args:
    tiny: widths of the tiny network, and a random classifier.
    dropout: see heads/fpn.py.
  """
  vpd = vpd_segmentation(tiny=tiny, dropout=dropout)
  return {**eco_depth(tiny=tiny, head_init="released"), **{name: vpd[name] for name in ("neck", "head", "task")}}


def segmentation_optimizer(*, lr: float = 8e-5, num_steps: int = 80_000, warmup: int = 1500) -> Section:
  """AdamW as in the mmsegmentation recipes of VPD and MetaPrompts.

  The rule for names with "norm" precedes that for the UNet and sets no learning rate: the UNet's transformer norms
  train at the full rate, without decay. The norms of its residual blocks have other names and do not.

  Args:
    lr: largest learning rate.
    num_steps, warmup: of the schedule; num_steps=0 for the length of the run.

  Source: mmcv 1.7 runner/optimizer/default_constructor.py; VPD segmentation/configs/fpn_vpd_sd1-5_512x512_gpu8x2.py.
  """
  return adamw(
    lr=lr,
    decay=1e-3,
    schedule={"name": "poly", "num_steps": num_steps, "power": 1.0, "warmup": warmup, "warmup_ratio": 1e-6},
    lr_groups=((r"/vae/", None), (r"/unet/.*norm", 1.0), (r"/unet/", 0.1), (r"", 1.0)),
    decay_groups=((r"norm", 0.0), (r"", 1.0)),
  )
