"""Images with label maps: mapping of the values in label files to classes, and errors for unknown values.

A label map is a PNG of one channel, gray or with a palette (the index is the value, not the color), of the size of its
image. Examples contain it as uint8: the class index, or IGNORE for unlabeled pixels.
"""

import collections
import functools
import importlib.resources
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from vpd_jax.data.readers import image_files
from vpd_jax.errors import SHOWN, UserError, first_items
from vpd_jax.files import image_decoding, reading
from vpd_jax.types import Example, Fields, Source

IGNORE = 255  # label of an unlabeled pixel in an Example, neither trained on nor scored
_INVALID = 254  # table entry of an invalid value
MAX_CLASSES = 254
SAMPLES = 64  # label maps per histogram
SHOWN_CLASSES = 12  # classes per histogram
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Features of a record, see shards/writer.py:FEATURES.
STORED = {"image": "picture", "label": "labels8", "image_path": "text", "label_path": "text", "index": "int32"}


class ClassList(NamedTuple):
  """Names and colors (red, green, blue) by class; `rows` are the complete entries of the file."""

  names: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  rows: tuple[Fields, ...]


class LabelMapping(NamedTuple):
  """The mapping from values of a label file to classes.

  Attributes:
    table: uint8 [256], class or IGNORE by value.
    allowed: description of the valid values.
    remedy: what to do about other values, for messages.
  """

  table: np.ndarray
  allowed: str
  remedy: str


def read_class_list(name: str) -> ClassList:
  """Reads a class list of the package by file name."""
  rows = json.loads((importlib.resources.files("vpd_jax") / "data" / "assets" / name).read_text(encoding="utf-8"))[
    "classes"
  ]
  return ClassList(tuple(row["name"] for row in rows), tuple(tuple(row["rgb"]) for row in rows), tuple(rows))


def make_mapping(classes: Mapping[int, int], ignored: Iterable[int], remedy: str) -> LabelMapping:
  """Makes a mapping from {value: class} and the `ignored` values, which are unlabeled; all others are invalid.

  Raises:
    ValueError: for a value outside 0 to 255, or one that is in both.
  """
  ignored = sorted(set(ignored))
  out_of_range = sorted(number for number in {*classes, *ignored} if not 0 <= number <= 255)
  both = sorted(set(classes) & set(ignored))
  if out_of_range or both:
    what = f"{out_of_range} lie outside 0 to 255" if out_of_range else f"{both} are both of a class and ignored"
    raise UserError(f"numbers of label files: {what}; a label file has 8 bits and each number one meaning.")
  table = np.full(256, _INVALID, np.uint8)
  table[list(classes)] = list(classes.values())
  table[ignored] = IGNORE
  unlabeled = _ranges(ignored) if len(ignored) <= SHOWN else str(len(ignored))
  note = f", of which {unlabeled} mean no class" if ignored else ""
  return LabelMapping(table, f"{_ranges(sorted({*classes, *ignored}))}{note}", remedy)


def decode_labels(raw: bytes, path: str | Path, mapping: LabelMapping) -> np.ndarray:
  """Decodes a label file as uint8 [H, W]: the class, or IGNORE.

  Args:
    raw: a PNG of one channel, gray of 1 to 16 bits or with a palette, whose indices are the values.
    path: for messages.
    mapping: from values to classes.

  Raises:
    ValueError: for a damaged file, another format, several channels, or invalid values; names the file, the values and
      their counts, and the valid ones.
  """
  numbers = _decode_png(raw, path)
  if numbers.dtype == np.uint8:
    labels = cv2.LUT(numbers, mapping.table)
  else:
    labels = np.where(numbers < 256, mapping.table[numbers & 255], np.uint8(_INVALID))
  invalid = labels == _INVALID
  if invalid.any():
    unknown, counts = np.unique(numbers[invalid], return_counts=True)
    listed = [f"{number} ({count} pixels)" for number, count in zip(unknown, counts, strict=True)]
    shown = first_items(listed)
    raise UserError(f"label file {path} holds {shown}; allowed are {mapping.allowed}; {mapping.remedy}")
  return labels


