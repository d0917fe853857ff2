"""NYU Depth v2 as the depth papers use it: BTS's synchronized frames for training, the official 654 for evaluation.

Files, below `root`:
  sync/<scene>_<nnnn>/rgb_<nnnnn>.jpg and sync_depth_<nnnnn>.png
  official_splits/test/<scene>/rgb_<nnnnn>.jpg and sync_depth_<nnnnn>.png
  train_list.txt and test_list.txt (or nyudepthv2_train_list.txt ..., or .gz; in `root` or its parent)
Depth is a 16-bit PNG in millimeters, 0 if missing.
"""

import dataclasses
from pathlib import Path

import numpy as np

from vpd_jax.data.datasets.depth import DepthDataset
from vpd_jax.data.readers import image_files
from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError, check_choice, first_items
from vpd_jax.types import DatasetInfo, Example, Options, Published, Source

# In the order of the class vectors in the released checkpoints; 'excercise_room' is spelled as in the data.
# Source: VPD depth/nyu_class_list.json.
CLASSES = (
  *("printer_room", "bathroom", "living_room", "study", "conference_room", "study_room", "kitchen", "home_office"),
  *("bedroom", "dinette", "playroom", "indoor_balcony", "laundry_room", "basement", "excercise_room", "foyer"),
  *("home_storage", "cafe", "furniture_store", "office_kitchen", "student_lounge", "dining_room", "reception_room"),
  *("computer_lab", "classroom", "office", "bookstore"),
)
DEPTH_SCALE = 1000.0  # millimeters in the files
MAX_DEPTH = 10.0  # meters, the sensor range assumed by all papers
FOLDERS = {"train": "sync", "eval": "official_splits/test"}
LISTS = {
  "train": ("train_list.txt", "nyudepthv2_train_list.txt"),
  "eval": ("test_list.txt", "nyudepthv2_test_list.txt"),
}
LISTS_SOURCE = "take it from depth/dataset/filenames/nyudepthv2 of github.com/wl-zhao/VPD, or name it in data.{option}."
FILES_SOURCE = {
  "train": "they come from sync.zip, which github.com/cleinc/bts links to.",
  "eval": "they are cut out of nyu_depth_v2_labeled.mat of NYU by the extraction script of github.com/cleinc/bts.",
}


@dataclasses.dataclass(eq=False, kw_only=True)
class Nyu(DepthDataset):
  """NYU Depth v2 with VPD's scene classes; images are 480x640.

  Args:
    root: folder that holds sync/ and official_splits/, or with format="tfds" the one that prepare_data.py wrote.
    train_list: list file of the training frames; empty searches for the usual names in `root` and its parent.
    test_list: the same for evaluation.
    format: "files", or "tfds" for prepared ArrayRecord shards, which contain the same records in the same order.

  Attributes:
    classes: names of the 27 scene classes.

  Source: VPD depth/dataset/nyudepthv2.py.
  """

  root: str
  crop: tuple[int, int] = (480, 480)
  train_list: str = ""
  test_list: str = ""
  format: str = "files"

  classes = CLASSES
  depth_scale, max_depth = DEPTH_SCALE, MAX_DEPTH
  published = Published({"train": 24_231, "eval": 654}, (480, 640), {"depth": (0.0, MAX_DEPTH)})
  stored = {**image_files.FRAME, "class_id": "int32", "index": "int32"}  # noqa: RUF012 (never changed)

  def __post_init__(self):
    check_choice("format", self.format, reader.FORMATS)
    super().__post_init__()
    self.check_crop("resize", self.resize)
    self.lists = {"train": self.train_list or None, "eval": self.test_list or None}
    if self.format == "tfds":
      options = [f"{split}_list" for split, name in (("train", self.train_list), ("test", self.test_list)) if name]
      if options:
        raise UserError(f"data.{options[0]} has no effect with data.format='tfds': the shards were made from a list.")
    else:
      image_files.require_folder(
        self.root, f"that holds sync/ and official_splits/ of NYU Depth v2: {FILES_SOURCE['train']}"
      )

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset."""
    del options
    return DatasetInfo(classes=cls.classes)

  @reader.read_once
  def source(self, split: str) -> Source:
    """The frames of "train" or "eval", in the order of the list file.

    Raises:
      ValueError: if the list file or listed files are missing (all are counted), or a folder matches no scene class;
        with format="tfds", for missing or incomplete shards.
    """
    check_choice("split", split, sorted(FOLDERS))
    if self.format == "tfds":
      return reader.Shards(self.root, "nyu", split, decode=decode)
    root = Path(self.root).expanduser()
    hint = LISTS_SOURCE.format(option="train_list" if split == "train" else "test_list")
    pairs = image_files.read_list(image_files.find_list(root, self.lists[split], LISTS[split], hint))
    folder = root / FOLDERS[split]
    image_files.require_files(folder, (name for pair in pairs for name in pair), FILES_SOURCE[split])
    return image_files.Frames(folder, pairs, decode, scene_classes([image for image, _ in pairs]))


def decode(record: image_files.Record, folder: Path | None = None) -> Example:
  """Decodes a record, from files or shards, to an Example; `folder` is for messages.

  Raises:
    ValueError: for a damaged image or wrong format, or images of different size; names the file.
  """
  numbers = {key: np.asarray(record[key], np.int32) for key in ("class_id", "index")}
  return {**image_files.decode_frame(record, folder, scale=DEPTH_SCALE), **numbers}


def scene_classes(names: list[str]) -> list[int]:
  """Class of each frame: the lowest index whose class name is a substring of '<folder>_<file>'.

  Therefore 'study_room' becomes 'study' and 'office_kitchen' becomes 'kitchen': classes 5 and 19 never occur.

  Raises:
    ValueError: for frames without class; states their number and the first ten.

  Source: VPD depth/dataset/nyudepthv2.py, `__getitem__`.
  """
  labels = ["_".join(name.split("/")[-2:]) for name in names]
  ids = [next((index for index, scene in enumerate(CLASSES) if scene in label), -1) for label in labels]
  unknown = [name for name, index in zip(names, ids, strict=True) if index < 0]
  if unknown:
    raise UserError(
      f"{len(unknown)} frames lie in folders of no scene class: {first_items(unknown)}; "
      f"folder names must contain one of {', '.join(CLASSES)}."
    )
  return ids
