"""Metric depth on your own data: images and depth files named by list files. Copy and edit this file.

python -m vpd_jax.main --config=configs/my_depth.py --config.data.root=/data/mine \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a method (vpd, meta_prompts, iedp, eco_depth, tadp) and a size (sd21: Stable Diffusion 2.1;
tiny: the small network of the tests).
"""

import ml_collections

from vpd_jax.config import loader, presets

MAX_DEPTH = 10.0  # meters


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, method=presets.methods(), size=presets.sizes())
  tiny = words["size"] == "tiny"
  config = ml_collections.ConfigDict(presets.run(num_steps=20_000, log_every=50, eval_every=1000, save_every=1000))
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("depth", words["method"], tiny=tiny, head_init="released"))
  config.task = {"name": "depth", "max_depth": MAX_DEPTH, "min_depth": 1e-3, "eval_crop": "none"}
  config.task.contours = 0.0  # meters between lines in colored pictures
  config.data = {"name": "depth_list", "root": "", "factor": 1000.0, "max_depth": MAX_DEPTH, "scene": "room"}
  config.data.update(
    {"train_list": "train_list.txt", "eval_list": "", "holdout": 0.1, "exif": "stored", "captions": ""}
  )
  config.data.update({"resize": (96, 128) if tiny else (480, 640), "crop": (96, 96) if tiny else (480, 480)})
  config.data.update(
    {"cut_depth": "scaled", "color_jitter": True, "batch_size": 24, "workers": 8, "on_bad_record": "stop"}
  )
  config.optim = presets.adamw(
    lr=5e-4,
    decay=0.1,
    schedule={"name": "cosine", "min_lr": 3e-5, "num_steps": 0, "warmup": 500},  # 0: as long as the run
    lr_groups=((r"/vae/", None), (r"/unet/", 0.01), (r"", 1.0)),
    decay_groups=presets.no_decay_for_vectors(),
    norm_group=0,  # the whole batch; the releases take 3
    loss_group=0,
  )
  config.eval = presets.evaluation(batch_size=8, test_time=("flip", "shift:2"), baselines=256, blend="smooth")
  return config
