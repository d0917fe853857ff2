"""Semantic segmentation on ADE20K, 150 classes, 80 000 steps.

python -m vpd_jax.main --config=configs/ade20k_seg.py --config.data.root=/data/ADEChallengeData2016 \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a method (vpd, meta_prompts, iedp, eco_depth, tadp) and a size (sd21: Stable Diffusion 2.1;
tiny: the small network of the tests).

Multi-scale with flipping: --config.eval.test_time='("resize:2048:512", "slide:512:341", "ms:1:1.125:1.25:1.375:1.5",
"flip")' as in VPD, "ms:0.5:0.75:1:1.25:1.5:1.75:2" for MetaPrompts. Scaled images with a side below 512 get smaller
windows of a few shapes; --config.eval.small_images=whole uses exactly the release's shapes and compiles each.

TADP reads a caption of every image: --config.data.captions=FILE.

Expected mIoU, single-scale / multi-scale: VPD 53.7 / 54.6, MetaPrompts 55.83 / 56.81, IEDP 55.9 / not published, TADP
55.9 (scales not stated). Ours: not yet run.
"""

import ml_collections

from vpd_jax.config import loader, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, method=presets.methods(), size=presets.sizes())
  method, tiny = words["method"], words["size"] == "tiny"
  config = ml_collections.ConfigDict(presets.run(num_steps=80_000, log_every=50, eval_every=8000, save_every=2000))
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("segmentation", method, tiny=tiny))
  config.data = {
    "name": "ade20k",
    "root": "",
    "crop": (128, 128) if tiny else (512, 512),
    "scale": (512, 128) if tiny else (2048, 512),  # (long, short) side
    "ratio_range": (0.5, 2.0),
    "cat_max_ratio": 0.75,
    "color_jitter": True,
    "complete": True,  # False takes a part of the data set
    "format": "files",  # "tfds": prepared shards
    "batch_size": 8 if method == "meta_prompts" else 16,  # 8 GPUs x 1 or x 2 in the releases, TADP 2 x 8
    "workers": 8,
    "on_bad_record": "stop",  # "skip"
    "captions": "",  # a file of them, for methods that read a sentence; see docs/data.md
  }
  config.optim = presets.segmentation_optimizer()
  config.optim.decay = 5e-3 if method == "tadp" else config.optim.decay
  # Lovász is a loss over the images of one GPU.
  config.optim.loss_group = {"meta_prompts": 1, "tadp": 8}.get(method, 2)
  words = ("resize:512:128", "slide:128:85") if tiny else ("resize:2048:512", "slide:512:341")
  config.eval = presets.sliding_window_evaluation(batch_size=8, test_time=words)
  return config
