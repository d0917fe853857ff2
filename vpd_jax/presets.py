"""Small functions that return parts of a config, so that config files say only what is their own."""

from typing import Any


def sd_v1() -> dict[str, Any]:
  """Stable Diffusion 1.x; a diffusers folder in `init.pretrained` brings its own sizes."""
  return {
    "unet": {
      "in_channels": 4,
      "out_channels": 4,
      "model_channels": 320,
      "channel_mult": (1, 2, 4, 4),
      "num_res_blocks": 2,
      "attention_levels": (0, 1, 2),
      "num_heads": 8,
      "head_width": 0,
      "context_dim": 768,
      "linear_projection": False,
    },
    "vae": {"channels": 128, "channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 4},
    "text": {
      "vocab_size": 49408,
      "width": 768,
      "layers": 12,
      "heads": 12,
      "mlp_width": 3072,
      "positions": 77,
      "activation": "quick_gelu",
    },
    "image": clip_image(tiny=False),
    "attention": "auto",
    "remat": False,
  }


def sd_tiny() -> dict[str, Any]:
  """The tiny network: a tenth of the width, everything else as Stable Diffusion 1.x."""
  config = sd_v1()
  config["unet"] |= {"model_channels": 32, "context_dim": 64}
  config["vae"] |= {"channels": 32}
  config["image"] = clip_image(tiny=True)
  config["text"] |= {"vocab_size": 1000, "width": 64, "layers": 3, "heads": 4, "mlp_width": 256}
  return config


def adamw(
  *,
  lr: float,
  decay: float,
  schedule: dict[str, Any],
  lr_groups: tuple,
  decay_groups: tuple,
  norm_group: int = 0,
  loss_group: int = 0,
) -> dict[str, Any]:
  """AdamW with the release's betas and no clipping.

  Args:
    lr: largest learning rate.
    decay: weight decay.
    schedule: name and options of a schedule in `optim.py`; its `lr` is `optim.lr`.
    lr_groups, decay_groups: ordered (pattern, multiplier) pairs; None as an lr multiplier freezes.
    norm_group, loss_group: images per group of batch statistics and of the loss; 0 is the whole batch.
  """
  return {
    "lr": lr,
    "decay": decay,
    "b1": 0.9,
    "b2": 0.999,
    "epsilon": 1e-8,
    "clip_norm": 0.0,
    "schedule": schedule,
    "lr_groups": lr_groups,
    "decay_groups": decay_groups,
    "norm_group": norm_group,
    "loss_group": loss_group,
    "accumulation": 1,
    "ema_decay": 0.0,
  }


def no_decay_for_vectors() -> tuple:
  """Decay for matrices and kernels only: none for biases, norms and gamma.

  Source: VPD depth/models_depth/optimizer.py LDMOptimizerConstructor.
  """
  return ((r"/(bias|scale|gamma)$", 0.0), (r"", 1.0))


def vpd_depth(*, tiny: bool, head_init: str) -> dict[str, Any]:
  """The sections method, neck and head of VPD depth, as released.

  Args:
    tiny: widths of the tiny network, and random class vectors in place of those of the weights.
    head_init: see heads/deconv.py; "released" suits pretrained weights, "fan_in" a start from nothing.
  """
  return {
    "method": {
      "name": "vpd",
      "prompt": "scene_class",  # from the folder's name, also at test time, as published
      "class_vectors": "random:0" if tiny else "",  # FILE, random:SEED, or "": from the weights
      "tokenizer": "",  # a folder, where the weights bring none
      "residual_scale": 1e-4,
      "timestep": 1,
      "latent_scale": 1.0,
      "pad_multiple": 64,
      "pad_value": 0.0,
    },
    "neck": {"name": "fusion", "width": 192 if tiny else 1536},
    "head": {"name": "deconv", "filters": (32, 32, 32), "width": 24 if tiny else 192, "init": head_init},
  }


def evaluation(*, batch_size: int, test_time: tuple[str, ...], baselines: int = 0) -> dict[str, Any]:
  """How scores and predictions are made.

  Args:
    batch_size: images, all processes together, in one call of the network (times windows and mirroring).
    test_time: of "flip" and "shift:N", the mirrored image and N shifted square windows.
    baselines: training images to fit the trivial predictors on whose scores are printed beside; 0 for none.

  Returns:
    also coverage of the windows ("released" or "full"), the checkpoint of a workdir that is read ("newest" or "best"),
    and the number of samples shown as panels.
  """
  return {
    "batch_size": batch_size,
    "test_time": test_time,
    "coverage": "released",
    "checkpoint": "newest",
    "baselines": baselines,
    "panels": 4,
  }


def run(*, num_steps: int, log_every: int, eval_every: int, save_every: int) -> dict[str, Any]:
  """What every config has beside its own sections.

  Returns:
    seed; dtype of computation and param_dtype of parameters and optimizer state; the lengths, in steps; checkpoints
    kept (newest, best); profile: number of steps to trace from the tenth on, 0 for none; init: weights to start from;
    mesh: devices along ("data", "fsdp"), -1 for the rest.
  """
  return {
    "seed": 0,
    "dtype": "float32",
    "param_dtype": "float32",
    "num_steps": num_steps,
    "log_every": log_every,
    "eval_every": eval_every,
    "save_every": save_every,
    "keep": 2,
    "keep_best": 1,
    "profile": 0,
    "init": {"pretrained": "", "run": "", "clip": ""},
    "mesh": {"data": -1, "fsdp": 1, "rules": ()},
  }


def iedp_assumptions() -> dict[str, Any]:
  """What the paper is taken to mean where its text could not be had: options of the method, each an assumption.

  The numbers are the sections of the paper's description by which the options are grouped: 2 implicit branch,
  3 explicit branch, 4 sharing and losses, 5 decoders and latents, 6 training. Also assumed: CLIP ViT-L/14 at 224
  pixels, `backbone.image` (2); no dropout (2); depth's neck and head, recipe and `optim.norm_group` 0, which is one
  set of batch statistics for both branches (4, 5, 6).
  """
  return {
    "clip_resize": "bicubic",  # 2: the whole crop, squeezed to CLIP's square; "bilinear"
    "clip_features": "last",  # 2: the 257 tokens before any final norm; "penultimate"
    "num_queries": 77,  # 2: as many as a sentence has tokens
    "query_init": 0.02,  # 2: deviation of the queries at the start
    "num_blocks": 1,  # 2
    "num_heads": 8,  # 2
    "ffn_ratio": 4,  # 2
    "output_norm": "none",  # 2: "ln" brings the context to the scale the UNet knows
    "sentence": "a photo of a {}",  # 3: {} is the scene; without {} one sentence for all, as "a photo of a street"
    "text_output": "last",  # 3: all states; "pooled"
    "explicit_adapter": "residual",  # 3: as VPD's; "none"
    "residual_scale": 1e-4,  # 3: start of gamma
    "branch_mode": "both",  # 4: "implicit" trains without text
    "lambda_exp": 1.0,  # 4: weight of the explicit branch's loss
    "latent_scale": 1.0,  # 5: as VPD; 0.18215, with which Stable Diffusion was trained
    "timestep": 1,  # 2: as VPD's code
    "tower_dtype": "bfloat16",  # 6: in which CLIP's frozen towers are kept; "float32"
  }


def clip_image(*, tiny: bool) -> dict[str, Any]:
  """Sizes of CLIP's image encoder: ViT-L/14 at 224 pixels; a folder in `init.clip` brings its own."""
  sizes = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096, "image_size": 224, "projection": 768}
  small = {"width": 64, "layers": 3, "heads": 4, "mlp_width": 256, "image_size": 56, "projection": 48}
  return {**(small if tiny else sizes), "patch": 14, "activation": "quick_gelu"}


