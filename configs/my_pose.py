"""Your own keypoints, of people or anything else: annotations in COCO's format. Copy and edit this file.

python -m vpd_jax.main --config=configs/my_pose.py --config.data.root=/data/mine \
    --config.init.pretrained=/weights/stable-diffusion-v1-5

Variants, comma-separated: a method (vpd, meta_prompts, iedp, eco_depth, tadp) and a size (sd21: Stable Diffusion 2.1;
tiny: the small network of the tests).
"""

import ml_collections

from vpd_jax.config import loader, presets
from vpd_jax.config.presets import pose

KEYPOINTS = ("nose", "left_eye", "right_eye", "tail")  # as the annotation file's category names them; () reads them
SKELETON = (("nose", "left_eye"), ("nose", "right_eye"), ("nose", "tail"))  # lines of the drawings; left/right swap


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(argument, method=presets.methods(), size=presets.sizes())
  tiny, steps = words["size"] == "tiny", 20_000
  config = ml_collections.ConfigDict(presets.run(num_steps=steps, log_every=50, eval_every=1000, save_every=1000))
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("pose", words["method"], tiny=tiny))
  config.task = pose.pose_task(sigma=1 if tiny else 2)
  config.data = {"name": "keypoint_list", "root": "", "train_json": "train.json", "eval_json": "", "images": "images"}
  config.data.update({"keypoints": KEYPOINTS, "skeleton": SKELETON, "pairs": (), "sigmas": (), "upper": ()})
  config.data.update({"holdout": 0.1, "crop": (128, 96) if tiny else (256, 192), "udp": True, "exif": "stored"})
  config.data.update({"captions": "", "detections": "", "person_category": -1})  # -1: as the annotations number it
  config.data.update({"rotation": 40.0, "scale": 0.5, "batch_size": 64, "workers": 8, "on_bad_record": "stop"})
  config.optim = pose.pose_optimizer(lr=6e-5, drops=(steps * 8 // 10, steps * 19 // 20))  # 5e-4 at 512
  config.eval = presets.evaluation(batch_size=32, test_time=("flip",), baselines=256)
  return config
