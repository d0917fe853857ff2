"""Sentences from an image's labels: "a photo of a kitchen", or the names of the classes in its label map.

Sentences are tokenized once, before training; data workers only look up the token ids.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np

from vpd_jax.errors import UserError
from vpd_jax.models.backbones.clip_text import ClipText, TextSizes, as_buffers
from vpd_jax.models.context.adapters import Adapter
from vpd_jax.models.context.context import Context
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Batch, Example

NAMES = "names"  # instead of a template: the names of the classes in the label map


def sentences_of(template: str, names: Sequence[str]) -> tuple[str, ...]:
  """The template with each name inserted for {}, with '_' as ' '; or the template itself without {}.

  Raises:
    ValueError: an empty template, or one with more than one {}.
  """
  if not template.strip() or template.count("{}") > 1 or template.replace("{}", "").count("{"):
    raise UserError(f"method.sentence={template!r} must be a text with at most one {{}}, for the name of the class.")
  return tuple(template.replace("{}", name.replace("_", " ")) for name in names) if "{}" in template else (template,)


class Names:
  """Host transform that adds "tokens", int32 [N]: the names of the classes in an example's "label", as one sentence.

  Names are ordered by class id and separated by spaces. If they do not fit, those of the smallest areas are omitted. A
  label map without classes results in an empty sentence.
  """

  def __init__(self, table: np.ndarray):
    """Splits the names into tokens.

    Args:
      table: int32 [K, N], the token ids of each name: begin, name, end, padding. CLIP's tokenizer never merges words,
        so that the ids of a sentence are the concatenated ids of its words.
    """
    self._begin, self._end, self._length = int(table[0, 0]), int(table.max()), table.shape[1]
    ends = (table == self._end).argmax(axis=1)
    self._names = [row[1:end] for row, end in zip(table, ends, strict=True)]
    self._padding = int(table[ends.argmin(), -1])  # of the shortest name; the end token in Stable Diffusion 1.x

  def __call__(self, example: Example) -> Example:
    counts = np.bincount(example["label"].ravel(), minlength=256)[: len(self._names)]
    available, chosen = self._length - 2, []
    for class_id in sorted(np.flatnonzero(counts), key=lambda class_id: (-counts[class_id], class_id)):
      if len(self._names[class_id]) > available:
        break
      available -= len(self._names[class_id])
      chosen.append(class_id)
    name_tokens = [token for class_id in sorted(chosen) for token in self._names[class_id]]
    tokens = np.full(self._length, self._padding, np.int32)
    tokens[: len(name_tokens) + 2] = [self._begin, *name_tokens, self._end]
    return example | {"tokens": tokens}


def with_tokens(example: Example, *, table: np.ndarray) -> Example:
  """Adds "tokens", int32 [N]: the row of the table for the example's "class_id", or the only row.

  Raises:
    ValueError: a class id without a row.
  """
  row = 0 if len(table) == 1 else int(example["class_id"])
  if not 0 <= row < len(table):
    raise UserError(f"an example has class_id {row}; there are sentences for 0 to {len(table) - 1}.")
  return example | {"tokens": table[row]}


class LabelSentence(Context):
  """The adapted states of a sentence from the labels, encoded by CLIP's frozen text encoder."""

  needs = prepare_outputs = frozenset({"tokens"})

  def __init__(
    self,
    sizes: TextSizes,
    sentence: str,
    class_names: tuple[str, ...],
    tokenize: Callable[[tuple[str, ...]], np.ndarray],
    adapt: Adapter,
    *,
    pooled: bool,
    **common: Unpack[LayerOptions],
  ):
    """Builds the encoder.

    Args:
      sizes: of the encoder, as wide as the UNet's context.
      sentence: see methods.iedp.Iedp.
      class_names: by class id.
      tokenize: sentences to int32 [sentences, sizes.positions]; called by `prepare`.
      adapt: module from states to tokens.
      pooled: use one token, the state of the end-of-text token, instead of all states.
      **common: dtype, param_dtype and rngs.

    Raises:
      ValueError: an invalid template, or one for class names without classes.
    """
    if "{}" in sentence and not class_names:
      raise UserError(
        f"method.sentence={sentence!r} names the class of an image, but the data set names none; set config.data.scene "
        "to one name for all images, or method.sentence to one without {}."
      )
    if sentence != NAMES:
      sentences_of(sentence, class_names)  # checks the template
    self._sentence, self._class_names, self._tokenize = sentence, class_names, tokenize
    self.tokens, self.pooled, self.adapt = (1 if pooled else sizes.positions, sizes.width), pooled, adapt
    self.prepare_inputs = frozenset({"label"} if sentence == NAMES else {"class_id"} if "{}" in sentence else ())
    self.text_encoder = as_buffers(ClipText(sizes, **common))

  @property
  def prepare(self) -> Callable[[Example], Example]:
    """Adds the "tokens" of an example's sentence, int32 [N]; loads the tokenizer.

    Raises:
      ValueError: no tokenizer.
    """
    if self._sentence == NAMES:
      return Names(self._tokenize(sentences_of("{}", self._class_names)))
    return functools.partial(with_tokens, table=self._tokenize(sentences_of(self._sentence, self._class_names)))

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, N, D] of "tokens", int [B, N]; [B, 1, D] if pooled."""
    states = self.text_encoder(batch["tokens"])
    return self.adapt(states.pooled[:, None] if self.pooled else states.last)
