"""Cityscapes: 19 classes of street scenes, with the fine, the coarse and machine labels.

Files, below `root`:
  leftImg8bit/{train,val,train_extra}/<city>/<frame>_leftImg8bit.png
  gtFine/{train,val}/<city>/<frame>_gtFine_labelTrainIds.png, or _labelIds.png as downloaded
  gtCoarse/train_extra/<city>/<frame>_gtCoarse_labelTrainIds.png, or _labelIds.png   for extra="coarse"
  convert_autolabelled/<city>/<frame>_gtFine_labelTrainIds.png                       for extra="autolabelled"
with <frame> as in aachen_000000_000019. Files with train ids take precedence over those with label ids.
"""

import dataclasses
import os
from pathlib import Path

from vpd_jax.data.datasets.segmentation import SegmentationDataset
from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.errors import UserError, check_choice
from vpd_jax.files import reading
from vpd_jax.types import Published

LIST = label_maps.read_class_list("cityscapes_classes.json")
SPLITS = {"train": "train", "eval": "val"}
COUNTS = {"train": 2_975, "eval": 500}
EXTRA = ("none", "coarse", "autolabelled")
CORRUPT = "troisdorf_000000_000073"  # a frame of train_extra without image data
EXTRA_COUNT = 19_997  # of 19 998, without CORRUPT
IMAGE = "_leftImg8bit.png"
SOURCES = {
  "leftImg8bit": "it comes from leftImg8bit_trainvaltest.zip of cityscapes-dataset.com, train_extra from the one of "
  "that name.",
  "gtFine": "they come from gtFine_trainvaltest.zip of cityscapes-dataset.com.",
  "gtCoarse": "they come from gtCoarse.zip of cityscapes-dataset.com.",
  "convert_autolabelled": "they are machine labels with train ids, named as those of gtFine.",
}
LABEL_IDS = {row["label_id"]: train_id for train_id, row in enumerate(LIST.rows)}
_REMEDY = "a file of label ids must end in _labelIds.png, one of train ids in _labelTrainIds.png."
LABEL_MAPPINGS = {  # by suffix of the file name
  "_labelTrainIds.png": label_maps.make_mapping(
    {index: index for index in range(len(LIST.names))}, (label_maps.IGNORE,), _REMEDY
  ),
  # 0 to 33 are defined; the license plate is -1, stored as 255 in 8 bits.
  "_labelIds.png": label_maps.make_mapping(LABEL_IDS, {*range(34), 255} - LABEL_IDS.keys(), _REMEDY),
}


@dataclasses.dataclass(eq=False, kw_only=True)
class Cityscapes(SegmentationDataset):
  """Cityscapes.

  Args:
    root: folder that holds leftImg8bit/ and gtFine/, or with format="tfds" the one that prepare_data.py wrote.
    extra: additional training data besides the fine labels: "none"; "coarse", train_extra with the coarse labels; or
      "autolabelled", train_extra with machine labels, as in MetaPrompts' best model.
    cities: folder names of the training cities; () for all. Evaluation always uses all three of its cities.
    complete: whether the published numbers of images are required; False accepts any number.

  Attributes:
    provides: see SegmentationDataset; "index" is the position in the sorted folders, extra frames last.
    classes: the 19 names, by train id.

  Source: mmseg/datasets/cityscapes.py; MetaPrompts segmentation/configs/cityscapes_extra.py. The table of label ids is
  that of cityscapesscripts/helpers/labels.py.
  """

  crop: tuple[int, int] = (1024, 1024)
  scale: tuple[int, int] = (2048, 1024)
  extra: str = "none"
  cities: tuple[str, ...] = ()
  complete: bool = True

  name, title = "cityscapes", "Cityscapes"
  classes, palette, label_mappings = LIST.names, LIST.palette, LABEL_MAPPINGS
  label_ids = tuple(sorted(LABEL_IDS, key=LABEL_IDS.__getitem__))  # as the test server expects them

  def __post_init__(self):
    check_choice("extra", self.extra, EXTRA)
    if isinstance(self.cities, str):
      raise UserError(f"cities={self.cities!r} must be a tuple of names; write ({self.cities!r},).")
    super().__post_init__()
    counts = dict(COUNTS, train=COUNTS["train"] + (EXTRA_COUNT if self.extra != "none" else 0))
    if self.cities:
      del counts["train"]
    self.published = Published(counts if self.complete else {}, (1024, 2048), {})
    self.made_with = {"extra": self.extra, "cities": tuple(self.cities)}
    if self.format == "files":
      image_files.require_folder(
        self.root, f"that holds leftImg8bit/ and gtFine/ of Cityscapes: {SOURCES['leftImg8bit']}"
      )

  def labeled_images(self, split: str) -> label_maps.LabeledImages:
    root = Path(self.root).expanduser()
    cities = tuple(self.cities) if split == "train" else ()
    pairs = frames(root, SPLITS[split], f"gtFine/{SPLITS[split]}", "gtFine", cities)
    if split == "train" and self.extra == "coarse":
      pairs += frames(root, "train_extra", "gtCoarse/train_extra", "gtCoarse")
    elif split == "train" and self.extra == "autolabelled":
      pairs += frames(root, "train_extra", "convert_autolabelled", "gtFine")
    return label_maps.LabeledImages(root, pairs, LABEL_MAPPINGS)


def frames(root: Path, images: str, labeled: str, kind: str, cities: tuple[str, ...] = ()) -> list[tuple[str, str]]:
  """Images and label files of a split, sorted.

  Args:
    root: of the data set.
    images: folder below leftImg8bit.
    labeled: folder of the label files, below `root`.
    kind: "gtFine" or "gtCoarse", as in the label files' names.
    cities: folders to use; () for all.

  Raises:
    ValueError: if the image folder, a city or label files are missing.
  """
  folder = root / "leftImg8bit" / images
  folders = reading.visible(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
  if not folders:
    raise UserError(f"{folder} holds no cities; {SOURCES['leftImg8bit']}")
  if unknown := sorted(set(cities) - set(folders)):
    raise UserError(f"cities={unknown} are not in {folder}; choose among {', '.join(folders)}.")
  pairs = []
  for city in folders if not cities else [city for city in folders if city in cities]:
    label_folder = root / labeled / city
    label_files = set(os.listdir(label_folder)) if label_folder.is_dir() else set()
    for name in reading.visible(os.listdir(folder / city)):
      frame = name.removesuffix(IMAGE)
      if frame != name and frame != CORRUPT:
        label_file = next(
          (f"{frame}_{kind}{end}" for end in LABEL_MAPPINGS if f"{frame}_{kind}{end}" in label_files), ""
        )
        pairs.append(
          (f"leftImg8bit/{images}/{city}/{name}", f"{labeled}/{city}/{label_file or f'{frame}_{kind}_labelIds.png'}")
        )
  image_files.require_files(root, (label for _, label in pairs), SOURCES[labeled.split("/")[0]])
  return pairs
