"""Sources of what the UNet attends to: the class of an image, told or predicted, and sentences as token ids.

Texts become token ids once, before training: a data worker only looks them up.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones.clip_image import ClipImage, ImageSizes, pixels
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.types import Array, Buffer, Example

# How a method that knows classes gets the class of an image: told with the image, by CLIP from the image, or not at all
# because it attends to all of them.
NAMES = "names"  # in place of a template: the names of the classes in the label map
PROMPTS = ("scene_class", "predicted", "all_classes", "sentence")


class ClassPredictor(nnx.Module):
  """The class of an image among the names of the data set: CLIP's zero-shot classification.

  `names` holds a unit vector per class name. Nothing of it is trained, and no label enters.

  Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.
  """

  def __init__(self, sizes: ImageSizes, classes: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.dtype = dtype
    self.names = Buffer(initializers.normal(1.0)(rngs.params(), (classes, sizes.projection), param_dtype))
    self.image_encoder = as_buffers(ClipImage(sizes, projected=True, **kinds))

  def __call__(self, image: Array) -> Array:
    """Class ids, int32 [B], of uint8 [B, H, W, 3] or float in [0, 1], of any sides."""
    embeds = cast(Array, self.image_encoder(pixels(image, self.image_encoder.image_size, dtype=self.dtype)).embeds)
    scores = embeds @ self.names[...].astype(embeds.dtype).T  # [B, K]; lengths of the image's vectors do not matter
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def sentences_of(template: str, names: Sequence[str]) -> tuple[str, ...]:
  """The template with every name in place of {}, '_' as ' '; the template alone where it has no {}.

  Raises:
    ValueError: an empty template, or one with more than one {}.
  """
  if not template.strip() or template.count("{}") > 1 or template.replace("{}", "").count("{"):
    raise UserError(f"method.sentence={template!r} must be a text with at most one {{}}, for the name of the class.")
  return tuple(template.replace("{}", name.replace("_", " ")) for name in names) if "{}" in template else (template,)


class Names:
  """Host transform that adds "tokens", int32 [N]: the names of the classes in an example's "label", as one sentence.

  In the order of their numbers, joined by spaces. Where they are too many, those of the smallest area are left out. A
  label map without any class gives the empty sentence.
  """

  def __init__(self, table: np.ndarray):
    """Takes the names apart.

    Args:
      table: int32 [K, N], the token ids of each name alone: begin, the name, end, padding. CLIP's tokenizer never joins
        words, so that the ids of a sentence are those of its words one after the other.
    """
    self._begin, self._end, self._length = int(table[0, 0]), int(table.max()), table.shape[1]
    ends = (table == self._end).argmax(axis=1)
    self._names = [row[1:end] for row, end in zip(table, ends, strict=True)]
    self._padding = int(table[ends.argmin(), -1])  # of the shortest name; the end itself in Stable Diffusion 1.x

  def __call__(self, example: Example) -> Example:
    counts = np.bincount(example["label"].ravel(), minlength=256)[: len(self._names)]
    left, chosen = self._length - 2, []
    for number in sorted(np.flatnonzero(counts), key=lambda number: (-counts[number], number)):
      if len(self._names[number]) > left:
        break
      left -= len(self._names[number])
      chosen.append(number)
    words = [word for number in sorted(chosen) for word in self._names[number]]
    tokens = np.full(self._length, self._padding, np.int32)
    tokens[: len(words) + 2] = [self._begin, *words, self._end]
    return example | {"tokens": tokens}


def unchanged(example: Example) -> Example:
  """A method's host transform that does nothing."""
  return example


def with_tokens(example: Example, *, table: np.ndarray) -> Example:
  """Adds "tokens", int32 [N]: the row of the table for the example's "class_id", or the only row.

  Raises:
    ValueError: a class id without a row.
  """
  row = 0 if len(table) == 1 else int(example["class_id"])
  if not 0 <= row < len(table):
    raise UserError(f"an example has class_id {row}; there are sentences for 0 to {len(table) - 1}.")
  return example | {"tokens": table[row]}
