"""Custom segmentation data: a folder of images, a folder of masks, a list of classes.

Files, below `root`:
  images/<name>.jpg    in any format that OpenCV reads, of any size, also in subfolders
  masks/<name>.png     of the size of the image, one channel: gray, or with a palette, whose indices are the values
By default, the values in a mask are indices into `classes`, and 255 is unlabeled.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from vpd_jax.data import validation
from vpd_jax.data.datasets.segmentation import SegmentationDataset
from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError, check_choice
from vpd_jax.types import DatasetInfo, Example, Options

SOURCE = "the options data.{images} and data.{masks} name the folders of pictures and of PNGs of the same names."
REMEDY = "correct data.classes, data.values or data.ignored."


@dataclasses.dataclass(eq=False, kw_only=True)
class MaskFolder(SegmentationDataset):
  """Custom images and masks.

  Args:
    root: the parent folder, or with format="tfds" the one that prepare_data.py wrote.
    classes: class names, in the order of the values in the masks.
    images, masks: folders of the training images and masks, below `root`.
    eval_images, eval_masks: the same for evaluation. Empty holds out the last `holdout` of the sorted images; the last
      ones, because neighbors are often frames of one video.
    holdout: fraction to hold out, rounded, at least one image.
    mask_ending: suffix of a mask after the image name without suffix; the file type is case-insensitive.
    values: value in the masks by class, such as (0, 255) for black and white masks or (1, 2, 3) if 0 is unlabeled;
      () for 0, 1, 2 and so on.
    ignored: unlabeled values, which are neither trained on nor scored, unless they are in `values`.
    exif: "stored" or "turned", see image_files.EXIF.
  """

  classes: tuple[str, ...] = dataclasses.field()
  images: str = "images"
  masks: str = "masks"
  eval_images: str = ""
  eval_masks: str = ""
  holdout: float = 0.1
  mask_ending: str = ".png"
  values: tuple[int, ...] = ()
  ignored: tuple[int, ...] = (255,)
  exif: str = "stored"

  name = "mask_folder"

  def __post_init__(self):
    """Checks the options; `source` checks the files.

    Raises:
      ValueError: one line that lists all problems.
    """
    self.classes, problems = self.info({"classes": self.classes}).classes, []
    check_choice("format", self.format, reader.FORMATS)
    check_choice("data.exif", self.exif, image_files.EXIF)
    values = tuple(self.values) or tuple(range(len(self.classes)))
    if len(values) != len(self.classes) or len(set(values)) != len(values):
      problems.append(
        f"values={self.values} must be {len(self.classes)} different numbers, one for each of data.classes"
      )
    if bool(self.eval_images) != bool(self.eval_masks):
      problems.append("eval_images and eval_masks must be given together, or neither")
    if not 0 < self.holdout < 1:
      problems.append(f"holdout={self.holdout} must lie between 0 and 1, both excluded")
    if not self.mask_ending.lower().endswith(".png"):
      problems.append(f"mask_ending={self.mask_ending!r} must end in '.png', the kind of file that keeps numbers")
    if problems:
      raise UserError(f"data: {'; '.join(problems)}.")
    mapped = {number: index for index, number in enumerate(values)}
    self.label_mappings = {"": label_maps.make_mapping(mapped, set(self.ignored) - mapped.keys(), REMEDY)}
    super().__post_init__()
    self.made_with = {
      **{"images": self.images, "masks": self.masks, "eval_images": self.eval_images, "eval_masks": self.eval_masks},
      **{"holdout": self.holdout, "mask_ending": self.mask_ending},
    }
    if self.format == "files":
      image_files.require_folder(self.root, f"that holds {self.images}/ and {self.masks}/.")

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset.

    Raises:
      ValueError: if the classes are not a list of names, are too many, or have duplicates.
    """
    names = options.get("classes", ())
    classes = tuple(names) if isinstance(names, tuple | list) else ()
    if not classes or not all(isinstance(name, str) and name.strip() for name in classes):
      raise UserError(f"data.classes={names!r} must be names, in the order of the masks' numbers: ('road', 'car').")
    duplicates = sorted({name for name in classes if classes.count(name) > 1})
    if duplicates or len(classes) > label_maps.MAX_CLASSES:
      what = f"names {', '.join(duplicates)} twice" if duplicates else f"has {len(classes)} names"
      raise UserError(f"data.classes {what}; give at most {label_maps.MAX_CLASSES} different ones.")
    return DatasetInfo(classes=classes)

  def labeled_images(self, split: str) -> label_maps.LabeledImages:
    root, has_eval_folder = Path(self.root).expanduser(), split == "eval" and bool(self.eval_images)
    prefix, folders = (
      ("eval_", (self.eval_images, self.eval_masks)) if has_eval_folder else ("", (self.images, self.masks))
    )
    hint = SOURCE.format(images=f"{prefix}images", masks=f"{prefix}masks")
    pairs = label_maps.pair_files(root, *folders, hint, ending=self.mask_ending, nested=True)
    if not self.eval_images:
      num_train = validation.train_count(len(pairs), self.holdout)
      if num_train < 1:
        raise UserError(f"{root / self.images} has {len(pairs)} picture and one is held out; add more.")
      pairs = pairs[:num_train] if split == "train" else pairs[num_train:]
    images = label_maps.LabeledImages(root, pairs, self.label_mappings, self.exif)
    images.notes = image_files.exif_notes((root / image for image, _ in pairs), self.exif)
    return images

  def decode(self) -> Callable[..., Example]:
    return functools.partial(label_maps.decode, label_mappings=self.label_mappings, exif=self.exif)