def decode(
  record: image_files.Record,
  folder: Path | None = None,
  *,
  label_mappings: Mapping[str, LabelMapping],
  exif: str | None = None,
) -> Example:
  """Decodes a record, from files or shards, to an Example.

  Args:
    record: see STORED.
    folder: of the files, for messages.
    label_mappings: mappings by suffix of the label file; the first match counts, "" matches all.
    exif: see image_files.EXIF; None for published data.

  Returns:
    "image" uint8 [H, W, 3] RGB, "label" uint8 [H, W], "index" int32 [].

  Raises:
    ValueError: as for the two files, or if their sizes differ; names them.
  """
  image_path, label_path = (record[key] if folder is None else folder / record[key] for key in _PATHS)
  image = image_files.decode_image(record["image"], image_path, exif)
  label = decode_labels(record["label"], label_path, _mapping_of(label_path, label_mappings))
  image_files.check_same_size(image, label, image_path, f"label file {label_path}", exif)
  return {"image": image, "label": label, "index": np.asarray(record["index"], np.int32)}


class LabeledImages(Source):
  """Random access to images with label maps; files are read by `[]`."""

  def __init__(
    self,
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    label_mappings: Mapping[str, LabelMapping],
    exif: str | None = None,
  ):
    """
    Args:
      folder: that the names are relative to.
      pairs: (image, label) files.
      label_mappings, exif: see `decode`.
    """
    self.folder, self.pairs, self.label_mappings, self.exif = folder, list(pairs), dict(label_mappings), exif
    self.notes: Sequence[str] = ()  # for the start of a run

  def __len__(self) -> int:
    return len(self.pairs)

  def picture(self, index: int) -> str:
    """See Source."""
    return self.pairs[index][0]

  def record(self, index: int) -> image_files.Record:
    """The record of an image, see STORED, with the unmodified files."""
    paths = self.pairs[index]
    read = {
      key: image_files.read_bytes(self.folder / path) for key, path in zip(("image", "label"), paths, strict=True)
    }
    return {**read, **dict(zip(_PATHS, paths, strict=True)), "index": np.int32(index)}

  def __getitem__(self, index: int) -> Example:
    return decode(self.record(index), self.folder, label_mappings=self.label_mappings, exif=self.exif)

  def label(self, index: int) -> np.ndarray:
    """The label map alone, uint8 [H, W]."""
    path = self.folder / self.pairs[index][1]
    return decode_labels(image_files.read_bytes(path), path, _mapping_of(path, self.label_mappings))


def pair_files(
  root: Path, images: str, labels: str, source: str, *, ending: str = ".png", nested: bool = False
) -> list[tuple[str, str]]:
  """Images in folder `images` below `root` and their label files, sorted by name.

  Args:
    root: parent of both folders.
    images: folder of images with IMAGE_SUFFIXES.
    labels: folder of label files, named as the image except for `ending`.
    source: where to obtain the files, for messages.
    ending: suffix of a label file after the image name without its suffix; the file type is case-insensitive.
    nested: whether to search subfolders of `images`, also linked ones.

  Raises:
    ValueError: for a missing folder, no images, two images with the same label file, or missing label files (counted).
  """
  folder = root / images
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; {source}")
  image_names = []
  for parent, subfolders, file_names in os.walk(folder, followlinks=True):
    subfolders[:] = reading.visible(subfolders) if nested else []
    relative = Path(parent).relative_to(folder)
    image_names += [
      (relative / name).as_posix()
      for name in reading.visible(file_names)
      if Path(name).suffix.lower() in IMAGE_SUFFIXES
    ]
  if not image_names:
    raise UserError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}); {source}")
  entries = functools.cache(lambda subfolder: image_files.entries(root / labels / subfolder))

  def label(name: str) -> str:
    stem = Path(name).with_suffix("").as_posix()
    subfolder, file = os.path.split(stem)
    endings = (ending, f"{ending[:-4]}{ending[-4:].swapcase()}")
    return f"{labels}/{stem}{next((end for end in endings if f'{file}{end}' in entries(subfolder)), ending)}"

  pairs = [(f"{images}/{name}", label(name)) for name in sorted(image_names)]
  duplicates = [label for label, count in collections.Counter(label for _, label in pairs).items() if count > 1]
  if duplicates:
    raise UserError(f"{len(duplicates)} label files belong to two images each: {first_items(duplicates)}.")
  image_files.require_files(root, (label for _, label in pairs), source)
  return pairs


def check_count(source: Source, split: str, expected: int | None, what: str) -> Source:
  """Returns the source if it has the expected number of records; None accepts any number.

  Raises:
    ValueError: if it has another number of records.
  """
  if expected is not None and len(source) != expected:
    raise UserError(
      f"{split} of {what} has {len(source)} records in place of the published {expected}; complete the copy, or set "
      "data.complete=False, and scores are not comparable."
    )
  return source


