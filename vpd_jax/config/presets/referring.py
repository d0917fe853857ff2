"""Method, neck, head, task and optimizer for referring segmentation, by method.

Only VPD's is published. For the other methods, appending their context to the sentence's is our own extension; TADP
reads the expression in place of a caption.
"""

from vpd_jax.config.fields import Section
from vpd_jax.config.presets.depth import eco_depth, iedp_depth, tadp_depth, vpd_depth
from vpd_jax.config.presets.recipe import adamw
from vpd_jax.config.presets.segmentation import ATTENTION_MAPS, meta_prompts_segmentation


def vpd_referring(*, tiny: bool, token_length: int = 40) -> Section:
  """The sections method, neck, head and task of VPD's referring segmentation, and its options of init, as released.

  Args:
    tiny: widths of the tiny network, with a random text encoder and a placeholder tokenizer.
    token_length: tokens per sentence. Release: 40 on RefCOCO and RefCOCO+, 77 on RefCOCOg; the decoder's widths depend
      on it, so weights are not interchangeable.
  """
  method = {key: value for key, value in vpd_depth(tiny=tiny, head_init="released")["method"].items()
            if key != "class_vectors"}  # fmt: skip
  return {
    "init": {"clip": "random:0" if tiny else ""},  # CLIP's text encoder: a folder, if the weights have none
    "method": method
    | {
      "prompt": "sentence",
      "token_length": token_length,
      "tokenizer": "characters" if tiny else "",  # a folder, if the weights have none; "words" for smoke tests
      **ATTENTION_MAPS,
      "keep_unused": True,  # the released files hold the UNet's last block
    },
    "neck": {"name": "none"},
    "head": {"name": "lavt", "width": 64 if tiny else 640},
    "task": {"name": "referring", "class_weights": (0.9, 1.1), "eval_at": "network"},  # "original"
  }


def meta_prompts_referring(*, tiny: bool, token_length: int = 40) -> Section:
  """As `vpd_referring`, for MetaPrompts: 50 learned prompts after the sentence, otherwise as in segmentation."""
  vpd, segmentation = vpd_referring(tiny=tiny, token_length=token_length), meta_prompts_segmentation(tiny=tiny)
  text_options = {name: vpd["method"][name] for name in ("token_length", "tokenizer")}
  return {
    **vpd,
    "method": segmentation["method"]
    | text_options
    | {"prompt": "sentence+learned", "prompts": 50, "keep_unused": False},
    "neck": segmentation["neck"],
  }


def iedp_referring(*, tiny: bool, token_length: int = 40) -> Section:
  """As `vpd_referring`, for IEDP: one branch, with the implicit tokens of the image after the sentence."""
  vpd, depth = vpd_referring(tiny=tiny, token_length=token_length), iedp_depth(tiny=tiny, head_init="released")
  text_options = {name: vpd["method"][name] for name in ("token_length", "tokenizer")}
  branch = {"prompt": "sentence+image", "branch_mode": "implicit"}
  return {
    **vpd,
    "init": depth["init"],
    "method": depth["method"] | text_options | ATTENTION_MAPS | branch,
  }


def eco_depth_referring(*, tiny: bool, token_length: int = 40) -> Section:
  """As `vpd_referring`, for EcoDepth: its token after the sentence's, without attention maps."""
  vpd, depth = vpd_referring(tiny=tiny, token_length=token_length), eco_depth(tiny=tiny, head_init="released")
  text_options = {name: vpd["method"][name] for name in ("token_length", "tokenizer")}
  return {
    **vpd,
    "backbone": depth["backbone"],
    "init": vpd["init"] | depth["init"],
    "method": depth["method"] | text_options | {"prompt": "sentence+image"},
  }


def tadp_referring(*, tiny: bool, token_length: int = 40) -> Section:
  """As `vpd_referring`, for TADP: the expression in place of the caption, which is VPD without the adapter."""
  vpd, depth = vpd_referring(tiny=tiny, token_length=token_length), tadp_depth(tiny=tiny, head_init="released")
  text_options = {name: vpd["method"][name] for name in ("token_length", "tokenizer")}
  return {**vpd, "method": depth["method"] | text_options | ATTENTION_MAPS}


def referring_optimizer(*, lr: float = 5e-5, num_steps: int = 0, unet_lr: float = 1.0) -> Section:
  """AdamW as in VPD's referring segmentation: decay for everything but the norms of the UNet's transformers.

  Args:
    lr: largest learning rate.
    num_steps: of the schedule; 0 for the length of the run.
    unet_lr: learning rate multiplier of the UNet. Release: effectively 1.0; its setting of 0.01 is never read.

  Source: VPD refer/train.py (lr_scale of the parameter groups, torch.optim.AdamW, LambdaLR).
  """
  unet = () if unet_lr == 1.0 else ((r"/unet/", unet_lr),)
  return adamw(
    lr=lr,
    decay=1e-2,
    schedule={"name": "poly", "num_steps": num_steps, "power": 0.9, "warmup": 0, "warmup_ratio": 1e-6},
    lr_groups=((r"/vae/", None), *unet, (r"", 1.0)),
    decay_groups=((r"/unet/.*norm", 0.0), (r"", 1.0)),
  )
