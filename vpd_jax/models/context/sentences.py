"""Sentences as context of the UNet: token ids on the host, states of CLIP's text encoder on the device.

All positions of a sentence are used, including padding, which depends on the tokenizer (the end-of-text token in Stable
Diffusion 1.x, the id 0 in 2.x): the release uses all of the encoder's last states without an attention mask.

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

MAX_LISTED = 3  # truncated sentences listed in the report


@dataclasses.dataclass(frozen=True)
class SentenceTokens:
  """A method's host transform: adds the token ids of an example's sentence; also detects truncated sentences.

  Attributes:
    tokenize: sentences to int32 [sentences, length + 1], each with a begin token, an end token with the largest id, and
      padding by any smaller id or the end token. The additional token shows whether a sentence is truncated.
    length: maximum number of tokens of a sentence, including begin and end. Release: 40 on RefCOCO and RefCOCO+, 77 on
      RefCOCOg.
  """

  tokenize: Callable[[tuple[str, ...]], np.ndarray]
  length: int

  def __post_init__(self):
    if self.length < 3:
      raise UserError(f"method.token_length={self.length} must be at least 3: begin, one token and end.")

  def rows(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [sentences, length], and which sentences are truncated, bool [sentences].

    A truncated sentence consists of its first tokens and the end token.

    Raises:
      ValueError: in one line, for an empty sentence, or without a tokenizer.
    """
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
      which = "the sentence is" if len(texts) == 1 else f"{len(empty)} of {len(texts)} sentences are"
      raise UserError(f"{which} empty; say in words what is to be found, such as 'the red box on the left'.")
    tokens = self.tokenize(tuple(texts))
    end = tokens.max(axis=1)
    # Padding follows the first end token: more end tokens in Stable Diffusion 1.x, another id in 2.x.
    cut = (tokens == end[:, None]).argmax(axis=1) > self.length - 1
    tokens = tokens[:, : self.length].astype(np.int32)
    tokens[cut, -1] = end[cut]
    return tokens, cut

  def __call__(self, example: Example) -> Example:
    """Adds "tokens" int32 [length] of the str "sentence".

    Raises:
      ValueError: the example has no sentence, or as in `rows`.
    """
    if "sentence" not in example:
      raise UserError(
        "the method needs a sentence for every image, which this data set does not provide; set data.captions to a "
        "file of them, or choose a data set of referring expressions, or another method or prompt."
      )
    return example | {"tokens": self.rows((str(example["sentence"]),))[0][0]}

  def summary(self, texts: Iterable[str]) -> str:
    """A line for the start-up report: the number of sentences, and how many are truncated.

    Only tokenizes sentences that may be too long: no token of CLIP is shorter than a byte.
    """
    texts = list(texts)
    candidates = [text for text in texts if not text.isascii() or len(text) > self.length - 2]
    truncated = self.rows(candidates)[1] if candidates else []
    cut = [text for text, is_cut in zip(candidates, truncated, strict=True) if is_cut]
    examples = f", such as {', '.join(map(repr, cut[:MAX_LISTED]))}" if cut else ""
    limit = f"{self.length} tokens (method.token_length)"
    return f"{len(texts)} sentences, {len(cut)} of them truncated to {limit}{examples}"


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
      ValueError: the encoder has fewer positions, or its width is not that of the UNet's context.
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
  def sentence_summary(self) -> Callable[[Iterable[str]], str]:
    """See SentenceTokens.summary."""
    return self._prepare.summary

  def text_states(self, batch: Batch) -> Array:
    """Precomputed `batch["text_states"]`, float [B, N, D], or else the encoded "tokens", int [B, N]."""
    ready = batch.get("text_states")
    return (self.text_encoder(batch["tokens"]).last if ready is None else ready).astype(self.dtype)

  def once(self, batch: Batch) -> Batch:
    """Adds "text_states"."""
    return batch | {"text_states": self.text_states(batch)}

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, N, D]."""
    return self.adapt(self.text_states(batch))
