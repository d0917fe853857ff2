"""Sections shared by the configs of all tasks: the optimizer, the evaluation, the run."""

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
    norm_group, loss_group: images per group of batch statistics and of the loss; 0 is the full batch.
    moments: storage of the two moments, see moments.py: "float32", "bfloat16" or "int8".
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
  """Weight decay for matrices and kernels only: none for biases, norms and gamma.

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
  """The section `eval`.

  Args:
    batch_size: images per call of the network over all processes (times windows and mirroring).
    test_time: any of "flip", the mirrored image, and one of "shift:N", N shifted square windows, or "halves:N", two
      halves that share N columns.
    baselines: number of training images to fit the trivial baselines on, whose scores are also printed; 0 for none.
    coverage: "full" spreads shifted windows over the full image; "released" may omit its end, for the published
      protocols of NYU and KITTI, which do not score it.
    blend: how overlapping windows are merged: "mean", as published, or "smooth", with weights that fade toward the
      borders of a window, which avoids visible seams.

  Returns:
    also checkpoint, which one to read from a workdir ("newest" or "best"), and panels, the number of samples shown.
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
  """The section `eval` for sliding windows.

  Args:
    batch_size: windows per call of the network over all processes.
    test_time: any of "flip", "slide:WINDOW:STRIDE", "resize:LONG:SHORT" and "ms:RATIO:RATIO..", see
      inference/sliding_window.py.
    baselines: see `evaluation`.
    small_images: how images smaller than the window are handled: "whole" shrinks the window, as released, and compiles
      the network for every shape; "few_shapes" uses windows of at most nine shapes; "padded" pads with gray.

  Returns:
    the section of `evaluation` without coverage, with small_images.
  """
  base = evaluation(batch_size=batch_size, test_time=test_time, baselines=baselines)
  return {name: value for name, value in base.items() if name != "coverage"} | {"small_images": small_images}


def run(*, num_steps: int, log_every: int, eval_every: int, save_every: int) -> Section:
  """The fields that every config has in addition to its sections.

  Returns:
    seed; dtype of computation, param_dtype of parameters and optimizer state, and frozen_dtype of frozen parameters,
    "float32" (as param_dtype) or "bfloat16"; the lengths, in steps; keep and keep_best: number of newest and best
    checkpoints; profile: number of steps to trace from the tenth on, 0 for none; writer: of event files, see
    writers.create; init: initial weights; lora: rank (0: off), alpha, learning rate multiplier, and patterns of the
    UNet kernels to adapt, () for those of attention, see models/lora.py; mesh: devices along ("data", "fsdp"), -1 for
    the remaining ones.
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
