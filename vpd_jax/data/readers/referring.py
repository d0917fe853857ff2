"""Sources and transforms for images with objects and sentences about them.

In training, an example is an object with all its sentences, of which one is sampled each time; in evaluation, it is one
sentence, and the sentences of an image are consecutive.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from vpd_jax.data import validation
from vpd_jax.data.readers import image_files
from vpd_jax.data.readers.coco_masks import Outline
from vpd_jax.errors import UserError, check_choice
from vpd_jax.files import image_decoding
from vpd_jax.types import Cache, Example, Source

# Features of a record, see shards/writer.py:FEATURES.
STORED = {
  **{"image": "picture", "mask": "labels8", "sentences": "text", "image_path": "text"},
  **{"image_id": "int32", "index": "int32"},
}
ADDED = frozenset({"sentence", "full_mask", "full_size"})  # keys that the transforms add
PROVIDES = frozenset({"image", "mask", "image_id", "index"}) | ADDED


CACHES = ("off", "memory", "disk")


def check_cache(cache: str, folder: str) -> Cache:
  """Checks the two cache options of a config.

  Raises:
    ValueError: for an unknown word, "disk" without a folder, a folder without "disk", or a bucket.
  """
  check_choice("data.cache", cache, CACHES)
  if "://" in folder:
    raise UserError(f"data.cache_folder={folder!r} is a bucket; name a local folder, each host has its own.")
  if (cache == "disk") != bool(folder):
    remedy = "name a folder that may grow" if not folder else "leave it empty, or set data.cache='disk'"
    raise UserError(f"data.cache={cache!r} with data.cache_folder={folder!r}: {remedy}.")
  return Cache(cache, folder)


class Item(NamedTuple):
  """One object, or one sentence about it.

  Attributes:
    image: the image file, relative to the folder of the source.
    image_id: id of the image in the data set.
    outline: the input of `ReferringSource.read_mask`.
    sentences: about the object.
  """

  image: str
  image_id: int
  outline: Outline
  sentences: tuple[str, ...]


class ReferringSource(Source):
  """Random access to objects or sentences; files are read by `[]`.

  Attributes:
    notes: lines for the start of a run.
  """

  def __init__(
    self,
    folder: Path,
    items: Sequence[Item],
    read_mask: Callable[[Outline, Path, tuple[int, int]], np.ndarray],
    exif: str | None = None,
  ):
    """
    Args:
      folder: that the image names are relative to.
      items: see Item.
      read_mask: (outline, folder, (height, width)) to uint8 [H, W], 1 on the object; must be picklable.
      exif: see image_files.EXIF; None for published data.
    """
    self.folder, self.items, self.read_mask, self.exif = folder, list(items), read_mask, exif

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: int) -> Example:
    """The Example of an item: see `decode`."""
    return self._example(index, image_files.read_bytes(self.folder / self.items[index].image))

  def record(self, index: int) -> image_files.Record:
    """The record of an item, see STORED, with the unmodified image file and the mask as a PNG."""
    item = self.items[index]
    raw = image_files.read_bytes(self.folder / item.image)
    mask = cv2.imencode(".png", self._example(index, raw)["mask"])[1].tobytes()
    return {
      **{"image": raw, "mask": mask, "sentences": "\n".join(item.sentences), "image_path": item.image},
      **{"image_id": np.int32(item.image_id), "index": np.int32(index)},
    }

  def sentences(self) -> list[str]:
    """All sentences, in the order of the items."""
    return [sentence for item in self.items for sentence in item.sentences]

  def summary(self) -> str:
    """The number of objects, sentences and images, for the start of a run."""
    images = len({item.image_id for item in self.items})
    count = sum(len(item.sentences) for item in self.items)
    objects = "" if count == len(self.items) else f"{len(self.items)} objects with "
    return f"{objects}{count} sentences in {images} pictures"

  def _example(self, index: int, raw: bytes) -> Example:
    item = self.items[index]
    path = self.folder / item.image
    image = image_files.decode_image(raw, path, self.exif)
    try:
      mask = self.read_mask(item.outline, self.folder, image.shape[:2])
    except UserError as error:
      raise UserError(f"{error} It is about {item.sentences[0]!r} in {path}.") from None
    return _example(image, mask, "\n".join(item.sentences), item.image_id, index)


def decode(record: image_files.Record, *, exif: str | None = None) -> Example:
  """Decodes a record to an Example; `exif` see image_files.EXIF.

  Returns:
    "image" uint8 [H, W, 3] RGB; "mask" uint8 [H, W], 1 on the object; "sentences" str, one per line; "image_id" and
    "index" int32 [], of the image and of the item.
  """
  image = image_files.decode_image(record["image"], record["image_path"], exif)
  mask = image_decoding.decode(record["mask"], f"the mask of {record['image_path']}", cv2.IMREAD_GRAYSCALE)
  if image.shape[:2] != mask.shape:
    sizes = ["{}x{}".format(*array.shape[:2]) for array in (mask, image)]
    hint = image_files.exif_hint(image, mask, exif)
    raise UserError(f"the mask of {record['image_path']} is {sizes[0]}, the picture {sizes[1]}{hint}.")
  return _example(image, mask, record["sentences"], record["image_id"], record["index"])


def _example(image: np.ndarray, mask: np.ndarray, sentences: str, image_id: int, index: int) -> Example:
  numbers = {"image_id": np.asarray(image_id, np.int32), "index": np.asarray(index, np.int32)}
  return {"image": image, "mask": mask, "sentences": sentences, **numbers}


def by_sentence(items: Iterable[Item]) -> list[Item]:
  """One item per sentence, grouped by image, in the order of the first item of each image."""
  of_picture: dict[int, list[Item]] = {}
  for item in items:
    of_picture.setdefault(item.image_id, []).extend(item._replace(sentences=(text,)) for text in item.sentences)
  return [item for group in of_picture.values() for item in group]


@dataclasses.dataclass(frozen=True)
class Transforms:
  """The resizing of the release, which has no other augmentation, and the sampling of a sentence.

  Args:
    size: (height, width) of the network's input; the aspect ratio is ignored. Release: (512, 512).
    canvas: upper bound of the (height, width) of evaluation images, for scores at the original size.

  Raises:
    ValueError: for an invalid size.
  """

  size: tuple[int, int] = (512, 512)
  canvas: tuple[int, int] = (640, 640)

  def __post_init__(self):
    validation.check_size("crop", self.size)
    validation.check_size("canvas", self.canvas)

  def training(self, example: Example, rng: np.random.Generator) -> Example:
    """A random sentence, resized image and mask. Source: VPD refer/data/dataset_refer_clip.py."""
    lines = example["sentences"].split("\n")
    return self._resized(example) | {"sentence": lines[int(rng.integers(len(lines)))]}

  def evaluation(self, example: Example) -> Example:
    """The first sentence, resized image and mask, and the mask in its original size.

    Returns:
      the Example with "sentence" str; "full_mask" uint8 [*canvas], with the mask at the top left, or Absent if the
      image is larger than the canvas; and "full_size" int32 [2], its (height, width).
    """
    height, width = example["mask"].shape
    if height > self.canvas[0] or width > self.canvas[1]:
      too_large = f"a picture of {height}x{width} is larger than data.canvas={self.canvas}; set it to hold the largest."
      full = validation.Absent(too_large)
    else:
      full = np.zeros(self.canvas, np.uint8)
      full[:height, :width] = example["mask"]
    added = {"full_mask": full, "full_size": np.array([height, width], np.int32)}
    return self._resized(example) | {"sentence": example["sentences"].split("\n")[0], **added}

  def _resized(self, example: Example) -> Example:
    """Resizes image and mask to the network's input size, the mask by nearest neighbor."""
    mask = Image.fromarray(example["mask"]).resize((self.size[1], self.size[0]), Image.Resampling.NEAREST)
    return dict(example, image=resized_image(example["image"], self.size), mask=np.asarray(mask))


def resized_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes uint8 [H, W, 3] with PIL's bilinear filter, as in the release, with antialiasing."""
  return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
