"""Sentences to the token ids of CLIP's text encoder, on the host, before training."""

import dataclasses
import functools
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from vpd_jax.convert import fetch
from vpd_jax.errors import UserError

FILES = ("vocab.json", "merges.txt")
CHARACTERS, WORDS = "characters", "words"
Tokenizer = Any  # transformers.CLIPTokenizer, slow to import


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """Sentences to token ids; looks for a tokenizer only when it is called: evaluation needs none.

  Attributes:
    sources: where one may lie, the first that holds one counts; or a word of STAND_INS, for smoke tests.
    vocabulary, length: rows of the text encoder's two tables.
    padding: id behind the end of a sentence; -1 for that of the tokenizer. See TextSizes.
  """

  sources: tuple[str, ...]
  vocabulary: int
  length: int
  padding: int = -1

  def __call__(self, sentences: Sequence[str]) -> np.ndarray:
    """int32 [len(sentences), length].

    Raises:
      ValueError: no tokenizer there, or not that of the text encoder; one line.
    """
    return _tokens(self, tuple(sentences))


@functools.lru_cache(maxsize=8)
def _tokens(how: Tokenize, sentences: tuple[str, ...]) -> np.ndarray:
  stand_in = next((STAND_INS[source] for source in how.sources if source in STAND_INS), None)
  if stand_in:
    tokens = stand_in(sentences, vocabulary=how.vocabulary, length=how.length)
  else:
    given = tuple(source for source in how.sources if source)
    tokens = tokenize(sentences, _first(given), vocabulary=how.vocabulary, length=how.length)
  behind = np.arange(how.length) > tokens.argmax(axis=1)[:, None]  # the end has the largest id
  return tokens if how.padding < 0 else np.where(behind, np.int32(how.padding), tokens)


@functools.lru_cache(maxsize=2)
def _first(given: tuple[str, ...]) -> Tokenizer:
  """The tokenizer of the first source that holds one; kept, for sentences may come one by one."""
  holding = next((source for source in given if holds(source)), None)
  if holding is None:
    raise UserError(
      f"there is no tokenizer in {list(given)}; set config.method.tokenizer to a folder with {' and '.join(FILES)}, or "
      f"to {CHARACTERS!r} or {WORDS!r} for smoke tests with a random text encoder."
    )
  return load(holding)


def holds(source: str | epath.PathLike) -> bool:
  """Whether a source of weights brings a tokenizer."""
  folder = fetch.local(source, (fetch.TOKENIZER,))
  return any(not _missing(place) for place in (folder / fetch.TOKENIZER, folder))


def _missing(folder: pathlib.Path) -> list[str]:
  return [name for name in FILES if not (folder / name).is_file()]


def load(source: str | epath.PathLike) -> Tokenizer:
  """CLIP's tokenizer (transformers) from the `tokenizer` below a diffusers folder, or from a folder itself.

  Args:
    source: local, a hub id, or in a bucket.

  Raises:
    ValueError: files missing or damaged; one line.
  """
  folder = fetch.local(source, (fetch.TOKENIZER,))
  folder = folder / fetch.TOKENIZER if (folder / fetch.TOKENIZER).is_dir() else folder
  if missing := _missing(folder):
    raise UserError(
      f"{folder} holds no CLIP tokenizer: {' and '.join(missing)} missing; give a folder that holds them."
    )
  return _read(folder)


def _read(folder: pathlib.Path) -> Tokenizer:
  # Without it the import says that PyTorch is missing, which no tokenizer needs.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import CLIPTokenizer  # Slow to import, and only needed here.

  try:
    # Whatever its files say: CLIP reads texts from the left, padding behind their end.
    return CLIPTokenizer.from_pretrained(
      str(folder), local_files_only=True, padding_side="right", truncation_side="right"
    )
  except Exception as error:  # A damaged vocabulary can fail anywhere.
    reason = " ".join(str(error).split())
    raise UserError(f"the tokenizer in {folder} cannot be read ({reason}); fetch its files again.") from error


def tokenize(sentences: Sequence[str], tokenizer: Tokenizer, *, vocabulary: int, length: int) -> np.ndarray:
  """Token ids, checked against what the encoder can look up and where it finds the end.

  Args:
    sentences: texts; longer ones are cut.
    tokenizer: transformers' CLIPTokenizer.
    vocabulary: rows of the encoder's table of tokens.
    length: tokens a sentence is padded or cut to.

  Returns:
    int32 [sentences, length].

  Raises:
    ValueError: a tokenizer of another model than the encoder's; a text that spells one of its marks.
  """
  marks = [mark for mark in (tokenizer.bos_token, tokenizer.eos_token) if any(mark in text for text in sentences)]
  if marks:
    raise UserError(f"a sentence holds {marks[0]!r}, which the tokenizer takes for a mark of its own; leave it out.")
  tokens = tokenizer(list(sentences), padding="max_length", truncation=True, max_length=length)["input_ids"]
  tokens = np.asarray(tokens, np.int32)
  if tokens.max() >= vocabulary:
    raise UserError(
      f"the tokenizer gives id {tokens.max()}, the text encoder knows {vocabulary}; take both of one model."
    )
  if (tokens.max(axis=1) != tokenizer.eos_token_id).any():
    raise UserError(
      f"the tokenizer's end of text, id {tokenizer.eos_token_id}, is not the largest id of every text, by which CLIP "
      "finds it; take the tokenizer of the text encoder's model."
    )
  return tokens


def characters(sentences: Sequence[str], *, vocabulary: int, length: int) -> np.ndarray:
  """Stand-in for a tokenizer: an id per character, begin and end the two largest ids; int32 [sentences, length]."""
  return _framed([[ord(letter) for letter in sentence] for sentence in sentences], vocabulary, length)


def words(sentences: Sequence[str], *, vocabulary: int, length: int) -> np.ndarray:
  """As `characters`, with an id per word that follows from its letters; two words may share one."""
  numbers = [[zlib.crc32(word.encode()) for word in sentence.lower().split()] for sentence in sentences]
  return _framed(numbers, vocabulary, length)


def _framed(numbers: Sequence[Sequence[int]], vocabulary: int, length: int) -> np.ndarray:
  """Numbers as ids between those of begin and end, cut or filled to `length`."""
  result = np.full((len(numbers), length), vocabulary - 1, np.int32)
  for row, values in zip(result, numbers, strict=True):
    ids = [value % (vocabulary - 2) for value in values[: length - 2]]
    row[: len(ids) + 1] = [vocabulary - 2, *ids]
  return result


STAND_INS = {CHARACTERS: characters, WORDS: words}
