"""Mapillary Vistas v1.2 with the 19 classes of Cityscapes, the pretraining data of MetaPrompts' best model.

Files, below `root`: {training,validation}/images/<name>.jpg and {training,validation}/labels/<name>.png, the latter in
v1.2/labels for downloads of version 2. A label file has a palette and the values 0 to 65.
"""

import dataclasses
from pathlib import Path

from vpd_jax.data.datasets import cityscapes
from vpd_jax.data.datasets.segmentation import SegmentationDataset
from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.types import Published

SPLITS = {"train": "training", "eval": "validation"}
COUNTS = {"train": 18_000, "eval": 2_000}
SOURCE = "it comes from the download of Mapillary Vistas at mapillary.com/dataset/vistas."
LABELS = 66
MAPPED = {number: index for index, row in enumerate(cityscapes.LIST.rows) for number in row["mapillary"]}
# In the release, values beyond 65 become road, since its arrays start as zeros; here they are an error.
LABEL_MAPPINGS = {
  "": label_maps.make_mapping(MAPPED, set(range(LABELS)) - MAPPED.keys(), "these are the labels of version 1.2.")
}


@dataclasses.dataclass(eq=False, kw_only=True)
class Mapillary(SegmentationDataset):
  """Mapillary Vistas.

  MetaPrompts publishes the class mapping, but not the configuration of this training. Crop, scale, classes and colors
  are those of Cityscapes.

  Args:
    root: folder that holds training/ and validation/, or with format="tfds" the one that prepare_data.py wrote.
    complete: whether the published 18 000 and 2 000 images are required; False accepts any number.

  Source: MetaPrompts segmentation/mapillary_v1.py, MapillaryHack.
  """

  crop: tuple[int, int] = (1024, 1024)
  scale: tuple[int, int] = (2048, 1024)
  complete: bool = True

  name, title = "mapillary", "Mapillary Vistas"
  classes, palette, label_mappings = cityscapes.LIST.names, cityscapes.LIST.palette, LABEL_MAPPINGS

  def __post_init__(self):
    super().__post_init__()
    self.published = Published(COUNTS if self.complete else {}, None, {})
    if self.format == "files":
      image_files.require_folder(self.root, f"that holds training/ and validation/ of Mapillary Vistas: {SOURCE}")

  def labeled_images(self, split: str) -> label_maps.LabeledImages:
    root, part = Path(self.root).expanduser(), SPLITS[split]
    inner = "v1.2/labels" if (root / part / "v1.2" / "labels").is_dir() else "labels"
    return label_maps.LabeledImages(
      root, label_maps.pair_files(root, f"{part}/images", f"{part}/{inner}", SOURCE), LABEL_MAPPINGS
    )
