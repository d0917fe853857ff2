"""Metric depth on NYU Depth v2, 25 epochs at a global batch of 24 (8 GPUs x 3 in the release).

python -m vpd_jax.main --config=configs/nyu_depth.py --config.data.root=/data/nyu_depth_v2 \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a method (vpd, meta_prompts, iedp, eco_depth, tadp) and a size (sd21: Stable Diffusion 2.1;
tiny: the small network of the tests). EcoDepth has its own recipe: whole images, a global batch of 32 (8 GPUs x 4), see
presets.eco_depth_recipe; its ImageNet classifier is given by --config.init.vit.

TADP reads a caption of every image: --config.data.captions=FILE.

Expected: RMSE 0.254, d1 0.964 for VPD, 0.223 and 0.976 for MetaPrompts (their READMEs), 0.218 and 0.978 for EcoDepth
(0.2187 and 0.9776 in issue 11 of its repository), 0.225 and 0.976 for TADP. Ours: not yet run.
"""

import ml_collections

from vpd_jax.config import loader, presets

ITERATIONS = 1009  # per epoch in the release: 24 232 padded frames over 8 x 3
ECO_DEPTH_ITERATIONS = 757  # 24 231 frames over 8 x 4, the rest dropped


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, method=presets.methods(), size=presets.sizes())
  tiny = words["size"] == "tiny"
  config = ml_collections.ConfigDict(
    presets.run(num_steps=25 * ITERATIONS, log_every=50, eval_every=ITERATIONS, save_every=ITERATIONS)
  )
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("depth", words["method"], tiny=tiny, head_init="released"))
  config.task = {"name": "depth", "max_depth": 10.0, "min_depth": 1e-3, "variance_focus": 0.5}
  config.task.eval_crop = "eigen_nyu_scaled" if tiny else "eigen_nyu"  # the former fits other sizes than 480 x 640
  config.task.contours = 0.0  # meters between lines in colored pictures
  config.data = {
    "name": "nyu",
    "root": "",
    "train_list": "",
    "test_list": "",
    "crop": (96, 96) if tiny else (480, 480),
    "resize": (96, 128) if tiny else (),  # () keeps 480 x 640
    "cut_depth": "released",  # "scaled", "off"
    "color_jitter": True,
    "format": "files",  # "tfds": prepared shards
    "batch_size": 24,
    "workers": 8,
    "on_bad_record": "stop",  # "skip"
    "reshuffle_each_epoch": False,  # the release keeps the order of the first epoch
    "captions": "",  # a file of them, for methods that read a sentence; see docs/data.md
  }
  config.optim = presets.adamw(
    lr=5e-4,
    decay=0.1,
    schedule={"name": "triangular_poly", "min_lr": 3e-5, "half": 12 * ITERATIONS, "power": 0.9},
    lr_groups=((r"/vae/", None), (r"/unet/", 0.01), (r"", 1.0)),
    decay_groups=presets.no_decay_for_vectors(),
    norm_group=0 if words["method"] == "iedp" else 3,  # both branches of IEDP share their statistics
    loss_group=3,
  )
  config.eval = presets.evaluation(batch_size=8, test_time=("flip", "shift:2"), coverage="released")
  if words["method"] == "eco_depth":
    config.update(presets.eco_depth_recipe(iterations=ECO_DEPTH_ITERATIONS, test_time=("flip",)))
    config.data.crop = (96, 128) if tiny else (480, 640)  # whole pictures
  return config
