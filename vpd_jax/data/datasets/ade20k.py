"""ADE20K SceneParsing: 150 classes, the files of ADEChallengeData2016.

Files, below `root` (the folder ADEChallengeData2016):
  images/training/ADE_train_<8 digits>.jpg      annotations/training/ADE_train_<8 digits>.png
  images/validation/ADE_val_<8 digits>.jpg      annotations/validation/ADE_val_<8 digits>.png
In annotations, 0 is unlabeled, and 1 to 150 are the classes 0 to 149.
"""

import dataclasses
from pathlib import Path

from vpd_jax.data.datasets.segmentation import SegmentationDataset
from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.types import Published

LIST = label_maps.read_class_list("ade20k_classes.json")
SPLITS = {"train": "training", "eval": "validation"}
COUNTS = {"train": 20_210, "eval": 2_000}
SOURCE = "it comes from ADEChallengeData2016.zip of sceneparsing.csail.mit.edu."
LABEL_MAPPINGS = {
  "": label_maps.make_mapping(
    {index + 1: index for index in range(len(LIST.names))},
    (0, label_maps.IGNORE),
    "those of ADEChallengeData2016 hold no others, those of the full ADE20K do.",
  )
}


@dataclasses.dataclass(eq=False, kw_only=True)
class Ade20k(SegmentationDataset):
  """ADE20K.

  Args:
    root: the folder ADEChallengeData2016, or with format="tfds" the one that prepare_data.py wrote.
    complete: whether the published 20 210 and 2 000 images are required; False accepts any number.

  Source: mmseg/datasets/ade.py (reduce_zero_label); VPD segmentation/configs/_base_/datasets/ade20k.py.
  """

  complete: bool = True

  name, title = "ade20k", "ADE20K"
  classes, palette, label_mappings = LIST.names, LIST.palette, LABEL_MAPPINGS

  def __post_init__(self):
    super().__post_init__()
    self.published = Published(COUNTS if self.complete else {}, None, {})
    if self.format == "files":
      image_files.require_folder(self.root, f"ADEChallengeData2016: {SOURCE}")

  def labeled_images(self, split: str) -> label_maps.LabeledImages:
    folder = Path(self.root).expanduser()
    pairs = label_maps.pair_files(folder, f"images/{SPLITS[split]}", f"annotations/{SPLITS[split]}", SOURCE)
    return label_maps.LabeledImages(folder, pairs, LABEL_MAPPINGS)
