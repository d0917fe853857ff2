"""Human pose on COCO keypoints, a crop per person, 210 epochs at a global batch of 512.

python -m vpd_jax.main --config=configs/coco_pose.py:meta_prompts --config.data.root=/data/coco \
    --config.init.pretrained=/weights/v1-5-pruned-emaonly.ckpt

Variants, comma-separated: a method (vpd, meta_prompts, iedp, eco_depth, tadp), a crop size (256x192, 384x288, 512x384,
1024x768), a length (210epochs, 42epochs), and a network size (sd21: Stable Diffusion 2.1; tiny: the small network of
the tests, with its own crop size). TADP reads a caption of every image: --config.data.captions=FILE.

None of the papers published code for pose. Data, loss, decoding, and scores follow ViTPose in mmpose 0.x; prompts,
heads, and the UNet's learning rate are assumptions, see presets/pose.py. Scores use the boxes of
COCO_val2017_detections_AP_H_56_person.json and cannot be compared with those of other boxes.

Expected AP on val2017: MetaPrompts 79.0 (a results page; size, head and epochs are not known). VPD and IEDP: not
published. Ours: not yet run.
"""

import ml_collections

from vpd_jax.config import loader, presets
from vpd_jax.config.presets import pose

SIGMAS = {"256x192": 2, "384x288": 3, "512x384": 4, "1024x768": 6}  # the last as SDPose has it
LENGTHS = {"210epochs": (210, 170, 200), "42epochs": (42, 34, 40)}  # all, and where the rate falls to a tenth
ITERATIONS = 293  # per epoch: 149 813 people over 512


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The config of the comma-separated variants in `argument`."""
  words = loader.parse_variant(
    argument, method=presets.methods("meta_prompts"), crop=tuple(SIGMAS), length=tuple(LENGTHS), size=presets.sizes()
  )
  tiny, (epochs, *drops) = words["size"] == "tiny", LENGTHS[words["length"]]
  config = ml_collections.ConfigDict(
    presets.run(num_steps=epochs * ITERATIONS, log_every=50, eval_every=10 * ITERATIONS, save_every=ITERATIONS)
  )
  config.backbone = presets.backbone(words["size"])
  config.update(presets.sections("pose", words["method"], tiny=tiny))
  config.task = pose.pose_task(sigma=1 if tiny else SIGMAS[words["crop"]])
  config.data = {
    "name": "coco_pose",
    "root": "",
    "crop": (128, 96) if tiny else tuple(map(int, words["crop"].split("x"))),
    "boxes": "detections",  # "annotated"
    "detections": "person_detection_results/COCO_val2017_detections_AP_H_56_person.json",
    "box_threshold": 0.0,
    "person_category": -1,  # in the detections; -1: as in the annotations
    "annotations": "annotations",
    "udp": True,
    "padding": 1.25,
    "center_jitter": "once",  # "always", "off"
    "flip": 0.5,
    "half_body": 0.3,
    "upper_share": 0.6915,  # the release compares a normal number, not a uniform one, with 0.5; 0.5
    "scale": 0.5,
    "rotation": 40.0,
    "rotation_chance": 0.6,
    "complete": True,  # False takes a part of the data set
    "format": "files",  # "tfds": prepared shards
    "batch_size": 512,  # with another one, change optim.lr in proportion
    "workers": 8,
    "on_bad_record": "stop",  # "skip"
    "captions": "",  # a file of them, for methods that read a sentence; see docs/data.md
  }
  config.optim = pose.pose_optimizer(lr=5e-4, drops=tuple(ITERATIONS * drop for drop in drops))
  config.eval = presets.evaluation(batch_size=64, test_time=("flip",))
  return config
