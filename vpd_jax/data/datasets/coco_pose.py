"""COCO keypoints: people with 17 joints, in annotated or detected boxes.

Files, below `root`:
  annotations/person_keypoints_train2017.json and person_keypoints_val2017.json
  train2017/<12 digits>.jpg and val2017/<12 digits>.jpg
  person_detection_results/COCO_val2017_detections_AP_H_56_person.json
"""

import dataclasses
from pathlib import Path

from vpd_jax.data.datasets.pose import PoseDataset
from vpd_jax.data.readers import coco_json, image_files, label_maps, persons
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.errors import check_choice
from vpd_jax.types import Fields, Published, Source

BOXES = ("detections", "annotated")
YEARS = {"train": "train2017", "eval": "val2017"}
# Number of people in training and evaluation of the releases; evaluation by the boxes used.
COUNTS = {"train": 149_813, ("eval", "detections"): 104_125, ("eval", "annotated"): 6_352}
PICTURES = "they come from train2017.zip and val2017.zip of cocodataset.org."
ANNOTATIONS = "they come from annotations_trainval2017.zip of cocodataset.org."
DETECTIONS = (
  "it is not on cocodataset.org: the README of github.com/HRNet/HRNet-Human-Pose-Estimation links to it; or set "
  "data.boxes='annotated'."
)


@dataclasses.dataclass(eq=False, kw_only=True)
class CocoPose(PoseDataset):
  """COCO keypoints.

  Args:
    root: the parent folder, or with format="tfds" the one that prepare_data.py wrote.
    boxes: the boxes for evaluation: "detections" of a detector (as published), or "annotated".
    detections: the detection file, relative to `root` or an existing path. Scores with other files are not comparable.
    box_threshold: detections with scores below it are dropped. Release: 0.
    person_category: the category_id of people in the detections; -1: as in the annotations. Many programs count from 0.
    annotations: folder of the annotation files, relative to `root` or an existing path. Evaluation also reads them with
      format="tfds", because they include images without detections.
    train_images, eval_images: folders of the images, below `root`.
    upper_share: see top_down.Augmentation.
    complete: whether the published numbers of people are required; False accepts any number, and drops detections of
      images that are not in the annotations.

  Source: ViTPose configs/body/2d_kpt_sview_rgb_img/topdown_heatmap/coco; mmpose 0.x
  datasets/datasets/top_down/topdown_coco_dataset.py.
  """

  root: str
  boxes: str = "detections"
  detections: str = "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
  box_threshold: float = 0.0
  person_category: int = -1
  annotations: str = "annotations"
  train_images: str = YEARS["train"]
  eval_images: str = YEARS["eval"]
  upper_share: float = top_down_transforms.UPPER_SHARE
  complete: bool = True

  stored = persons.STORED

  def __post_init__(self):
    """Checks the options; `source` checks the files.

    Raises:
      ValueError: for an unknown word, a number out of range or a missing folder.
    """
    check_choice("data.boxes", self.boxes, BOXES)
    super().__post_init__()
    self.augmentation = self._augmentation(top_down_transforms.COCO, upper_share=self.upper_share)
    self.folders = {"train": self.train_images, "eval": self.eval_images}
    self.made_with = {"boxes": self.boxes, "box_threshold": self.box_threshold}
    if self.boxes == "detections":
      self.made_with["detections"] = None if self.detections == type(self).detections else self.detections
      self.made_with["person_category"] = None if self.person_category == -1 else self.person_category
    # A threshold above 0 changes the number of detections.
    counts = {"train": COUNTS["train"]} | ({} if self.box_threshold else {"eval": COUNTS["eval", self.boxes]})
    self.published = Published(counts if self.complete else {}, None, {})
    if self.format == "files":
      image_files.require_folder(self.root, "of COCO that holds annotations/, train2017/ and val2017/.")

  @reader.read_once
  def source(self, split: str) -> Source:
    """The people of "train" or "eval", in the order of their images.

    Raises:
      ValueError: for missing or damaged files, detections of other images, or another number of people than published;
        with format="tfds", for missing or incomplete shards.
    """
    check_choice("split", split, sorted(YEARS))
    if self.format == "tfds":
      people: Source = reader.Shards(self.root, "coco_pose", split, decode=persons.decode, made_with=self.made_with)
    else:
      annotations = self._annotations(split)
      chosen = range(len(annotations.images))
      if split == "eval" and self.boxes == "detections":
        path = image_files.find_list(Path(self.root).expanduser(), self.detections, (), DETECTIONS)
        options = {"others": "error" if self.complete else "skip", "threshold": self.box_threshold}
        options["category"] = self.person_category
        remedy = "take the detections of this split, or set data.complete=False to leave them out"
        samples = coco_json.detected(path, annotations, chosen, **options, remedy=remedy)
      else:
        samples = coco_json.annotated(annotations, chosen)
      folder = Path(self.root).expanduser() / self.folders[split]
      people = persons.open_split(folder, annotations, chosen, samples, PICTURES)
    return label_maps.check_count(people, split, self.published.counts.get(split), "COCO keypoints")

  def truth(self, split: str) -> Fields:
    """The ground truth for pycocotools: all images of the split with all their people.

    "image_index" of an Example is an index into its "images".

    Raises:
      ValueError: if the annotation file is missing or damaged.
    """
    annotations = self._annotations(split)
    return coco_json.truth(annotations, range(len(annotations.images)))

  @reader.read_once
  def _annotations(self, split: str) -> coco_json.Annotations:
    name = f"{self.annotations}/person_keypoints_{YEARS[split]}.json"
    return coco_json.annotations(
      image_files.find_list(Path(self.root).expanduser(), name, (), ANNOTATIONS), top_down_transforms.COCO.names
    )
