"""Tokenization for CLIP's text encoder, on the host."""

import dataclasses
import functools
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from vpd_jax.config.loader import CHARACTERS, WORDS
from vpd_jax.convert import fetch
from vpd_jax.errors import UserError, one_line

FILES = ("vocab.json", "merges.txt")
WORD = re.compile(r"[\w'-]+")
Tokenizer = Any  # transformers.CLIPTokenizer, slow to import


@dataclasses.dataclass(frozen=True)
class Tokenize:
  """Maps sentences to token ids. The tokenizer is loaded on the first call, because evaluation may not need it.

  Attributes:
    sources: where to look for a tokenizer, in order; or a key of PLACEHOLDERS, for smoke tests.
    vocabulary, length: rows of the text encoder's token and position embeddings.
    padding: id after the end of a sentence; -1 for that of the tokenizer. See TextSizes.
  """

  sources: tuple[str, ...]
  vocabulary: int
  length: int
  padding: int = -1

  def __call__(self, sentences: Sequence[str]) -> np.ndarray:
    """int32 [len(sentences), length].

    Raises:
      ValueError: if there is no tokenizer, or it does not match the text encoder; one line.
    """
    return _tokens(self, tuple(sentences))


@functools.lru_cache(maxsize=8)
def _tokens(options: Tokenize, sentences: tuple[str, ...]) -> np.ndarray:
  placeholder = next((PLACEHOLDERS[source] for source in options.sources if source in PLACEHOLDERS), None)
  if placeholder:
    tokens = placeholder(sentences, vocabulary=options.vocabulary, length=options.length)
  else:
    sources = tuple(source for source in options.sources if source)
    tokens = tokenize(sentences, _first(sources), vocabulary=options.vocabulary, length=options.length)
  is_padding = np.arange(options.length) > tokens.argmax(axis=1)[:, None]  # the end token has the largest id
  return tokens if options.padding < 0 else np.where(is_padding, np.int32(options.padding), tokens)


@functools.lru_cache(maxsize=2)
def _first(paths: tuple[str, ...]) -> Tokenizer:
  """The tokenizer of the first source that has one; cached, because sentences may come one at a time."""
  first = next((source for source in paths if holds(source)), None)
  if first is None:
    raise UserError(
      f"there is no tokenizer in {list(paths)}; set config.method.tokenizer to a folder with {' and '.join(FILES)}, or "
      f"to {CHARACTERS!r} or {WORDS!r} for smoke tests with a random text encoder."
    )
  return load(first)


def holds(source: str | epath.PathLike) -> bool:
  """Whether a source of weights contains a tokenizer."""
  folder = fetch.local(source, (fetch.TOKENIZER,))
  return any(not _missing(candidate) for candidate in (folder / fetch.TOKENIZER, folder))


def _missing(folder: pathlib.Path) -> list[str]:
  return [name for name in FILES if not (folder / name).is_file()]


def load(source: str | epath.PathLike) -> Tokenizer:
  """CLIP's tokenizer (transformers) from the `tokenizer` below a diffusers folder, or from a folder itself.

  Args:
    source: a local path, a hub id or a bucket.

  Raises:
    ValueError: if files are missing or damaged; one line.
  """
  folder = fetch.local(source, (fetch.TOKENIZER,))
  folder = folder / fetch.TOKENIZER if (folder / fetch.TOKENIZER).is_dir() else folder
  if missing := _missing(folder):
    raise UserError(
      f"{folder} holds no CLIP tokenizer: {' and '.join(missing)} missing; give a folder that holds them."
    )
  return _read(folder)


def _read(folder: pathlib.Path) -> Tokenizer:
  # Otherwise the import warns that PyTorch is missing, which tokenizers do not need.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  from transformers import CLIPTokenizer  # Slow to import, and only needed here.

  try:
    # Regardless of its files: CLIP requires padding and truncation on the right.
    return CLIPTokenizer.from_pretrained(
      str(folder), local_files_only=True, padding_side="right", truncation_side="right"
    )
  except Exception as error:  # A damaged vocabulary can fail anywhere.
    raise UserError(f"the tokenizer in {folder} cannot be read ({one_line(error)}); fetch its files again.") from error


def tokenize(sentences: Sequence[str], tokenizer: Tokenizer, *, vocabulary: int, length: int) -> np.ndarray:
  """Token ids, checked against the vocabulary of the encoder and the end token that it looks for.

  Args:
    sentences: texts; longer ones are truncated.
    tokenizer: transformers' CLIPTokenizer.
    vocabulary: rows of the encoder's token embedding.
    length: number of tokens that a sentence is padded or truncated to.

  Returns:
    int32 [sentences, length].

  Raises:
    ValueError: for a tokenizer that does not match the encoder, and for texts that contain a special token.
  """
  marks = [mark for mark in (tokenizer.bos_token, tokenizer.eos_token) if any(mark in text for text in sentences)]
  if marks:
    raise UserError(f"a sentence holds {marks[0]!r}, which the tokenizer treats as a special token; remove it.")
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
  """Placeholder tokenizer: one id per character, with begin and end as the largest ids; int32 [sentences, length]."""
  return _framed([[ord(letter) for letter in sentence] for sentence in sentences], vocabulary, length)


def words(sentences: Sequence[str], *, vocabulary: int, length: int) -> np.ndarray:
  """As `characters`, with one id per word without punctuation, a hash of its letters; two words may share an id."""
  numbers = [[zlib.crc32(word.encode()) for word in WORD.findall(sentence.lower())] for sentence in sentences]
  return _framed(numbers, vocabulary, length)


def _framed(numbers: Sequence[Sequence[int]], vocabulary: int, length: int) -> np.ndarray:
  """Ids from numbers, enclosed by the begin and end tokens and truncated or padded to `length`."""
  result = np.full((len(numbers), length), vocabulary - 1, np.int32)
  for row, values in zip(result, numbers, strict=True):
    ids = [value % (vocabulary - 2) for value in values[: length - 2]]
    row[: len(ids) + 1] = [vocabulary - 2, *ids]
  return result


PLACEHOLDERS = {CHARACTERS: characters, WORDS: words}
