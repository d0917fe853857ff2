"""The embedded procedural rooms: train, evaluate and predict without any download, in minutes on two cores.

python -m vpd_jax.main --config=configs/rooms.py:depth,tiny

The argument is a list of words: a task (depth, segmentation), a method (vpd, meta_prompts, iedp), a size (tiny, full).
Nothing pretrained is at hand, so the network starts from random weights and everything is trained at the same rate, the
VAE included; what the releases freeze or slow down makes no sense here. The scores say that training works, not how
good a method is.

Expected: RMSE under 0.65 of the best constant depth, which the evaluation prints beside it; mean IoU above that of a
linear classifier of colour and position, likewise.
"""

import ml_collections

from vpd_jax import config_file, presets

DEPTH = {"vpd": presets.vpd_depth, "meta_prompts": presets.meta_prompts_depth, "iedp": presets.iedp_depth}
SEGMENTATION = {
  "vpd": presets.vpd_segmentation,
  "meta_prompts": presets.meta_prompts_segmentation,
  "iedp": presets.iedp_segmentation,
}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the words in `argument`."""
  words = config_file.words(argument, task=("depth", "segmentation"), method=tuple(DEPTH), size=("tiny", "full"))
  task, method, tiny = words["task"], words["method"], words["size"] == "tiny"
  steps = 400
  config = ml_collections.ConfigDict(presets.run(num_steps=steps, log_every=20, eval_every=steps, save_every=100))
  config.backbone = presets.sd_tiny() if tiny else presets.sd_v1()
  if task == "depth":
    config.update(DEPTH[method](tiny=tiny, head_init="fan_in"))
    config.task = {"name": "depth", "max_depth": 10.0, "min_depth": 1e-3, "eval_crop": "none", "variance_focus": 0.5}
  else:
    config.update(SEGMENTATION[method](tiny=tiny, dropout=0.0))
  if "refine_steps" in config.method:
    config.method.refine_init = "fan_in"  # zeros, which weights would replace, hide the image from the second step
  config.data = {
    "name": "rooms",
    "task": task,
    "size": (96, 128) if tiny else (480, 640),
    "crop": (96, 96) if tiny else (480, 480),
    "train_count": 4096,
    "eval_count": 64,
    "seed": 0,
    "cut_depth": "off",
    "colour": False,
    "format": "files",  # nothing on disk: drawn when asked for; "tfds": prepared shards in `root`
    "root": "",
    "batch_size": 6,
    "workers": 0,
    "on_bad_record": "stop",
  }
  config.optim = presets.adamw(
    lr=1e-3,
    decay=0.01,
    schedule={"name": "cosine", "min_lr": 1e-5, "num_steps": 0, "warmup": 20},  # 0: as long as the run
    lr_groups=((r"", 1.0),),
    decay_groups=presets.no_decay_for_vectors(),
    norm_group=0,
    loss_group=0,
  )
  config.optim.b2 = 0.99  # 400 steps are too few for a memory of 1000
  config.eval = (
    presets.evaluation(batch_size=8, test_time=("flip", "shift:2"), baselines=256)
    if task == "depth"
    else presets.labelling(batch_size=8, test_time=("slide:96:32" if tiny else "slide:480:160",), baselines=256)
  )
  return config
