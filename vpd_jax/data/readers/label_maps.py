"""Pictures with a label map each: which number in a file is which class, and what is wrong where a number is none.

A label map is a PNG of one channel, gray or with a palette (then the index counts, not the color), of the size of its
picture. Examples hold it as uint8: the class from 0, and IGNORE where there is none.
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
from vpd_jax.errors import UserError
from vpd_jax.files import image_decoding, reading
from vpd_jax.types import Example, Fields, Source

IGNORE = 255  # in an Example: a pixel of no class, neither learned nor scored
_WRONG = 254  # in a table: a number that may not occur
MOST_CLASSES = 254
SAMPLES = 64  # label maps that a histogram looks at
SHOWN_CLASSES = 12  # in a histogram
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# What a picture and its label map are in a record; the kinds are those of builders.KINDS.
STORED = {"image": "picture", "label": "labels8", "image_path": "text", "label_path": "text", "index": "int32"}


class ClassList(NamedTuple):
  """Names and colors (red, green, blue) by class; `rows` are the entries of the file, with all they hold."""

  names: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  rows: tuple[Fields, ...]


class Values(NamedTuple):
  """What the numbers of a label file mean.

  Attributes:
    table: uint8 [256], class or IGNORE by number.
    allowed: the numbers that may occur, in words.
    remedy: what to do where another one does.
  """

  table: np.ndarray
  allowed: str
  remedy: str


def read_class_list(name: str) -> ClassList:
  """The class list that the package ships under that file name."""
  rows = json.loads((importlib.resources.files("vpd_jax") / "data" / "assets" / name).read_text(encoding="utf-8"))[
    "classes"
  ]
  return ClassList(tuple(row["name"] for row in rows), tuple(tuple(row["rgb"]) for row in rows), tuple(rows))


def values(classes: Mapping[int, int], ignored: Iterable[int], remedy: str) -> Values:
  """The meaning of numbers: `classes` by number, `ignored` numbers of no class; all others may not occur.

  Raises:
    ValueError: a number outside 0 to 255, or one that is both.
  """
  ignored = sorted(set(ignored))
  wrong = sorted(number for number in {*classes, *ignored} if not 0 <= number <= 255)
  both = sorted(set(classes) & set(ignored))
  if wrong or both:
    what = f"{wrong} lie outside 0 to 255" if wrong else f"{both} are both of a class and ignored"
    raise UserError(f"numbers of label files: {what}; a label file has 8 bits and each number one meaning.")
  table = np.full(256, _WRONG, np.uint8)
  table[list(classes)] = list(classes.values())
  table[ignored] = IGNORE
  nothing = _ranges(ignored) if len(ignored) <= image_files.SHOWN else str(len(ignored))
  of_none = f", of which {nothing} mean no class" if ignored else ""
  return Values(table, f"{_ranges(sorted({*classes, *ignored}))}{of_none}", remedy)


def decode_labels(raw: bytes, path: str | Path, meaning: Values) -> np.ndarray:
  """A label file's bytes as uint8 [H, W]: the class, or IGNORE.

  Args:
    raw: a PNG of one channel, gray of 1 to 16 bits or with a palette, whose indices are the numbers.
    path: for messages.
    meaning: of the numbers.

  Raises:
    ValueError: damaged, no PNG, of several channels, or with numbers that may not occur; names the file, the numbers,
      how often they occur, and the allowed ones.
  """
  numbers = _decode_png(raw, path)
  if numbers.dtype == np.uint8:
    found = cv2.LUT(numbers, meaning.table)
  else:
    found = np.where(numbers < 256, meaning.table[numbers & 255], np.uint8(_WRONG))
  wrong = found == _WRONG
  if wrong.any():
    seen, counts = np.unique(numbers[wrong], return_counts=True)
    listed = [f"{number} ({count} pixels)" for number, count in zip(seen, counts, strict=True)]
    shown = ", ".join(listed[: image_files.SHOWN]) + (", ..." if len(listed) > image_files.SHOWN else "")
    raise UserError(f"label file {path} holds {shown}; allowed are {meaning.allowed}; {meaning.remedy}")
  return found


def decode(
  record: image_files.Record, folder: Path | None = None, *, kinds: Mapping[str, Values], exif: str | None = None
) -> Example:
  """The Example of a record, be it from files or from shards.

  Args:
    record: see STORED.
    folder: where the files lie, for messages.
    kinds: meaning of the numbers by the end of the label file's name; the first that fits counts, "" fits all.
    exif: see files.EXIF; None for published data.

  Returns:
    "image" uint8 [H, W, 3] RGB, "label" uint8 [H, W], "index" int32 [].

  Raises:
    ValueError: as for the two files, or they are of different size; names them.
  """
  image_path, label_path = (record[key] if folder is None else folder / record[key] for key in _PATHS)
  image = image_files.decode_image(record["image"], image_path, exif)
  label = decode_labels(record["label"], label_path, _meaning(label_path, kinds))
  if image.shape[:2] != label.shape:
    sizes = ["{}x{}".format(*array.shape[:2]) for array in (label, image)]
    raise UserError(
      f"label file {label_path} is {sizes[0]}, but its image {image_path} is {sizes[1]}; "
      f"bring both to one size{image_files.turned_hint(image, label, exif)}."
    )
  return {"image": image, "label": label, "index": np.asarray(record["index"], np.int32)}


class Pictures(Source):
  """Random access to pictures with a label map each; reading starts with `[]`."""

  def __init__(
    self, folder: Path, pairs: Sequence[tuple[str, str]], kinds: Mapping[str, Values], exif: str | None = None
  ):
    """
    Args:
      folder: the names start from.
      pairs: (image, label) files.
      kinds, exif: see `decode`.
    """
    self.folder, self.pairs, self.kinds, self.exif = folder, list(pairs), dict(kinds), exif
    self.notes: Sequence[str] = ()  # for the start of a run

  def __len__(self) -> int:
    return len(self.pairs)

  def picture(self, index: int) -> str:
    """See Source."""
    return self.pairs[index][0]

  def record(self, index: int) -> image_files.Record:
    """What is stored of a picture, see STORED: the files as they are."""
    paths = self.pairs[index]
    read = {
      key: image_files.read_bytes(self.folder / path) for key, path in zip(("image", "label"), paths, strict=True)
    }
    return {**read, **dict(zip(_PATHS, paths, strict=True)), "index": np.int32(index)}

  def __getitem__(self, index: int) -> Example:
    return decode(self.record(index), self.folder, kinds=self.kinds, exif=self.exif)

  def label(self, index: int) -> np.ndarray:
    """The label map alone, uint8 [H, W]."""
    path = self.folder / self.pairs[index][1]
    return decode_labels(image_files.read_bytes(path), path, _meaning(path, self.kinds))


def pair_files(
  root: Path, images: str, labels: str, source: str, *, ending: str = ".png", nested: bool = False
) -> list[tuple[str, str]]:
  """Pictures in folder `images` below `root` and their label files, sorted by name.

  Args:
    root: of both folders.
    images: folder of pictures, of IMAGE_SUFFIXES.
    labels: folder of label files, named as the picture but for `ending`.
    source: where the files are obtained, for messages.
    ending: of a label file, after the picture's name without suffix; those of the suffix in either case.
    nested: whether folders in `images` are looked through too.

  Raises:
    ValueError: no folder, no pictures, two pictures of one label file, or label files that are missing (all counted).
  """
  folder = root / images
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; {source}")
  found = []
  for place, inner, names in os.walk(folder):
    inner[:] = reading.visible(inner) if nested else []
    within = Path(place).relative_to(folder)
    found += [
      (within / name).as_posix() for name in reading.visible(names) if Path(name).suffix.lower() in IMAGE_SUFFIXES
    ]
  if not found:
    raise UserError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}); {source}")
  entries = functools.cache(lambda directory: image_files.entries(root / labels / directory))

  def label(name: str) -> str:
    stem = Path(name).with_suffix("").as_posix()
    directory, file = os.path.split(stem)
    spelt = (ending, f"{ending[:-4]}{ending[-4:].swapcase()}")
    return f"{labels}/{stem}{next((end for end in spelt if f'{file}{end}' in entries(directory)), ending)}"

  pairs = [(f"{images}/{name}", label(name)) for name in sorted(found)]
  twice = [label for label, count in collections.Counter(label for _, label in pairs).items() if count > 1]
  if twice:
    raise UserError(f"{len(twice)} label files belong to two pictures each: {', '.join(twice[: image_files.SHOWN])}.")
  image_files.require_files(root, (label for _, label in pairs), source)
  return pairs


def check_count(source: Source, split: str, expected: int | None, what: str) -> Source:
  """The source, if it has the published number of records; None expects nothing.

  Raises:
    ValueError: it has not.
  """
  if expected is not None and len(source) != expected:
    raise UserError(
      f"{split} of {what} has {len(source)} pictures in place of the published {expected}; complete the copy, or set "
      "data.complete=False, and scores are not comparable."
    )
  return source


def histogram(source: Source, classes: Sequence[str], *, samples: int = SAMPLES) -> list[str]:
  """Lines on which labels occur, for the start of a run; wrong class numbers show here before hours are spent.

  Args:
    source: of Examples with "label".
    classes: names by class.
    samples: label maps that are looked at, evenly over the source.

  Raises:
    ValueError: a label map cannot be read, or has a class beyond `classes`.
  """
  chosen = sorted({len(source) * step // samples for step in range(samples)})
  counts = np.zeros(256, np.int64)
  for index in chosen:
    counts += np.bincount(source.label(index).ravel(), minlength=256)
  beyond = np.flatnonzero(counts[len(classes) : IGNORE]) + len(classes)
  if beyond.size:
    raise UserError(f"labels {beyond.tolist()[: image_files.SHOWN]} occur, but there are {len(classes)} classes.")
  total, known = int(counts.sum()), counts[: len(classes)]
  labeled = int(known.sum())
  lines = [f"labels of {len(chosen)} of {len(source)} pictures: {100 * (1 - labeled / total):.1f} % have no class"]
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


def _meaning(path: str | Path, kinds: Mapping[str, Values]) -> Values:
  return next(meaning for ending, meaning in kinds.items() if str(path).endswith(ending))


def _decode_png(raw: bytes, path: str | Path) -> np.ndarray:
  """The numbers of a PNG of one channel, uint8 or wider [H, W]; OpenCV would turn a palette into colors."""
  if not raw.startswith(b"\x89PNG") or len(raw) < 33:
    kind = "a JPEG, which changes class numbers" if raw.startswith(b"\xff\xd8") else "no PNG, or damaged"
    raise UserError(f"label file {path} is {kind}; a PNG of one channel is needed.")
  depth, color = raw[24], raw[25]  # of the header chunk, which comes first
  if color not in (0, 3):
    names = {2: "three channels (RGB)", 4: "two channels (gray and alpha)", 6: "four channels (RGBA)"}
    raise UserError(
      f"label file {path} has {names.get(color, 'unknown channels')}; one is needed, gray or with a palette, whose "
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
  """Sorted numbers in words: "0 to 149, 255"."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
