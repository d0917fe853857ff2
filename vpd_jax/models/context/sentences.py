"""Sentences as what the UNet attends to: token ids on the host, states of CLIP's text encoder on the device.

All positions of a sentence count, those of the padding too, which is what the tokenizer says (in Stable Diffusion 1.x
the end-of-text token, in 2.x the id 0): the release reads the encoder's last states whole and uses no attention mask.

Source: VPD refer/data/dataset_refer_clip.py, refer/train.py.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.errors import UserError
from vpd_jax.models.backbones.clip_text import ClipText, TextSizes, as_buffers
from vpd_jax.models.context.adapters import Adapter
from vpd_jax.models.context.context import Context
from vpd_jax.types import Array, Batch, Example

SHOWN = 3  # cut sentences named in a line


@dataclasses.dataclass(frozen=True)
class SentenceTokens:
  """A method's host transform: adds the token ids of an example's sentence; also tells which sentences are cut.

  Attributes:
    tokenize: sentences to int32 [sentences, length + 1], each begun, ended by the largest id, and filled up with any id
      below or with the end again. The one token more tells whether a sentence is cut.
    length: tokens a sentence keeps, begin and end included. Release: 40 on RefCOCO and RefCOCO+, 77 on RefCOCOg.
  """

  tokenize: Callable[[tuple[str, ...]], np.ndarray]
  length: int

  def __post_init__(self):
    if self.length < 3:
      raise UserError(f"method.token_length={self.length} must be at least 3: begin, one token and end.")

  def rows(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [sentences, length], and which sentences had to be cut, bool [sentences].

    A cut sentence keeps its first tokens and ends with the end of text.

    Raises:
      ValueError: an empty sentence, or no tokenizer; one line.
    """
    empty = [place for place, text in enumerate(texts) if not text.strip()]
    if empty:
      which = "the sentence is" if len(texts) == 1 else f"{len(empty)} of {len(texts)} sentences are"
      raise UserError(f"{which} empty; say in words what is to be found, such as 'the red box on the left'.")
    tokens = self.tokenize(tuple(texts))
    end = tokens.max(axis=1)
    # Behind the first end there is padding: the end again in Stable Diffusion 1.x, another id in 2.x.
    cut = (tokens == end[:, None]).argmax(axis=1) > self.length - 1
    tokens = tokens[:, : self.length].astype(np.int32)
    tokens[cut, -1] = end[cut]
    return tokens, cut

  def __call__(self, example: Example) -> Example:
    """Adds "tokens" int32 [length] of the str "sentence".

    Raises:
      ValueError: the example has no sentence, or as for `rows`.
    """
    if "sentence" not in example:
      raise UserError(
        "the method needs a sentence with every picture, which this data set has not; set data.captions to a file of "
        "them, or choose a data set of referring expressions, or another method or prompt."
      )
    return example | {"tokens": self.rows((str(example["sentence"]),))[0][0]}

  def census(self, texts: Iterable[str]) -> str:
    """A line for the start of a run: how many sentences there are and how many are cut.

    Only what may be too long is tokenized: no token of CLIP's is shorter than a byte.
    """
    texts = list(texts)
    long = [text for text in texts if not text.isascii() or len(text) > self.length - 2]
    cut = [text for text, is_cut in zip(long, self.rows(long)[1], strict=True) if is_cut] if long else []
    named = f", such as {', '.join(map(repr, cut[:SHOWN]))}" if cut else ""
    return f"{len(texts)} sentences, {len(cut)} of them cut to {self.length} tokens (method.token_length){named}"


class Sentence(Context):
  """The adapted states of each image's sentence, from CLIP's frozen text encoder."""

  needs = prepare_outputs = frozenset({"tokens"})
  prepare_inputs = frozenset({"sentence"})

  def __init__(
    self,
    sizes: TextSizes,
    length: int,
    width: int,
    tokenize: Callable[[tuple[str, ...]], np.ndarray],
    adapt: Adapter,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Builds the encoder.

    Args:
      sizes: of the encoder.
      length: N, tokens of a sentence.
      width: D, of the UNet's context.
      tokenize: see SentenceTokens.
      adapt: module from states to tokens.
      dtype, param_dtype, rngs: of computation, of the encoder, and for its initial values.

    Raises:
      ValueError: the encoder knows fewer positions, or its states do not fit the UNet.
    """
    problems = []
    if length > sizes.positions:
      problems.append(f"method.token_length={length} is beyond the {sizes.positions} positions of the text encoder.")
    if sizes.width != width:
      problems.append(f"the text encoder (config.backbone.text) is {sizes.width} wide, the UNet's context {width}.")
    if problems:
      raise UserError(" ".join(problems))
    self.tokens = self.sentence_tokens = (length, width)
    self.dtype, self.adapt = dtype, adapt
    self._prepare = SentenceTokens(tokenize, length)
    self.text_encoder = as_buffers(ClipText(sizes, dtype=dtype, param_dtype=param_dtype, rngs=rngs))

  @property
  def prepare(self) -> SentenceTokens:
    """Adds the "tokens" of an example's sentence, int32 [N]."""
    return self._prepare

  @property
  def sentence_census(self) -> Callable[[Iterable[str]], str]:
    """How many sentences are cut."""
    return self._prepare.census

  def text_states(self, batch: Batch) -> Array:
    """`batch["text_states"]`, float [B, N, D], where they are ready; else the encoded "tokens", int [B, N]."""
    ready = batch.get("text_states")
    return (self.text_encoder(batch["tokens"]).last if ready is None else ready).astype(self.dtype)

  def once(self, batch: Batch) -> Batch:
    """With "text_states"."""
    return batch | {"text_states": self.text_states(batch)}

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, N, D]."""
    return self.adapt(self.text_states(batch))
