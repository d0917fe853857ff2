"""The base class of all sources of tokens."""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jax.typing import DTypeLike

from vpd_jax.models.parameters import Inlined
from vpd_jax.types import Array, Batch, Example


def unchanged(example: Example) -> Example:
  """A host transform that does nothing."""
  return example


class Context(Inlined):
  """A source of the tokens that the UNet attends to.

  Its arrays are named as if they were attributes of the method.

  Attributes:
    tokens: number and width of the tokens.
    needs: keys of a Batch that it reads besides "image".
    prepare_inputs, prepare_outputs: keys of an Example that `prepare` reads, and that it adds.
    sentence_tokens: number and width of the states of each image's sentence; None if it reads no sentence.
    class_predictor: images to the ids of their classes, int [B]; None if it predicts none.
    of_classes: whether there is one token for each class of the data set.
  """

  tokens: tuple[int, int]
  dtype: DTypeLike
  needs: frozenset[str] = frozenset()
  prepare_inputs: frozenset[str] = frozenset()
  prepare_outputs: frozenset[str] = frozenset()
  sentence_tokens: tuple[int, int] | None = None
  class_predictor: Callable[[Array], Array] | None = None
  of_classes = False

  @property
  def prepare(self) -> Callable[[Example], Example]:
    """Host transform that runs after that of the data set; picklable, since it is sent to the data workers."""
    return unchanged

  @property
  def sentence_summary(self) -> Callable[[Iterable[str]], str] | None:
    """Sentences to a line for the start-up report; None if it reads none."""
    return None

  def once(self, batch: Batch) -> Batch:
    """Adds to the batch what is constant over the passes of the UNet."""
    return batch

  def text_states(self, batch: Batch) -> Array:
    """States of each image's sentence, float [B, N, D]; for sources with `sentence_tokens`."""
    raise NotImplementedError(f"{type(self).__name__} reads no sentence.")

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Tokens of one pass of the UNet, counted from 0: float [B, N, D]."""
    raise NotImplementedError


class SentenceThen(Context):
  """The tokens of a sentence, followed by those of a source that needs no preparation."""

  def __init__(self, sentence: Context, other: Context):
    self.sentence, self.other = sentence, other
    self.tokens = sentence.tokens[0] + other.tokens[0], sentence.tokens[1]
    self.needs = sentence.needs | other.needs
    self.prepare_inputs, self.prepare_outputs = sentence.prepare_inputs, sentence.prepare_outputs
    self.sentence_tokens = sentence.sentence_tokens

  @property
  def prepare(self) -> Callable[[Example], Example]:
    """See Context."""
    return self.sentence.prepare

  @property
  def sentence_summary(self) -> Callable[[Iterable[str]], str] | None:
    """See Context."""
    return self.sentence.sentence_summary

  def once(self, batch: Batch) -> Batch:
    """Adds the states of the sentence."""
    return self.sentence.once(batch)

  def text_states(self, batch: Batch) -> Array:
    """States of the sentence, float [B, N, D]."""
    return self.sentence.text_states(batch)

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, N + M, D]."""
    return jnp.concatenate([self.sentence(batch, step), self.other(batch, step)], axis=1)
