"""Segmentation data of the user's own: a folder of pictures, a folder of masks, a list of classes.

Files, below `root`:
  images/<name>.jpg    of any kind OpenCV reads, of any sizes, also in folders of their own
  masks/<name>.png     of the size of its picture, one channel: gray, or with a palette whose indices count
By default the number in a mask is the class, in the order of `classes`, and 255 is no class.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import segmentation as segmentation_transforms
from vpd_jax.errors import UserError
from vpd_jax.types import Dataset, DatasetInfo, Example

SOURCE = "the options data.{images} and data.{masks} name the folders of pictures and of PNGs of the same names."
REMEDY = "correct data.classes, data.values or data.ignored."


class MaskFolder(Dataset):
  """Pictures and masks of a user, with mmsegmentation's augmentation.

  Args:
    root: folder of all others, or with format="tfds" the one that prepare_data.py wrote.
    classes: their names, in the order of the numbers in the masks.
    images, masks: folders of the training pictures and masks, below `root`.
    eval_images, eval_masks: the same for evaluation; empty holds out the last `holdout` of the sorted pictures, which
      are then not trained on. They are the last ones because neighbors are often frames of one video.
    holdout: share that is held out, rounded, at least one picture.
    mask_ending: of a mask's name after its picture's name without suffix; the suffix in either case.
    values: number in the masks by class, such as (0, 255) for black and white masks or (1, 2, 3) where 0 is nothing;
      () takes 0, 1, 2 and so on.
    ignored: numbers of no class, neither learned nor scored. Those that are of a class are not ignored.
    exif: "stored" or "turned", see files.EXIF.
    crop, scale, ratio_range, cat_max_ratio, color_jitter: see segmentation_transforms.Augmentation.
    format: "files", or "tfds" for prepared ArrayRecord shards, which hold the same records in the same order.

  Attributes:
    provides: see ade20k.Ade20k.
    stored, made_with: see nyu.Nyu and rooms.Rooms.
  """

  provides = frozenset({"image", "label", "index"}) | segmentation_transforms.ADDED
  stored = label_maps.STORED

  def __init__(
    self,
    *,
    root: str,
    classes: tuple[str, ...],
    images: str = "images",
    masks: str = "masks",
    eval_images: str = "",
    eval_masks: str = "",
    holdout: float = 0.1,
    mask_ending: str = ".png",
    values: tuple[int, ...] = (),
    ignored: tuple[int, ...] = (255,),
    exif: str = "stored",
    crop: tuple[int, int] = (512, 512),
    scale: tuple[int, int] = (2048, 512),
    ratio_range: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    color_jitter: bool = True,
    format: str = "files",
  ):
    """Checks the options; files are looked for by `source`.

    Raises:
      ValueError: in one line, for everything that is wrong with them.
    """
    self.classes, wrong = self.info({"classes": classes}).classes, []
    self.root, self.format, self.exif = root, reader.check_format(format), image_files.check_exif(exif)
    numbers = tuple(values) or tuple(range(len(self.classes)))
    if len(numbers) != len(self.classes) or len(set(numbers)) != len(numbers):
      wrong.append(f"values={values} must be {len(self.classes)} different numbers, one for each of data.classes")
    if bool(eval_images) != bool(eval_masks):
      wrong.append("eval_images and eval_masks must be given together, or neither")
    if not 0 < holdout < 1:
      wrong.append(f"holdout={holdout} must lie between 0 and 1, both excluded")
    if not mask_ending.lower().endswith(".png"):
      wrong.append(f"mask_ending={mask_ending!r} must end in '.png', the kind of file that keeps numbers")
    if wrong:
      raise UserError(f"data: {'; '.join(wrong)}.")
    mapped = {number: index for index, number in enumerate(numbers)}
    self.kinds = {"": label_maps.values(mapped, set(ignored) - mapped.keys(), REMEDY)}
    self.augmentation = segmentation_transforms.Augmentation(crop, scale, ratio_range, cat_max_ratio, color_jitter)
    self.folders = {"train": (images, masks), "eval": (eval_images, eval_masks) if eval_images else (images, masks)}
    self.holdout, self.mask_ending = (0.0 if eval_images else holdout), mask_ending
    self.made_with = {
      **{"images": images, "masks": masks, "eval_images": eval_images, "eval_masks": eval_masks},
      **{"holdout": holdout, "mask_ending": mask_ending},
    }
    if format == "files":
      image_files.require_folder(root, f"that holds {images}/ and {masks}/.")

  @classmethod
  def info(cls, options: Mapping[str, Any]) -> DatasetInfo:
    """See types.Dataset.

    Raises:
      ValueError: none, too many, not a list of names, or a name twice.
    """
    names = options.get("classes", ())
    given = tuple(names) if isinstance(names, tuple | list) else ()
    if not given or not all(isinstance(name, str) and name.strip() for name in given):
      raise UserError(f"data.classes={names!r} must be names, in the order of the masks' numbers: ('road', 'car').")
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice or len(given) > label_maps.MOST_CLASSES:
      what = f"names {', '.join(twice)} twice" if twice else f"has {len(given)} names"
      raise UserError(f"data.classes {what}; give at most {label_maps.MOST_CLASSES} different ones.")
    return DatasetInfo(classes=given)

  @reader.read_once
  def source(self, split: str) -> Any:
    """The pictures of "train" or "eval", sorted by name, whose masks are all there.

    Raises:
      ValueError: no such folder or no pictures, masks are missing (all are counted), or nothing is left to train on.
        With format="tfds", the shards are not there or not whole.
    """
    if split not in self.folders:
      raise UserError(f"split={split!r} is unknown; choose one of {sorted(self.folders)}.")
    if self.format == "tfds":
      decode = functools.partial(label_maps.decode, kinds=self.kinds, exif=self.exif)
      return reader.Shards(self.root, "mask_folder", split, decode=decode, made_with=self.made_with)
    root = Path(self.root).expanduser()
    prefix = "eval_" if split == "eval" and not self.holdout else ""
    hint = SOURCE.format(images=f"{prefix}images", masks=f"{prefix}masks")
    pairs = label_maps.pair_files(root, *self.folders[split], hint, ending=self.mask_ending, nested=True)
    if self.holdout:
      kept = len(pairs) - max(1, round(self.holdout * len(pairs)))
      if kept < 1:
        raise UserError(f"{root / self.folders[split][0]} has {len(pairs)} picture and one is held out; add more.")
      pairs = pairs[:kept] if split == "train" else pairs[kept:]
    found = label_maps.Pictures(root, pairs, self.kinds, self.exif)
    found.notes = image_files.exif_notes((root / image for image, _ in pairs), self.exif)
    return found

  def describe(self) -> list[str]:
    """Which labels occur in training, for the start of a run; see labels.histogram."""
    return [*label_maps.histogram(self.source("train"), self.classes), *super().describe()]

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The augmentation of the releases."""
    del position
    return self.augmentation.training(example, rng)

  def eval_transform(self, example: Example) -> Example:
    """The whole picture, see Augmentation.evaluation."""
    return self.augmentation.evaluation(example)