def histogram(
  source: Source, classes: Sequence[str], *, samples: int = SAMPLES, skip_unreadable: bool = False
) -> list[str]:
  """Lines with the label frequencies, for the start of a run, to reveal wrong class indices before training.

  Args:
    source: of Examples with "label".
    classes: class names.
    samples: number of label maps to count, evenly spaced over the source.
    skip_unreadable: leave out label maps that cannot be read, and say how many.

  Raises:
    ValueError: if a label map cannot be read (with `skip_unreadable`, if none can), or has a class beyond `classes`.
  """
  chosen = sorted({len(source) * step // samples for step in range(samples)})
  counts, unreadable = np.zeros(256, np.int64), []
  for index in chosen:
    try:
      counts += np.bincount(source.label(index).ravel(), minlength=256)
    except UserError as error:
      unreadable.append(error)
      if not skip_unreadable or len(unreadable) == len(chosen):
        raise
  beyond = np.flatnonzero(counts[len(classes) : IGNORE]) + len(classes)
  if beyond.size:
    raise UserError(f"label values {first_items(beyond.tolist())} occur, but there are {len(classes)} classes.")
  total, known = int(counts.sum()), counts[: len(classes)]
  labeled = int(known.sum())
  read = len(chosen) - len(unreadable)
  lines = [f"labels of {read} of {len(source)} images: {100 * (1 - labeled / total):.1f} % have no class"]
  if unreadable:
    lines.append(
      f"  WARNING: {len(unreadable)} of {len(chosen)} label files cannot be read, the first: {unreadable[0]}"
    )
  order = [int(index) for index in np.argsort(-known, kind="stable") if known[index]]
  shares = [f"{classes[index]} {100 * known[index] / labeled:.1f} %" for index in order]
  more = f", and {len(shares) - SHOWN_CLASSES} more" if len(shares) > SHOWN_CLASSES else ""
  if shares:
    lines.append(f"  of the others: {', '.join(shares[:SHOWN_CLASSES])}{more}")
  unseen = [classes[index] for index in range(len(classes)) if not known[index]]
  if unseen:
    more = ", ..." if len(unseen) > SHOWN_CLASSES else ""
    lines.append(f"  {len(unseen)} of {len(classes)} classes were not seen: {', '.join(unseen[:SHOWN_CLASSES])}{more}")
  if len(order) < 2 and len(classes) > 1:
    lines.append("  WARNING: at most one class occurs; look at what the numbers of the label files mean.")
  return lines


_PATHS = ("image_path", "label_path")


def _mapping_of(path: str | Path, label_mappings: Mapping[str, LabelMapping]) -> LabelMapping:
  return next(mapping for ending, mapping in label_mappings.items() if str(path).endswith(ending))


def _decode_png(raw: bytes, path: str | Path) -> np.ndarray:
  """The values of a PNG of one channel, uint8 or wider [H, W]; OpenCV would convert palettes to colors."""
  if not raw.startswith(b"\x89PNG") or len(raw) < 33:
    hint = "a JPEG, which changes class numbers" if raw.startswith(b"\xff\xd8") else "no PNG, or damaged"
    raise UserError(f"label file {path} is {hint}; a PNG of one channel is needed.")
  depth, color = raw[24], raw[25]  # in the header chunk, which comes first
  if color not in (0, 3):
    channels = {2: "three channels (RGB)", 4: "two channels (gray and alpha)", 6: "four channels (RGBA)"}
    raise UserError(
      f"label file {path} has {channels.get(color, 'unknown channels')}; one is needed, gray or with a palette, whose "
      "numbers are classes: replace each color by the number of its class."
    )
  image_decoding.check_whole(raw, path)
  if color == 0 and depth >= 8:
    numbers = image_decoding.decode(raw, path, cv2.IMREAD_UNCHANGED)
  else:
    with image_decoding.faults(path), Image.open(io.BytesIO(raw)) as picture:
      numbers = np.asarray(picture)
    if color == 0 and depth > 1:
      numbers = numbers // (255 // (2**depth - 1))  # PIL stretches gray of 2 and 4 bits to 0..255
  return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def _ranges(numbers: Sequence[int]) -> str:
  """Describes sorted numbers: "0 to 149, 255"."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
