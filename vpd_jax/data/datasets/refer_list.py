"""Custom referring segmentation data, listed in a JSON file.

The file contains a list with one entry per object:
  {"image": "street/1.jpg", "mask": "street/1.png", "sentences": ["the red car", "car on the left"]}
Paths are relative to data.root. A mask is a PNG of one channel, gray or with a palette, of the size of the image; the
object is where it is not 0. If a mask has several objects, "value" selects one:
  {"image": "street/2.jpg", "mask": "street/2.png", "value": 3, "sentences": ["the bus"]}
"split" of an entry is "train" or "eval". If no entry has the split "eval", the last images are held out.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpd_jax.data import validation
from vpd_jax.data.datasets.referring import ReferringDataset
from vpd_jax.data.readers import image_files, label_maps, referring
from vpd_jax.data.readers.referring import Item
from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError, check_choice, first_items
from vpd_jax.files import reading
from vpd_jax.types import Fields, Source

EXAMPLE = '{"image": "1.jpg", "mask": "1.png", "sentences": ["the red car"]}'
KNOWN = frozenset({"image", "mask", "sentences", "value", "split"})
ALL_VALUES = label_maps.make_mapping(
  {n: n for n in range(label_maps.MAX_CLASSES)}, (255,), "number objects from 1 to 253."
)
SPLITS = ("train", "eval")


@dataclasses.dataclass(eq=False, kw_only=True)
class ReferList(ReferringDataset):
  """Custom referring expressions.

  Args:
    root: the parent folder, or with format="tfds" the one that prepare_data.py wrote.
    file: the JSON file, relative to `root` or an existing path.
    holdout: fraction of the images, rounded, at least one, for evaluation if no entry has the split "eval". The last
      ones of the file are used, because neighbors are often frames of one video.
    exif: "stored" or "turned", see image_files.EXIF.

  Attributes:
    provides: see ReferringDataset; "image_id" numbers the images in the order of the file.
  """

  file: str = "sentences.json"
  holdout: float = 0.1
  exif: str = "stored"

  def __post_init__(self):
    """Checks the options; `source` checks the files.

    Raises:
      ValueError: for an invalid option.
    """
    if not 0 < self.holdout < 1:
      raise UserError(f"data.holdout={self.holdout} must lie between 0 and 1, both excluded.")
    super().__post_init__()
    self.made_with = {"file": self.file, "holdout": self.holdout}
    check_choice("data.exif", self.exif, image_files.EXIF)
    if self.format == "files":
      image_files.require_folder(self.root, "that holds the pictures, the masks and the JSON file data.file.")

  @reader.read_once
  def source(self, split: str) -> Source:
    """The objects of "train" in the order of the file, or the sentences of "eval", grouped by image.

    Raises:
      ValueError: if the JSON file is missing or damaged, entries are wrong (all are counted), images or masks are
        missing, or a split is empty; with format="tfds", for missing or incomplete shards.
    """
    check_choice("split", split, sorted(SPLITS))
    if self.format == "tfds":
      decode = functools.partial(referring.decode, exif=self.exif)
      return reader.Shards(self.root, "refer_list", split, decode=decode, made_with=self.made_with)
    root = Path(self.root).expanduser()
    path = image_files.find_list(root, self.file, (), "name it in data.file.")
    entries = read_entries(path)
    image_ids: dict[str, int] = {}
    for entry in entries:
      image_ids.setdefault(entry["image"], len(image_ids))
    if any(entry.get("split") == "eval" for entry in entries):
      chosen = [entry for entry in entries if entry.get("split", "train") == split]
    else:
      num_train = validation.train_count(len(image_ids), self.holdout)
      chosen = [entry for entry in entries if (image_ids[entry["image"]] < num_train) == (split == "train")]
    if not chosen:
      raise UserError(f'{path} has nothing for {split!r}; add pictures, or entries of that "split".')
    image_files.require_files(
      root, (name for e in chosen for name in (e["image"], e["mask"])), f"they are named in {path}."
    )
    items = [
      Item(entry["image"], image_ids[entry["image"]], (entry["mask"], entry.get("value")), tuple(entry["sentences"]))
      for entry in chosen
    ]
    items = items if split == "train" else referring.by_sentence(items)
    source = referring.ReferringSource(root, items, functools.partial(_read_mask, exif=self.exif), self.exif)
    source.notes = image_files.exif_notes((root / item.image for item in items), self.exif)
    return source


def read_entries(path: Path) -> list[Fields]:
  """Reads the entries of a JSON file, with line breaks removed from sentences.

  Raises:
    ValueError: if it cannot be read or entries are wrong; states their number and the first problems.
  """
  content = reading.read_json(path)
  if not isinstance(content, list) or not content:
    raise UserError(f"{path} must hold a list of entries like {EXAMPLE}.")
  wrong = [f"number {place} {what}" for place, entry in enumerate(content, 1) if (what := _problem(entry))]
  if wrong:
    raise UserError(
      f"{path}: {len(wrong)} of {len(content)} entries are wrong: {first_items(wrong, '; ')}. One is like {EXAMPLE}."
    )
  return [entry | {"sentences": [" ".join(text.split()) for text in entry["sentences"]]} for entry in content]


def _problem(entry: object) -> str:
  """Describes what is wrong with an entry; empty if it is valid."""
  if not isinstance(entry, dict):
    return "is not an object with names and values"
  if unknown := sorted(entry.keys() - KNOWN):
    return f"has {unknown}, known are {sorted(KNOWN)}"
  for key in ("image", "mask"):
    if not isinstance(entry.get(key), str) or not entry[key]:
      return f"names no {key}"
  texts = entry.get("sentences")
  if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
    return "has no list of sentences"
  if not all(text.strip() for text in texts):
    return "has an empty sentence"
  if "value" in entry and entry["value"] not in (*range(1, label_maps.MAX_CLASSES), 255):
    return f"has the value {entry['value']!r}, not a number from 1 to {label_maps.MAX_CLASSES - 1}, or 255"
  return "" if entry.get("split", "train") in SPLITS else f"has the split {entry['split']!r}, not one of {SPLITS}"


def _read_mask(outline: tuple[str, int | None], folder: Path, size: tuple[int, int], *, exif: str) -> np.ndarray:
  """The mask of (file, value of the object)."""
  name, object_value = outline
  path = folder / name
  mask = label_maps.decode_labels(image_files.read_bytes(path), path, ALL_VALUES)
  if mask.shape != size:
    hint = image_files.exif_hint(np.empty(size), mask, exif)
    raise UserError(f"mask {path} is {mask.shape[0]}x{mask.shape[1]}, its picture {size[0]}x{size[1]}{hint}.")
  values: Sequence[int] = [int(n) for n in np.unique(mask) if n]
  if object_value is None and len(values) > 1:
    raise UserError(f'mask {path} holds the numbers {first_items(values)}; say which one in the entry\'s "value".')
  if not values or object_value not in (None, *values):
    what = f"has no pixel of the number {object_value}" if values else "is empty"
    raise UserError(f"mask {path} {what}.")
  return (mask == (values[0] if object_value is None else object_value)).astype(np.uint8)
