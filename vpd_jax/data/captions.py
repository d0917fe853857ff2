"""Captions of pictures, from a file: a sentence with every Example of any data set.

The file is a JSON object of a caption by the name of a picture, `"name": "caption"`, or as TADP's files hold it,
`"name": {"captions": ["caption"]}`. A name is the picture's file with as many of its folders as it takes to tell it
from the others of a split: as NYU's list spells it, with or without the slash at its start, or the file alone, as on
ADE20K.

Source: TADP captioning/blip.py, depth/dataset/nyudepthv2.py.
"""

import numpy as np

from vpd_jax.data.shards import reader
from vpd_jax.errors import UserError
from vpd_jax.files import reading
from vpd_jax.types import Dataset, DatasetInfo, Example, Fields, Options, Source


class Captioned(Dataset):
  """A data set whose Examples also have "sentence", str, the caption of their picture, whatever is cut of it."""

  def __init__(self, dataset: Dataset, path: str):
    """Reads the file.

    Args:
      dataset: without sentences of its own.
      path: of the captions.

    Raises:
      ValueError: no such file, or another form; the data set has sentences.
    """
    if "sentence" in dataset.provides:
      raise UserError("data.captions has no effect on a data set with sentences of its own; leave it out.")
    self._dataset, self._path, self._captions = dataset, path, read(path)
    self.provides = dataset.provides | {"sentence"}
    self.classes, self.published, self.encoder_cache = dataset.classes, dataset.published, dataset.encoder_cache

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """Nothing: the class of the data set is asked."""
    del options
    return DatasetInfo()

  @reader.read_once
  def source(self, split: str) -> Source:
    """The split, with captions of all its pictures.

    Raises:
      ValueError: as the data set; pictures without a caption (counted, the first named), or that share one's name.
    """
    source = self._dataset.source(split)
    names = [source.picture(index) for index in range(len(source))]
    found = {name: _key(name, self._captions) for name in names}
    missing = [name for name, key in found.items() if not key]
    if missing:
      raise UserError(
        f"data.captions={self._path!r} has no caption of {len(missing)} of {len(found)} pictures of the {split} split, "
        f"the first is {missing[0]!r}; add them."
      )
    owners = {key: name for name, key in found.items()}
    shared = [name for name, key in found.items() if owners[key] != name]
    if shared:
      raise UserError(
        f"data.captions={self._path!r} has one caption, {found[shared[0]]!r}, for {shared[0]!r} and "
        f"{owners[found[shared[0]]]!r} of the {split} split; name them with their folders."
      )
    return CaptionedSource(source, [self._captions[found[name]] for name in names])

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The data set's."""
    return _with_caption(self._dataset.train_transform(_without_caption(example), rng, position), example)

  def eval_transform(self, example: Example) -> Example:
    """The data set's."""
    return _with_caption(self._dataset.eval_transform(_without_caption(example)), example)

  def describe(self) -> list[str]:
    """That of the data set."""
    return self._dataset.describe()

  def truth(self, split: str) -> Fields:
    """That of the data set."""
    return self._dataset.truth(split)


class CaptionedSource(Source):
  """A source whose Examples have the caption of the same place as "sentence"."""

  def __init__(self, source: Source, captions: list[str]):
    self._source, self._captions, self.notes = source, captions, source.notes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    return {**self._source[index], "sentence": self._captions[index]}

  def label(self, index: int) -> np.ndarray:
    """That of the source."""
    return self._source.label(index)

  def sentences(self) -> list[str]:
    """The captions."""
    return self._captions

  def summary(self) -> str:
    """That of the source."""
    return self._source.summary()


def read(path: str) -> dict[str, str]:
  """The captions of a file, by name without slash at its start.

  Raises:
    ValueError: no such file, or entries that are not one caption each; names the file and the first of them.
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
  """The one caption of an entry, or nothing."""
  match entry:
    case str(text) | {"captions": [str(text)]}:
      return text
  return ""


def _key(name: str, captions: dict[str, str]) -> str:
  """The longest end of a picture's name that has a caption, or nothing."""
  parts = name.split("/")
  return next((end for i in range(len(parts)) if (end := "/".join(parts[i:])) in captions), "")


def _without_caption(example: Example) -> Example:
  return {key: value for key, value in example.items() if key != "sentence"}


def _with_caption(transformed: Example, example: Example) -> Example:
  return {**transformed, "sentence": example["sentence"]}
