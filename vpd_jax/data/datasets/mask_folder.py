"""Segmentation data of the user's own: a folder of pictures, a folder of masks, a list of classes.

Files, below `root`:
  images/<name>.jpg    of any kind OpenCV reads, of any sizes, also in folders of their own
  masks/<name>.png     of the size of its picture, one channel: gray, or with a palette whose indices count
By default the number in a mask is the class, in the order of `classes`, and 255 is no class.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from vpd_jax.data.datasets.segmentation import SegmentationDataset
from vpd_jax.data.readers import image_files, label_maps
from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError
from vpd_jax.types import DatasetInfo, Example, Options

SOURCE = "the options data.{images} and data.{masks} name the folders of pictures and of PNGs of the same names."
REMEDY = "correct data.classes, data.values or data.ignored."


@dataclasses.dataclass(eq=False, kw_only=True)
class MaskFolder(SegmentationDataset):
  """Pictures and masks of a user.

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
    """Checks the options; files are looked for by `source`.

    Raises:
      ValueError: in one line, for everything that is wrong with them.
    """
    self.classes, wrong = self.info({"classes": self.classes}).classes, []
    reader.check_format(self.format)
    image_files.check_exif(self.exif)
    numbers = tuple(self.values) or tuple(range(len(self.classes)))
    if len(numbers) != len(self.classes) or len(set(numbers)) != len(numbers):
      wrong.append(f"values={self.values} must be {len(self.classes)} different numbers, one for each of data.classes")
    if bool(self.eval_images) != bool(self.eval_masks):
      wrong.append("eval_images and eval_masks must be given together, or neither")
    if not 0 < self.holdout < 1:
      wrong.append(f"holdout={self.holdout} must lie between 0 and 1, both excluded")
    if not self.mask_ending.lower().endswith(".png"):
      wrong.append(f"mask_ending={self.mask_ending!r} must end in '.png', the kind of file that keeps numbers")
    if wrong:
      raise UserError(f"data: {'; '.join(wrong)}.")
    mapped = {number: index for index, number in enumerate(numbers)}
    self.kinds = {"": label_maps.values(mapped, set(self.ignored) - mapped.keys(), REMEDY)}
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

  def pictures(self, split: str) -> label_maps.Pictures:
    root, own = Path(self.root).expanduser(), split == "eval" and bool(self.eval_images)
    prefix, folders = ("eval_", (self.eval_images, self.eval_masks)) if own else ("", (self.images, self.masks))
    hint = SOURCE.format(images=f"{prefix}images", masks=f"{prefix}masks")
    pairs = label_maps.pair_files(root, *folders, hint, ending=self.mask_ending, nested=True)
    if not self.eval_images:
      kept = len(pairs) - max(1, round(self.holdout * len(pairs)))
      if kept < 1:
        raise UserError(f"{root / self.images} has {len(pairs)} picture and one is held out; add more.")
      pairs = pairs[:kept] if split == "train" else pairs[kept:]
    found = label_maps.Pictures(root, pairs, self.kinds, self.exif)
    found.notes = image_files.exif_notes((root / image for image, _ in pairs), self.exif)
    return found

  def decode(self) -> Callable[..., Example]:
    return functools.partial(label_maps.decode, kinds=self.kinds, exif=self.exif)
