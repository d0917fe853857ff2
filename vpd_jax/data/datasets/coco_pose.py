"""COCO keypoints: people with 17 joints, in boxes of the annotators or of a detector.

Files, below `root`:
  annotations/person_keypoints_train2017.json and person_keypoints_val2017.json
  train2017/<12 digits>.jpg and val2017/<12 digits>.jpg
  person_detection_results/COCO_val2017_detections_AP_H_56_person.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpd_jax.data.readers import coco_json, image_files, label_maps, persons
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.errors import UserError
from vpd_jax.types import Dataset, DatasetInfo, Example, Published

BOXES = ("detections", "annotated")
YEARS = {"train": "train2017", "eval": "val2017"}
# People that the releases train on and score; the last by the boxes they are scored in.
COUNTS = {"train": 149_813, ("eval", "detections"): 104_125, ("eval", "annotated"): 6_352}
PICTURES = "they come from train2017.zip and val2017.zip of cocodataset.org."
ANNOTATIONS = "they come from annotations_trainval2017.zip of cocodataset.org."
DETECTIONS = (
  "it is not on cocodataset.org: the README of github.com/HRNet/HRNet-Human-Pose-Estimation links to it; or set "
  "data.boxes='annotated'."
)


class CocoPose(Dataset):
  """COCO keypoints with ViTPose's augmentation, a crop for each person.

  Args:
    root: folder of all others, or with format="tfds" the one that prepare_data.py wrote.
    crop: (H, W).
    boxes: in which people are scored: "detections" of a detector (as published), or "annotated".
    detections: the detector's file, from here or below `root`. Scores with boxes of another file cannot be compared.
    box_threshold: detections whose score is not above it are left out. Release: 0.
    person_category: the category_id of people in the detections; -1: as in the annotations. Many programs count from 0.
    annotations: folder of the annotation files, from here or below `root`. Evaluation reads its file with
      format="tfds" too: it is the ground truth of pictures in which nobody was detected.
    train_images, eval_images: folders of the pictures, below `root`.
    udp, padding, center_jitter, flip, half_body, upper_share, scale, rotation, rotation_chance: see
      keypoints.Augmentation.
    complete: whether the published numbers of people must be there; False takes what there is, and leaves detections
      of pictures that the annotations do not list out.
    format: "files", or "tfds" for prepared ArrayRecord shards, which hold the same records in the same order.

  Attributes:
    provides: keys of an Example, see keypoints.Augmentation.
    classes: the names of the 17 keypoints.
    published, stored, made_with: see nyu.Nyu and rooms.Rooms.

  Source: ViTPose configs/body/2d_kpt_sview_rgb_img/topdown_heatmap/coco; mmpose 0.x
  datasets/datasets/top_down/topdown_coco_dataset.py.
  """

  provides = top_down_transforms.PROVIDES
  classes = top_down_transforms.COCO.names
  stored = persons.STORED

  def __init__(
    self,
    *,
    root: str,
    crop: tuple[int, int] = (256, 192),
    boxes: str = "detections",
    detections: str = "person_detection_results/COCO_val2017_detections_AP_H_56_person.json",
    box_threshold: float = 0.0,
    person_category: int = -1,
    annotations: str = "annotations",
    train_images: str = YEARS["train"],
    eval_images: str = YEARS["eval"],
    udp: bool = True,
    padding: float = top_down_transforms.PADDING,
    center_jitter: str = "once",
    flip: float = 0.5,
    half_body: float = 0.3,
    upper_share: float = top_down_transforms.UPPER_SHARE,
    scale: float = 0.5,
    rotation: float = 40.0,
    rotation_chance: float = 0.6,
    complete: bool = True,
    format: str = "files",
  ):
    """Checks the options; files are looked for by `source`.

    Raises:
      ValueError: an unknown word, a number out of its range, no such folder.
    """
    if boxes not in BOXES:
      raise UserError(f"data.boxes={boxes!r} is unknown; choose one of {BOXES}.")
    options = {"udp": udp, "padding": padding, "center_jitter": center_jitter, "flip": flip, "half_body": half_body}
    options |= {"upper_share": upper_share, "scale": scale, "rotation": rotation, "rotation_chance": rotation_chance}
    self.augmentation = top_down_transforms.Augmentation(crop, top_down_transforms.COCO, **options)
    self.root, self.format, self.complete = root, reader.check_format(format), complete
    self.boxes, self.detections, self.box_threshold = boxes, detections, box_threshold
    self.person_category = person_category
    self.annotations, self.folders = annotations, {"train": train_images, "eval": eval_images}
    self.made_with = {"boxes": boxes, "box_threshold": box_threshold}
    # A threshold of one's own leaves fewer.
    whole = {"train": COUNTS["train"]} | ({} if box_threshold else {"eval": COUNTS["eval", boxes]})
    self.published = Published(whole if complete else {}, None, {})
    if format == "files":
      image_files.require_folder(root, "of COCO that holds annotations/, train2017/ and val2017/.")

  @classmethod
  def info(cls, options: Mapping[str, Any]) -> DatasetInfo:
    """See types.Dataset."""
    return DatasetInfo(classes=cls.classes, keypoints=top_down_transforms.COCO, udp=options.get("udp", True))

  @reader.read_once
  def source(self, split: str) -> Any:
    """The people of "train" or "eval", in the order of their pictures, whose pictures are all there.

    Raises:
      ValueError: files are missing or damaged, detections of other pictures, or another number of people than the
        published one. With format="tfds", the shards are not there or not whole.
    """
    if split not in YEARS:
      raise UserError(f"split={split!r} is unknown; choose one of {sorted(YEARS)}.")
    if self.format == "tfds":
      found = reader.Shards(self.root, "coco_pose", split, decode=persons.decode, made_with=self.made_with)
    else:
      annotations = self._annotations(split)
      chosen = range(len(annotations.images))
      if split == "eval" and self.boxes == "detections":
        path = image_files.find_list(Path(self.root).expanduser(), self.detections, (), DETECTIONS)
        options = {"others": "error" if self.complete else "skip", "threshold": self.box_threshold}
        options["category"] = self.person_category
        samples = coco_json.detected(path, annotations, chosen, **options)
      else:
        samples = coco_json.annotated(annotations, chosen)
      folder = Path(self.root).expanduser() / self.folders[split]
      found = persons.open_split(folder, annotations, chosen, samples, PICTURES)
    return label_maps.check_count(found, split, self.published.counts.get(split), "COCO keypoints")

  def truth(self, split: str) -> dict[str, Any]:
    """What is scored against, for pycocotools: all pictures of the split with all their people.

    "image_index" of an Example counts in its "images".

    Raises:
      ValueError: the annotation file is missing or damaged.
    """
    annotations = self._annotations(split)
    return coco_json.truth(annotations, range(len(annotations.images)))

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The augmentation of the release."""
    del position
    return self.augmentation.training(example, rng)

  def eval_transform(self, example: Example) -> Example:
    """The crop of the box."""
    return self.augmentation.evaluation(example)

  @reader.read_once
  def _annotations(self, split: str) -> coco_json.Annotations:
    name = f"{self.annotations}/person_keypoints_{YEARS[split]}.json"
    return coco_json.annotations(
      image_files.find_list(Path(self.root).expanduser(), name, (), ANNOTATIONS), top_down_transforms.COCO.names
    )
