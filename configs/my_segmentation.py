"""Segmentation on your own data: folders of images and masks, a list of classes. Copy and edit this file.

python -m vpd_jax.main --config=configs/my_segmentation.py --config.data.root=/data/mine \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a method (vpd, meta_prompts, iedp, eco_depth, tadp) and a size (sd21: Stable Diffusion 2.1;
tiny: the small network of the tests).
"""

import ml_collections

from vpd_jax.config import loader, presets

CLASSES = ("background", "person", "dog")  # in the order of the numbers in the masks; 255 is no class


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, method=presets.methods(), size=presets.sizes())
  tiny = words["size"] == "tiny"
  config = ml_collections.ConfigDict(presets.run(num_steps=20_000, log_every=50, eval_every=1000, save_every=1000))
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("segmentation", words["method"], tiny=tiny))
  config.data = {"name": "mask_folder", "root": "", "classes": CLASSES, "images": "images", "masks": "masks"}
  config.data.update(
    {"eval_images": "", "eval_masks": "", "holdout": 0.1, "values": (), "ignored": (255,), "exif": "stored"}
  )
  config.data.update({"crop": (128, 128) if tiny else (512, 512), "scale": (512, 128) if tiny else (2048, 512)})
  config.data.update({"batch_size": 16, "workers": 8, "on_bad_record": "stop", "captions": ""})
  config.optim = presets.segmentation_optimizer(num_steps=0, warmup=500)  # 0: as long as the run
  slide = ("resize:512:128", "slide:128:85") if tiny else ("resize:2048:512", "slide:512:341")
  config.eval = presets.sliding_window_evaluation(batch_size=8, test_time=slide, baselines=64)
  return config
