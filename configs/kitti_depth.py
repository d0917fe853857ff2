"""Metric depth on KITTI's Eigen split, 25 epochs at a global batch of 24 (8 GPUs x 3 in the release).

python -m vpd_jax.main --config=configs/kitti_depth.py --config.data.root=/data/kitti \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a method (vpd, meta_prompts, iedp, eco_depth, tadp) and a size (sd21: Stable Diffusion 2.1;
tiny: the small network of the tests). EcoDepth has its own recipe: crops of 352 x 640, a global batch of 32 (8 GPUs x
4), predictions from two halves, see presets.eco_depth_recipe; its ImageNet classifier is given by --config.init.vit.

KITTI has no scene classes. A method that takes one gets the same class for every frame, `data.scene`: VPD, whose
method.prompt is "scene_class", the embedding of that word; IEDP in training "a photo of a street". data.scene=""
provides none; a method that needs one is then refused when the model is assembled.

Expected: for MetaPrompts, RMSE 1.928, d1 0.981 (its README). VPD has lists for KITTI but no loader, and no number.
For EcoDepth, SqRel 0.139 (its abstract). Ours: not yet run.
"""

import ml_collections

from vpd_jax.config import loader, presets

ITERATIONS = 965  # per epoch in the release: 23 160 padded frames over 8 x 3
ECO_DEPTH_ITERATIONS = 723  # 23 158 frames over 8 x 4, the rest dropped


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, method=presets.methods(), size=presets.sizes())
  method, tiny = words["method"], words["size"] == "tiny"
  config = ml_collections.ConfigDict(
    presets.run(num_steps=25 * ITERATIONS, log_every=50, eval_every=ITERATIONS, save_every=ITERATIONS)
  )
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("depth", method, tiny=tiny, head_init="released"))
  if "resize_scale" in config.method:
    config.method.resize_scale = 2  # 352 -> 448
  config.task = {
    "name": "depth",
    "max_depth": 80.0,
    "min_depth": 1e-3,
    "eval_crop": "garg",  # "eigen_kitti"
    "variance_focus": 0.5,
    "png_scale": 256,  # as the benchmark's server takes them
    "contours": 0.0,  # meters between lines in colored pictures
  }
  config.data = {
    "name": "kitti",
    "root": "",
    "depth_root": "",  # where the annotated depth is, if not below root
    "train_list": "",
    "test_list": "",
    "kb_crop": (352, 1216),
    "crop": (96, 96) if tiny else (352, 352),
    "resize": (96, 332) if tiny else (),  # () keeps 352 x 1216
    "scene": "street",  # in place of a class of each frame's own: for method.prompt="scene_class", method.sentence
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
    norm_group=0 if method == "iedp" else 3,  # both branches of IEDP share their statistics
    loss_group=3,
  )
  # An image is 32 for the network: 16 windows, each mirrored too. eval.coverage="full" reaches the last 9 columns.
  config.eval = presets.evaluation(batch_size=8, test_time=("flip", "shift:16"), coverage="released")
  if method == "eco_depth":
    config.update(presets.eco_depth_recipe(iterations=ECO_DEPTH_ITERATIONS, test_time=("flip", "halves:64")))
    config.data.update({"crop": (96, 160) if tiny else (352, 640), "cut_depth": "off"})
  return config