def iedp_depth(*, tiny: bool, head_init: str) -> dict[str, Any]:
  """The sections method, neck and head of IEDP depth, and what it sets in init; see `vpd_depth`.

  Args:
    tiny: widths of the tiny network, and random towers of CLIP in place of those of `init.clip`.
    head_init: see heads/deconv.py.
  """
  vpd = vpd_depth(tiny=tiny, head_init=head_init)
  return {
    "init": {"clip": "random:0" if tiny else ""},  # folder or file of CLIP, or random:SEED for trying
    "method": {
      "name": "iedp",
      "tokenizer": "characters" if tiny else "",  # a folder, where the weights bring none; "characters" for trying
      "pad_multiple": 64,
      "pad_value": 0.0,
      **iedp_assumptions(),
      **({"tower_dtype": "float32"} if tiny else {}),
    },
    "neck": vpd["neck"],
    "head": vpd["head"],
  }


def meta_prompts_depth(*, tiny: bool, head_init: str, resize_scale: int = 1) -> dict[str, Any]:
  """The sections method, neck and head of MetaPrompts depth, as released.

  Args:
    tiny: widths of the tiny network.
    head_init: see heads/deconv.py.
    resize_scale: 1 on NYU Depth v2 (480 -> 512), 2 on KITTI (352 -> 448); see methods/meta_prompts.py.
  """
  return {
    "method": {
      "name": "meta_prompts",
      "prompts": 50,
      "refine_steps": 3,  # passes of the UNet; evaluation may take fewer than the weights hold
      "trained_steps": 0,  # steps the weights hold, 0: refine_steps
      "share_prompts": False,
      "adapt_prompts": True,
      "time_embedding": "learned",  # "timestep:N"
      "resize_scale": resize_scale,
      "latent_scale": 1.0,
    },
    "neck": {"name": "einsum", "inner": 32},
    "head": {"name": "deconv", "filters": (32, 32, 32), "width": 24 if tiny else 192, "init": head_init},
  }
