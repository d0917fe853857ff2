"""Mapillary Vistas v1.2 with the 19 classes of Cityscapes, on which MetaPrompts' best model was trained first.

Files, below `root`: {training,validation}/images/<name>.jpg and {training,validation}/labels/<name>.png, the latter in
v1.2/labels where version 2 was downloaded. A label file has a palette and holds 0 to 65.
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
# The release starts from zeros, so that a number beyond 65 becomes road there; here it is an error.
KINDS = {"": label_maps.values(MAPPED, set(range(LABELS)) - MAPPED.keys(), "these are the labels of version 1.2.")}


@dataclasses.dataclass(eq=False, kw_only=True)
class Mapillary(SegmentationDataset):
  """Mapillary Vistas.

  MetaPrompts publishes the mapping of classes, but not the configuration of that training: crop and scale here are
  those of Cityscapes, as are classes and colors.

  Args:
    root: folder that holds training/ and validation/, or with format="tfds" the one that prepare_data.py wrote.
    complete: whether the published 18 000 and 2 000 pictures must be there; False takes what there is.

  Source: MetaPrompts segmentation/mapillary_v1.py, MapillaryHack.
  """

  crop: tuple[int, int] = (1024, 1024)
  scale: tuple[int, int] = (2048, 1024)
  complete: bool = True

  name, title = "mapillary", "Mapillary Vistas"
  classes, palette, kinds = cityscapes.LIST.names, cityscapes.LIST.palette, KINDS

  def __post_init__(self):
    super().__post_init__()
    self.published = Published(COUNTS if self.complete else {}, None, {})
    if self.format == "files":
      image_files.require_folder(self.root, f"that holds training/ and validation/ of Mapillary Vistas: {SOURCE}")

  def pictures(self, split: str) -> label_maps.Pictures:
    root, part = Path(self.root).expanduser(), SPLITS[split]
    inner = "v1.2/labels" if (root / part / "v1.2" / "labels").is_dir() else "labels"
    return label_maps.Pictures(root, label_maps.pair_files(root, f"{part}/images", f"{part}/{inner}", SOURCE), KINDS)
