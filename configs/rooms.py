"""The embedded procedural rooms: train, evaluate and predict without any download, in minutes on two cores.

python -m vpd_jax.main --config=configs/rooms.py:depth,tiny

Variants, comma-separated: a task (depth, segmentation, referring, pose), a method (vpd, meta_prompts, iedp, eco_depth,
tadp), and a size (tiny, full, sd21: Stable Diffusion 2.1; small, which starts from the weights "rooms/small" of this
package, made by scripts/pretrain_rooms.py; small_scratch, the same network). All but small start from random weights.
These, and small for poses, train everything at the same rate, including the VAE: what the releases freeze or train
slowly has not been trained here. TADP's captions come from the renderer and list the visible objects. The scores show
that training works, not how good a method is.

Expected: an RMSE under 0.65 of the best constant depth with tiny, and about 0.34 with small; the evaluation prints it
beside. The others are likewise better than the predictors printed beside them.
"""

import ml_collections

from vpd_jax.config import loader, presets
from vpd_jax.config.presets import pose

OPTIONS = {  # of presets.sections, by task
  "depth": {"head_init": "fan_in"},
  "segmentation": {"dropout": 0.0},
  "referring": {"token_length": 16},
  "pose": {"head_init": "released"},
}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  sizes = (*presets.sizes("tiny"), "small", "small_scratch")
  words = loader.parse_variant(argument, task=tuple(OPTIONS), method=presets.methods(), size=sizes)
  task, method, small = words["task"], words["method"], words["size"].startswith("small")
  tiny, trained = small or words["size"] == "tiny", words["size"] == "small"
  steps = {"segmentation": 120, "pose": 160}.get(task, 80) if small else 320
  config = ml_collections.ConfigDict(presets.run(num_steps=steps, log_every=20, eval_every=steps, save_every=100))
  config.backbone = presets.rooms_small() if small else presets.backbone(words["size"])
  if small:
    config.init.pretrained = "rooms/small" if trained else ""
  elif tiny:
    # The VAE is trained here and dominates the cost; a smaller one allows more steps in the same time.
    config.backbone.vae.update({"channel_mult": (1, 1, 2, 4), "num_res_blocks": 1})
  config.update(presets.sections(task, method, tiny=tiny, **OPTIONS[task]))
  if task == "depth":
    if small:
      config.head.update({"filters": (24,), "width": 16, "init": "fan_in_nearest"})
      if config.neck.name == "fusion":
        config.neck = {"name": "none"}  # fusion's map would have 8 x 8 cells, the UNet's finest has 32 x 32
    config.task = {"name": "depth", "max_depth": 10.0, "min_depth": 1e-3, "eval_crop": "none", "variance_focus": 0.5}
    config.task.contours = 0.0  # meters between lines in colored pictures
  elif task == "segmentation":
    if small and config.neck.name == "fpn":
      config.neck.width = config.head.width = 64
  elif task == "referring":
    if "tokenizer" in config.method:
      # CLIP's tokens and states would come with weights; random vectors suffice to distinguish words.
      config.init.clip, config.method.tokenizer = "random:0", "words"
    # Objects are small: with the released weights, a short training predicts none.
    config.task.class_weights = (0.3, 1.7)
    if "attention_gradient" in config.method:
      config.method.attention_gradient = True  # no pretrained weights associate words with pixels
  elif task == "pose":
    config.task = pose.pose_task(sigma=1 if tiny else 2)
  if "refine_steps" in config.method:
    config.method.refine_init = "fan_in"  # with zeros and no pretrained weights the second step does not see the image
  config.data = figures(tiny=tiny) if task == "pose" else rooms(task, tiny=tiny)
  if small and task != "pose":
    config.data.size, config.data.crop = (128, 128), (128, 128)
  if method == "tadp" and task != "referring":
    config.data.captioned = True  # False with a file in data.captions
    if tiny:  # random states for the up to 28 words of a caption
      config.method.tokenizer, config.method.token_length = "words", 32
  if task == "referring":
    config.data.update({"cache": "off", "cache_folder": ""})  # others need a VAE that is not trained
  # New parts may learn fast where the backbone is trained already, as in the papers; most of all scores of classes, of
  # which some are rare. Not for poses: rooms/small has seen whole rooms, not the crops of figures.
  slow_backbone = trained and task != "pose"
  rate, backbone_rate = (3e-2, 1e-3) if task == "segmentation" else (3e-3, 3e-4)
  config.optim = presets.adamw(
    lr=rate if slow_backbone else 1e-3,
    decay=0.01,
    schedule={"name": "cosine", "min_lr": 1e-5, "num_steps": 0, "warmup": 20},  # 0: as long as the run
    lr_groups=((r"/(unet|vae)/", backbone_rate / rate), (r"", 1.0)) if slow_backbone else ((r"", 1.0),),
    decay_groups=presets.no_decay_for_vectors(),
    norm_group=0,
    loss_group=0,
  )
  config.optim.b2 = 0.99  # 0.999 averages over 1000 steps, more than these runs take
  test_time = {"depth": ("flip",) if small else ("flip", "shift:2"), "referring": (), "pose": ("flip",)}
  window = "slide:128:128" if small else "slide:96:32" if tiny else "slide:480:160"
  config.eval = (
    presets.sliding_window_evaluation(batch_size=8, test_time=(window,), baselines=256)
    if task == "segmentation"
    else presets.evaluation(
      batch_size=8, test_time=test_time[task], baselines=256, blend="smooth" if task == "depth" else "mean"
    )
  )
  return config


def rooms(task: str, *, tiny: bool) -> dict:
  """The section data of whole rooms."""
  return {
    "name": "rooms",
    "task": task,
    "size": (96, 128) if tiny else (480, 640),
    "crop": (96, 96) if tiny else (480, 480),
    "train_count": 4096,
    "eval_count": 64,
    "seed": 0,
    "cut_depth": "off",
    "color_jitter": False,
    "format": "files",  # nothing on disk: drawn when asked for; "tfds": prepared shards in `root`
    "root": "",
    "batch_size": 6,
    "workers": 0,
    "on_bad_record": "stop",
    **({} if task == "referring" else {"captions": ""}),  # a file of them, by names as "train/12" and "eval/0"
  }


def figures(*, tiny: bool) -> dict:
  """The section data of the rooms' jointed figures, a crop for each."""
  return {
    "name": "room_figures",
    "size": (96, 128) if tiny else (480, 640),
    "crop": (64, 48) if tiny else (256, 192),
    "train_count": 4096,
    "eval_count": 64,
    "seed": 0,
    "udp": True,
    "padding": 1.25,
    "center_jitter": "off",  # a few hundred steps never see a figure twice
    "flip": 0.5,
    "half_body": 0.0,
    "scale": 0.0,
    "rotation": 15.0,
    "rotation_chance": 0.0,
    "format": "files",
    "root": "",
    "batch_size": 8,
    "workers": 0,
    "on_bad_record": "stop",
  }
