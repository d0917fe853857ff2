"""Custom keypoint data, of people or other objects, in COCO format.

Files, below `root`:
  train.json   annotations in COCO's format, see coco_json.py; one category names the keypoints
  eval.json    the same for evaluation, if `eval_json` names it; else the last images of the training file are held out
  images/      the annotated images, in any format that OpenCV reads and of any size
"""

import dataclasses
import functools
from pathlib import Path

from vpd_jax.data import validation
from vpd_jax.data.datasets.pose import PoseDataset
from vpd_jax.data.readers import coco_json, image_files, persons
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.errors import UserError, check_choice
from vpd_jax.types import Fields, Keypoints, Options, Source


@dataclasses.dataclass(eq=False, kw_only=True)
class KeypointList(PoseDataset):
  """Images with annotated keypoints.

  Args:
    root: the parent folder, or with format="tfds" the one that prepare_data.py wrote.
    train_json, eval_json: annotation files, relative to `root` or existing paths. An empty eval_json holds out the last
      `holdout` of the training images; the last ones, because neighbors are often frames of one video.
    json_root: folder of the JSON files; empty for `root`. Also needed with format="tfds", since the annotations are the
      ground truth of evaluation.
    images: folder of the images, below `root`.
    holdout: fraction to hold out, rounded, at least one image.
    detections: detected boxes for evaluation, a file in COCO format, relative to `root` or an existing path; empty for
      the annotated boxes.
    person_category: the category_id of people in the detections; -1: as in the annotations. Many programs count from 0.
    keypoints: the names, in the order of the files; empty for those of the training file, which must then exist.
    pairs, skeleton, sigmas, upper: see top_down.keypoints_from_names.
    exif: "stored" or "turned", see image_files.EXIF.
  """

  root: str
  train_json: str = "train.json"
  eval_json: str = ""
  json_root: str = ""
  images: str = "images"
  holdout: float = 0.1
  detections: str = ""
  person_category: int = -1
  keypoints: tuple[str, ...] = ()
  pairs: tuple[tuple[str, str], ...] = ()
  skeleton: tuple[tuple[str, str], ...] = ()
  sigmas: tuple[float, ...] = ()
  upper: tuple[str, ...] = ()
  exif: str = "stored"

  stored = persons.STORED

  def __post_init__(self):
    """Checks the options; `source` checks the images.

    Raises:
      ValueError: one line that lists all problems.
    """
    keypoints = self.keypoints_of(vars(self))
    self.augmentation, self.classes = self._augmentation(keypoints), keypoints.names
    if not 0 < self.holdout < 1:
      raise UserError(f"data.holdout={self.holdout} must lie between 0 and 1, both excluded.")
    check_choice("format", self.format, reader.FORMATS)
    check_choice("data.exif", self.exif, image_files.EXIF)
    self._json_root = Path(self.json_root or self.root).expanduser()
    self._files = {"train": self.train_json, "eval": self.eval_json or self.train_json}
    self.made_with = {"train_json": self.train_json, "eval_json": self.eval_json}
    self.made_with |= {"holdout": self.holdout, "detections": self.detections}
    if self.detections:
      self.made_with["person_category"] = None if self.person_category == -1 else self.person_category
    if self.format == "files":
      image_files.require_folder(self.root, f"that holds {self.train_json} and {self.images}/.")

  @classmethod
  def keypoints_of(cls, options: Options) -> Keypoints:
    """The keypoints of a data set with these options; if they include the names, no file is read.

    Raises:
      ValueError: if neither the options nor the file name them, or for inconsistent options.
    """
    names = tuple(options.get("keypoints", ()))
    if not names:
      root = Path(options.get("json_root", "") or options.get("root", "")).expanduser()
      hint = "it names the keypoints if data.keypoints does not."
      names = coco_json.keypoint_names(image_files.find_list(root, options.get("train_json", "train.json"), (), hint))
    return top_down_transforms.keypoints_from_names(
      names, **{key: tuple(options.get(key, ())) for key in ("pairs", "skeleton", "sigmas", "upper")}
    )

  @reader.read_once
  def source(self, split: str) -> Source:
    """The people of "train" or "eval", in the order of their images.

    Raises:
      ValueError: for missing or damaged files, an empty split, or detections of other images; with format="tfds", for
        missing or incomplete shards.
    """
    if self.format == "tfds":
      decode = functools.partial(persons.decode, exif=self.exif)
      return reader.Shards(self.root, "keypoint_list", split, decode=decode, made_with=self.made_with)
    annotations, chosen = self._chosen(split)
    if split == "eval" and self.detections:
      path = image_files.find_list(self._json_root, self.detections, (), "name it in data.detections.")
      # Without an eval_json, the detections may include the training images.
      others = "error" if self.eval_json else "skip"
      options = {"others": others, "threshold": 0.0, "category": self.person_category}
      remedy = "take the detections of data.eval_json, or remove the others"
      samples = coco_json.detected(path, annotations, chosen, **options, remedy=remedy)
    else:
      samples = coco_json.annotated(annotations, chosen)
    folder = Path(self.root).expanduser() / self.images
    source = f"{annotations.path} names them, data.images their folder."
    return persons.open_split(folder, annotations, chosen, samples, source, self.exif)

  def truth(self, split: str) -> Fields:
    """The ground truth, see coco_pose.CocoPose.truth."""
    return coco_json.truth(*self._chosen(split))

  @reader.read_once
  def _chosen(self, split: str) -> tuple[coco_json.Annotations, range]:
    """The annotations of a split and the indices of its images in them."""
    check_choice("split", split, sorted(self._files))
    option = "eval_json" if split == "eval" and self.eval_json else "train_json"
    path = image_files.find_list(self._json_root, self._files[split], (), f"name it in data.{option}.")
    annotations = coco_json.annotations(path, self.classes)
    count = len(annotations.images)
    if self.eval_json:
      return annotations, range(count)
    num_train = validation.train_count(count, self.holdout)
    if num_train < 1:
      raise UserError(f"{path} has {count} picture and one is held out; add more, or an eval_json.")
    return annotations, range(num_train) if split == "train" else range(num_train, count)
