"""EcoDepth's context: a mixture of learned vectors, weighed by what a classifier of ImageNet sees in the picture.

No text and no class of the scene are needed.

Source: Patni et al. 2024, https://arxiv.org/abs/2403.18807; EcoDepth depth/models/model.py, class CIDE (v1.0.0).
"""

from typing import TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.models.backbones.vit import LEVELS, VitClassifier, VitSizes, VitStates, resized_bytes
from vpd_jax.models.context.adapters import Adapter
from vpd_jax.models.context.context import Context
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Batch

Pixels = TypeVar("Pixels", np.ndarray, Array)
HIDDEN = 400  # width between the classifier's scores and the mixture's
CHOICES = {"vit_bytes": ("truncated", "rounded"), "class_scores": ("logits", "probabilities")}


def to_bytes(image: Array, how: str) -> Array:
  """An image in bytes, on the way that it takes in the release: to [0, 1], to [-1, 1] and back.

  Args:
    image: uint8, or float in [0, 1].
    how: "truncated" as released: float32 rounds down on the way, so that every byte from 1 to 63 comes out one less;
      "rounded", the same bytes.

  Returns:
    int32, of the shape of `image`.
  """
  if jnp.issubdtype(image.dtype, jnp.integer):
    return jnp.asarray(_back(np.arange(256, dtype=np.float32) / np.float32(255) * 2 - 1, how))[image]
  # Between the two steps the numbers are kept: a compiler knows that they cancel.
  return _back(jax.lax.optimization_barrier(image.astype(jnp.float32) * 2 - 1), how)


def _back(x: Pixels, how: str) -> Pixels:
  """Float32 in [-1, 1] to int32 from 0 to 255."""
  return (255 * ((x + 1) / 2) + (0.5 if how == "rounded" else 0)).astype(np.int32)


class PictureClassifier(Context):
  """What EcoDepth's contexts have in common: the classifier, and the picture that it sees."""

  def __init__(
    self,
    sizes: VitSizes,
    *,
    vit_bytes: str,
    padding: tuple[int, float] | None,
    trained: bool = False,
    **common: Unpack[LayerOptions],
  ):
    """Builds the classifier.

    Args:
      sizes: of the classifier.
      vit_bytes: "truncated" or "rounded", see `to_bytes`.
      padding: multiple to which the classifier's picture grows at right and bottom, and the value there, in [-1, 1];
        None: it sees the image alone.
      trained: whether the transformer is, up to its last layer.
      **common: dtype, param_dtype and rngs.

    Raises:
      ValueError: an unknown word.
    """
    _check("vit_bytes", vit_bytes)
    self.dtype, self.vit_bytes, self.padding = common["dtype"], vit_bytes, padding
    self.vit_model = VitClassifier(sizes, **common)
    for part in (self.vit_model.vit.layernorm, self.vit_model.classifier) if trained else (self.vit_model,):
      as_buffers(part)

  def picture(self, image: Array) -> Array:
    """What the classifier sees, int32 [B, S, S, 3] from 0 to 255: black below or at the right to a square, resized."""
    return resized_bytes(self.square(image), self.vit_model.image_size)

  def square(self, image: Array) -> Array:
    """Bytes of uint8 [B, H, W, 3] or float in [0, 1], with the padding, then with black to a square."""
    image = to_bytes(image, self.vit_bytes)
    if self.padding:
      multiple, value = self.padding
      size = [-(-side // multiple) * multiple for side in image.shape[1:3]]
      image = _grown(image, size, int(_back(np.array(value, np.float32), self.vit_bytes)))
    return _grown(image, [max(image.shape[1:3])] * 2, 0)

  def states(self, batch: Batch) -> VitStates:
    """What the classifier gives for "image", uint8 [B, H, W, 3] or float in [0, 1]."""
    return self.vit_model(jnp.asarray(LEVELS)[self.picture(batch["image"])].astype(self.dtype))


class ClassMixture(PictureClassifier):
  """One token for each image, mixed of learned vectors and adapted."""

  def __init__(
    self,
    sizes: VitSizes,
    width: int,
    count: int,
    adapt: Adapter,
    *,
    class_scores: str,
    vit_bytes: str,
    padding: tuple[int, float] | None,
    **common: Unpack[LayerOptions],
  ):
    """Builds what follows the classifier; see PictureClassifier for the other arguments.

    Args:
      sizes: of the classifier.
      width: D, of the UNet's context.
      count: learned vectors.
      adapt: module from vectors to tokens.
      class_scores: "logits" or "probabilities" of the classifier, which weigh the vectors.
      vit_bytes, padding: of the classifier's picture.
      **common: dtype, param_dtype and rngs.

    Raises:
      ValueError: an unknown word, no vectors.
    """
    super().__init__(sizes, vit_bytes=vit_bytes, padding=padding, **common)
    _check("class_scores", class_scores)
    if count < 1:
      raise UserError(f"method.embeddings={count} must be at least 1.")
    self.tokens, self.adapt, self.class_scores = (1, width), adapt, class_scores
    default = initializers.torch_default
    first = layers.linear(sizes.labels, HIDDEN, kernel_init=default, **common)
    self.fc = nnx.List([first, layers.GELU(), layers.linear(HIDDEN, count, kernel_init=default, **common)])
    table = initializers.normal(1.0)(common["rngs"].params(), (count, width), common["param_dtype"])
    self.embeddings = nnx.Param(table)

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, 1, D] of "image", uint8 [B, H, W, 3] or float in [0, 1]."""
    scores = self.states(batch).logits
    if self.class_scores == "probabilities":
      scores = _softmax(scores)
    mixture = _softmax(layers.chain(self.fc, scores)).astype(self.dtype)
    return self.adapt((mixture @ self.embeddings[...].astype(self.dtype))[:, None])


class ClassToken(PictureClassifier):
  """The class token of the transformer's last layer, before the last norm; the transformer is trained.

  Source: a later version of EcoDepth, its option enable_v2 (November 2025); by its description.
  """

  def __init__(
    self,
    sizes: VitSizes,
    width: int,
    *,
    vit_bytes: str,
    padding: tuple[int, float] | None,
    **common: Unpack[LayerOptions],
  ):
    """See ClassMixture.

    Raises:
      ValueError: an unknown word, a transformer of another width than the UNet's context.
    """
    if sizes.width != width:
      raise UserError(
        f"method.prompt='class_token' hands tokens of backbone.vit.width={sizes.width} to a UNet that takes "
        f"backbone.unet.context_dim={width}; they must be equal, or choose method.prompt='image'."
      )
    super().__init__(sizes, vit_bytes=vit_bytes, padding=padding, trained=True, **common)
    self.tokens = (1, width)

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, 1, D] of "image", uint8 [B, H, W, 3] or float in [0, 1]."""
    return self.states(batch).hidden[-1][:, :1]


def _check(name: str, word: str) -> None:
  if word not in CHOICES[name]:
    raise UserError(f"method.{name}={word!r} is unknown; choose one of {CHOICES[name]}.")


def _grown(image: Array, size: list[int], value: int) -> Array:
  """[B, H, W, C] of `size` by more rows below and columns at the right."""
  below, right = (new - old for new, old in zip(size, image.shape[1:3], strict=True))
  return jnp.pad(image, ((0, 0), (0, below), (0, right), (0, 0)), constant_values=value)


def _softmax(x: Array) -> Array:
  """In float32 or wider."""
  return jax.nn.softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1)
