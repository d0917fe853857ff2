"""Referring segmentation on your own data: images, masks, and sentences in one JSON file. Copy and edit this file.

python -m vpd_jax.main --config=configs/my_refer.py --config.data.root=/data/mine \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a method (vpd; meta_prompts, iedp, eco_depth, and tadp are extensions of this project) and a
size (sd21: Stable Diffusion 2.1; tiny: the small network of the tests). The file is described in
vpd_jax/data/datasets/refer_list.py.
"""

import ml_collections

from vpd_jax.config import loader, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, method=presets.methods(), size=presets.sizes())
  tiny = words["size"] == "tiny"
  config = ml_collections.ConfigDict(presets.run(num_steps=20_000, log_every=50, eval_every=1000, save_every=1000))
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("referring", words["method"], tiny=tiny, token_length=40))
  config.data = {"name": "refer_list", "root": "", "file": "sentences.json", "holdout": 0.1, "exif": "stored"}
  config.data.update({"crop": (128, 128) if tiny else (512, 512), "canvas": (640, 640)})
  config.data.update({"cache": "off", "cache_folder": "", "batch_size": 32, "workers": 8, "on_bad_record": "stop"})
  config.optim = presets.referring_optimizer()  # its loss_group 0 is the whole batch; the release takes 4
  config.eval = presets.evaluation(batch_size=32, test_time=(), baselines=1000)
  return config
