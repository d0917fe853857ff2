"""What configs of every task share: the optimizer, the evaluation, the run itself."""

from vpd_jax.config.fields import Section


def adamw(
  *,
  lr: float,
  decay: float,
  schedule: Section,
  lr_groups: tuple,
  decay_groups: tuple,
  norm_group: int = 0,
  loss_group: int = 0,
  moments: str = "float32",
) -> Section:
  """AdamW with the release's betas and no clipping.

  Args:
    lr: largest learning rate.
    decay: weight decay.
    schedule: name and options of a schedule in `optim.py`; its `lr` is `optim.lr`.
    lr_groups, decay_groups: ordered (pattern, multiplier) pairs; None as an lr multiplier freezes.
    norm_group, loss_group: images per group of batch statistics and of the loss; 0 is the whole batch.
    moments: how the two moments are kept, see moments.py: "float32", "bfloat16" or "int8".
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
    "moments": moments,
  }


def no_decay_for_vectors() -> tuple:
  """Decay for matrices and kernels only: none for biases, norms and gamma.

  Source: VPD depth/models_depth/optimizer.py LDMOptimizerConstructor.
  """
  return ((r"/(bias|scale|gamma)$", 0.0), (r"", 1.0))


def evaluation(
  *,
  batch_size: int,
  test_time: tuple[str, ...],
  baselines: int = 0,
  coverage: str = "full",
  blend: str = "mean",
) -> Section:
  """How scores and predictions are made.

  Args:
    batch_size: images, all processes together, in one call of the network (times windows and mirroring).
    test_time: of "flip", the mirrored image, and one of "shift:N", N shifted square windows, and "halves:N", the two
      halves, which share N columns.
    baselines: training images to fit the trivial predictors on whose scores are printed beside; 0 for none.
    coverage: "full" spreads shifted windows over the whole image; "released" may leave its end out, for the published
      protocols of NYU and KITTI, which score nothing there.
    blend: how overlapping windows are joined: "mean", as published, or "smooth", with weights that fade toward the
      borders of a window, so that no seam shows.

  Returns:
    also the checkpoint of a workdir that is read ("newest" or "best"), and the number of samples shown as panels.
  """
  return {
    "batch_size": batch_size,
    "test_time": test_time,
    "coverage": coverage,
    "blend": blend,
    "checkpoint": "newest",
    "baselines": baselines,
    "panels": 4,
  }


def sliding_window_evaluation(
  *, batch_size: int, test_time: tuple[str, ...], baselines: int = 0, small_images: str = "few_shapes"
) -> Section:
  """How label maps are scored and predicted.

  Args:
    batch_size: windows, all processes together, in one call of the network.
    test_time: of "flip", "slide:WINDOW:STRIDE", "resize:LONG:SHORT" and "ms:RATIO:RATIO..", see
      inference/sliding_window.py.
    baselines: see `evaluation`.
    small_images: what a side shorter than the window does: "whole" makes the window shorter there, as released, and the
      network is compiled for every shape; "few_shapes": windows of at most nine shapes; "padded" with gray, one shape.

  Returns:
    also small_images; the rest as `evaluation`.
  """
  common = evaluation(batch_size=batch_size, test_time=test_time, baselines=baselines)
  return {name: value for name, value in common.items() if name != "coverage"} | {"small_images": small_images}


def run(*, num_steps: int, log_every: int, eval_every: int, save_every: int) -> Section:
  """What every config has beside its own sections.

  Returns:
    seed; dtype of computation, param_dtype of parameters and optimizer state, and frozen_dtype of what is not trained,
    "float32" (as param_dtype) or "bfloat16"; the lengths, in steps; checkpoints kept (newest, best); profile: number of
    steps to trace from the tenth on, 0 for none; writer: of event files, see writers.create; init: weights to start
    from; lora: rank (0: off), alpha, multiplier of the rate, and patterns of the kernels of the UNet that get one, ()
    for those of attention, see models/lora.py; mesh: devices along ("data", "fsdp"), -1 for the rest.
  """
  return {
    "seed": 0,
    "dtype": "float32",
    "param_dtype": "float32",
    "frozen_dtype": "float32",
    "num_steps": num_steps,
    "log_every": log_every,
    "eval_every": eval_every,
    "save_every": save_every,
    "keep": 2,
    "keep_best": 1,
    "profile": 0,
    "writer": "auto",
    "init": {"pretrained": "", "run": "", "clip": "", "lora": ""},
    "lora": {"rank": 0, "alpha": 16.0, "lr": 1.0, "targets": ()},
    "mesh": {"data": -1, "fsdp": 1, "rules": ()},
  }
