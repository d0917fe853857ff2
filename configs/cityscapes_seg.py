"""Semantic segmentation on Cityscapes, 19 classes, 80 000 steps.

python -m vpd_jax.main --config=configs/cityscapes_seg.py:meta_prompts --config.data.root=/data/cityscapes \
    --config.init.pretrained=/weights/v1-5-pruned-emaonly.ckpt

Variants, comma-separated: a method (meta_prompts, vpd, iedp, eco_depth, tadp), a stage of the release ("mapillary": on
Mapillary Vistas; "extra": also the automatic labels of train_extra, initialized with config.init.run from a run on
Mapillary; both with one refinement step), and a size (sd21: Stable Diffusion 2.1; tiny: the small network of the
tests). --mode=predict writes the files that the test server expects (.label_ids.png).

Expected mIoU on val, single-scale / multi-scale: MetaPrompts 85.98 / 87.26 (with "extra"). VPD and IEDP publish none.
Ours: not yet run.
"""

import ml_collections

from vpd_jax.config import loader, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(
    argument, method=presets.methods("meta_prompts"), data=("fine", "extra", "mapillary"), size=presets.sizes()
  )
  method, data, tiny = words["method"], words["data"], words["size"] == "tiny"
  config = ml_collections.ConfigDict(presets.run(num_steps=80_000, log_every=50, eval_every=8000, save_every=2000))
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("segmentation", method, tiny=tiny, dropout=0.1))
  if data != "fine" and method == "meta_prompts":
    config.method.refine_steps = 1
  config.data = {
    "name": "cityscapes",
    "root": "",
    "crop": (128, 128) if tiny else (1024, 1024),
    "scale": (256, 128) if tiny else (2048, 1024),  # (long, short) side
    "ratio_range": (0.5, 2.0),
    "cat_max_ratio": 0.75,
    "color_jitter": True,
    "extra": "autolabelled" if data == "extra" else "none",  # "coarse"
    "cities": (),
    "complete": True,  # False takes a part of the data set
    "format": "files",  # "tfds": prepared shards
    "batch_size": 8,  # 8 GPUs x 1 in the release
    "workers": 8,
    "on_bad_record": "stop",  # "skip"
    "captions": "",  # a file of them, for methods that read a sentence; see docs/data.md
  }
  if data == "mapillary":
    config.data.name = "mapillary"
    del config.data.extra, config.data.cities
  config.optim = presets.segmentation_optimizer()
  config.optim.loss_group = 1  # Lovász is a loss over the images of one GPU
  words = ("slide:128:64",) if tiny else ("slide:1024:512",)
  # All images of Cityscapes have one size: a shape for each scale, as released.
  shapes = "few_shapes" if data == "mapillary" else "whole"
  config.eval = presets.sliding_window_evaluation(batch_size=8, test_time=words, small_images=shapes)
  return config
