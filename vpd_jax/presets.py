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
    "attention": "auto",
    "remat": False,
  }


def sd_tiny() -> dict[str, Any]:
  """The tiny network: a tenth of the width, everything else as Stable Diffusion 1.x."""
  config = sd_v1()
  config["unet"] |= {"model_channels": 32, "context_dim": 64}
  config["vae"] |= {"channels": 32}
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
    "init": {"pretrained": "", "run": ""},
    "mesh": {"data": -1, "fsdp": 1, "rules": ()},
  }
