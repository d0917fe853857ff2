"""Image captions from a file, which add a sentence to the Examples of any data set.

The file is a JSON object of captions by image name, `"name": "caption"`, or in the format of TADP's files,
`"name": {"captions": ["caption"]}`. A name is the path of an image with as many folders as needed to be unique in its
split: as in NYU's list, with or without the leading slash, or the file name alone, as for ADE20K.

Source: TADP captioning/blip.py, depth/dataset/nyudepthv2.py.
"""

from collections.abc import Callable

import numpy as np

from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError
from vpd_jax.files import reading
from vpd_jax.types import Dataset, DatasetInfo, Example, Fields, Options, Source


class Captioned(Dataset):
  """A data set whose Examples also have "sentence", str, the caption of the full image, regardless of crops."""

  def __init__(self, dataset: Dataset, path: str):
    """Reads the file.

    Args:
      dataset: a data set without sentences.
      path: of the captions.

    Raises:
      ValueError: for a missing file or another format, or if the data set already has sentences.
    """
    if "sentence" in dataset.provides:
      raise UserError(
        "data.captions has no effect on a data set with sentences of its own; leave it out, or for the rooms set "
        "data.captioned=False."
      )
    self._dataset, self._path, self._captions = dataset, path, read(path)
    self.provides = dataset.provides | {"sentence"}
    self.classes, self.published, self.encoder_cache = dataset.classes, dataset.published, dataset.encoder_cache

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """Empty: use the info of the wrapped data set."""
    del options
    return DatasetInfo()

  @reader.read_once
  def source(self, split: str) -> Source:
    """The split, with captions for all images.

    Raises:
      ValueError: as the data set, and for images without a caption or with an ambiguous one.
    """
    source = self._dataset.source(split)
    names = [source.picture(index) for index in range(len(source))]
    keys = {name: _key(name, self._captions) for name in names}
    missing = [name for name, key in keys.items() if not key]
    if missing:
      raise UserError(
        f"data.captions={self._path!r} has no caption of {len(missing)} of {len(keys)} pictures of the {split} split, "
        f"the first is {missing[0]!r}; add them."
      )
    owners = {key: name for name, key in keys.items()}
    ambiguous = [name for name, key in keys.items() if owners[key] != name]
    if ambiguous:
      raise UserError(
        f"data.captions={self._path!r} has one caption, {keys[ambiguous[0]]!r}, for {ambiguous[0]!r} and "
        f"{owners[keys[ambiguous[0]]]!r} of the {split} split; name them with their folders."
      )
    return CaptionedSource(source, [self._captions[keys[name]] for name in names])

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """As the wrapped data set."""
    return keep_sentence(lambda rest: self._dataset.train_transform(rest, rng, position), example)

  def eval_transform(self, example: Example) -> Example:
    """As the wrapped data set."""
    return keep_sentence(self._dataset.eval_transform, example)

  def describe(self, *, skip_unreadable: bool = False) -> list[str]:
    """As the wrapped data set."""
    return self._dataset.describe(skip_unreadable=skip_unreadable)

  def truth(self, split: str) -> Fields:
    """As the wrapped data set."""
    return self._dataset.truth(split)


class CaptionedSource(Source):
  """A source whose Examples have the caption at the same index as "sentence"."""

  def __init__(self, source: Source, captions: list[str]):
    self._source, self._captions, self.notes = source, captions, source.notes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    return {**self._source[index], "sentence": self._captions[index]}

  def label(self, index: int) -> np.ndarray:
    """As the wrapped source."""
    return self._source.label(index)

  def sentences(self) -> list[str]:
    """The captions."""
    return self._captions

  def summary(self) -> str:
    """As the wrapped source."""
    return self._source.summary()


def keep_sentence(transform: Callable[[Example], Example], example: Example) -> Example:
  """Transforms everything in an Example but its "sentence", if it has one."""
  sentence = {key: value for key, value in example.items() if key == "sentence"}
  return transform({key: value for key, value in example.items() if key not in sentence}) | sentence


def read(path: str) -> dict[str, str]:
  """Reads the captions of a file by image name, without leading slashes.

  Raises:
    ValueError: for a missing file, or entries that are not one caption; names the file and the first such entry.
  """
  content = reading.read_json(path, called=f"data.captions={path!r}")
  if not isinstance(content, dict) or not content:
    raise UserError(f'data.captions={path!r} must hold an object like {{"kitchen_0004/rgb_1.jpg": "a kitchen"}}.')
  texts = {name: _text(entry) for name, entry in content.items()}
  wrong = [name for name, text in texts.items() if not text.strip()]
  if wrong:
    raise UserError(
      f"data.captions={path!r}: {len(wrong)} of {len(texts)} entries are not one caption, the first is {wrong[0]!r}; "
      'write "name": "caption", or "name": {"captions": ["caption"]}.'
    )
  return {name.lstrip("/"): text for name, text in texts.items()}


def _text(entry: object) -> str:
  """The caption of an entry; empty if it is not exactly one."""
  match entry:
    case str(text) | {"captions": [str(text)]}:
      return text
  return ""


def _key(name: str, captions: dict[str, str]) -> str:
  """The longest suffix of an image path that has a caption; empty if there is none."""
  parts = name.split("/")
  return next((end for i in range(len(parts)) if (end := "/".join(parts[i:])) in captions), "")
