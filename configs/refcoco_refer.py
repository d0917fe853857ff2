"""Referring segmentation on RefCOCO, RefCOCO+ and RefCOCOg, 40 epochs at a global batch of 32 (8 GPUs x 4).

python -m vpd_jax.main --config=configs/refcoco_refer.py:refcoco --config.data.root=/data/refer \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a data set (refcoco, refcoco_plus, refcocog); a method (vpd; meta_prompts, iedp and eco_depth
append their context to the sentence and tadp uses it as its caption: these four are extensions of this project);
"as_intended", the UNet's learning rate that the release states but does not use; a size (sd21: Stable Diffusion 2.1;
tiny: the small network of the tests). --config.data.eval_split=testA scores another split,
--config.task.eval_at=original at the size of the images.

Expected oIoU / mIoU on val (VPD README): RefCOCO 73.46 / 75.67, RefCOCO+ 63.93 / 67.98, RefCOCOg 63.12 / 66.42.
Ours: not yet run.
"""

import ml_collections

from vpd_jax.config import loader, presets

# Name: variant, author of the split, objects in the training split, tokens of a sentence.
DATA = {
  "refcoco": ("refcoco", "unc", 42_404, 40),
  "refcoco_plus": ("refcoco+", "unc", 42_278, 40),
  "refcocog": ("refcocog", "umd", 42_226, 77),
}
BATCH, EPOCHS = 32, 40


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, data=tuple(DATA), method=presets.methods(), rate=("as_run", "as_intended"),
                            size=presets.sizes())  # fmt: skip
  variant, split_by, objects, tokens = DATA[words["data"]]
  tiny, epoch = words["size"] == "tiny", objects // BATCH
  config = ml_collections.ConfigDict(
    presets.run(num_steps=EPOCHS * epoch, log_every=50, eval_every=epoch, save_every=epoch)
  )
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("referring", words["method"], tiny=tiny, token_length=tokens))
  config.data = {
    "name": "refcoco",
    "root": "",
    "variant": variant,
    "split_by": split_by,  # "google" for refcoco and refcocog
    "eval_split": "val",  # "testA", "testB"; "test" of refcocog
    "images": "",  # folder of COCO's train2014 images if it is not in one of the usual places below root
    "crop": (128, 128) if tiny else (512, 512),
    "canvas": (640, 640),
    "overlap": "released",  # "union"
    "on_empty": "stop",  # "leave_out"
    "complete": True,  # False takes a part of the data set
    "cache": "off",  # "memory" or "disk" keep latents and text states, with the same results
    "cache_folder": "",  # for "disk"
    "format": "files",  # "tfds": prepared shards
    "batch_size": BATCH,
    "workers": 8,
    "on_bad_record": "stop",  # "skip"
  }
  config.optim = presets.referring_optimizer(unet_lr=0.01 if words["rate"] == "as_intended" else 1.0)
  # The images of one GPU: the release averages their weighted means. Batch norm uses the whole batch.
  config.optim.loss_group = 4
  config.eval = presets.evaluation(batch_size=32, test_time=())
  return config
