"""EcoDepth's context: a mixture of learned vectors, weighted by the scores of an ImageNet classifier.

It needs neither text nor the class of the scene.

Source: Patni et al. 2024, https://arxiv.org/abs/2403.18807; EcoDepth depth/models/model.py, class CIDE (v1.0.0).
"""

from typing import TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.errors import UserError, check_choice
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.models.backbones.vit import LEVELS, VitClassifier, VitSizes, VitStates, resized_bytes
from vpd_jax.models.context.adapters import Adapter
from vpd_jax.models.context.context import Context
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Batch

Pixels = TypeVar("Pixels", np.ndarray, Array)
HIDDEN = 400  # hidden width between class scores and mixture weights
BYTES = ("truncated", "rounded")
SCORES = ("logits", "probabilities")


def to_bytes(image: Array, rounding: str) -> Array:
  """Converts an image to bytes as the release does: to [0, 1], to [-1, 1] and back.

  Args:
    image: uint8, or float in [0, 1].
    rounding: "truncated" as released: due to float32 arithmetic, all bytes from 1 to 63 decrease by one; "rounded"
      preserves the bytes.

  Returns:
    int32, of the shape of `image`.
  """
  if jnp.issubdtype(image.dtype, jnp.integer):
    return jnp.asarray(_back(np.arange(256, dtype=np.float32) / np.float32(255) * 2 - 1, rounding))[image]
  # The barrier prevents the compiler from cancelling the two steps.
  return _back(jax.lax.optimization_barrier(image.astype(jnp.float32) * 2 - 1), rounding)


def _back(x: Pixels, rounding: str) -> Pixels:
  """Float32 in [-1, 1] to int32 from 0 to 255."""
  return (255 * ((x + 1) / 2) + (0.5 if rounding == "rounded" else 0)).astype(np.int32)


class PictureClassifier(Context):
  """Base class of EcoDepth's contexts: the classifier and its input image."""

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
      padding: multiple to which the classifier's image is padded at right and bottom, and the value in [-1, 1]; None:
        no padding.
      trained: whether the transformer is trained, up to its last layer.
      **common: dtype, param_dtype and rngs.

    Raises:
      ValueError: unknown `vit_bytes`.
    """
    check_choice("method.vit_bytes", vit_bytes, BYTES)
    self.dtype, self.vit_bytes, self.padding = common["dtype"], vit_bytes, padding
    self.vit_model = VitClassifier(sizes, **common)
    for part in (self.vit_model.vit.layernorm, self.vit_model.classifier) if trained else (self.vit_model,):
      as_buffers(part)

  def picture(self, image: Array) -> Array:
    """The classifier's input, int32 [B, S, S, 3] from 0 to 255: padded with black to a square, and resized."""
    return resized_bytes(self.square(image), self.vit_model.image_size)

  def square(self, image: Array) -> Array:
    """Bytes of uint8 [B, H, W, 3] or float in [0, 1], padded, then padded with black to a square."""
    image = to_bytes(image, self.vit_bytes)
    if self.padding:
      multiple, value = self.padding
      size = [-(-side // multiple) * multiple for side in image.shape[1:3]]
      image = _padded(image, size, int(_back(np.array(value, np.float32), self.vit_bytes)))
    return _padded(image, [max(image.shape[1:3])] * 2, 0)

  def states(self, batch: Batch) -> VitStates:
    """The classifier's output for "image", uint8 [B, H, W, 3] or float in [0, 1]."""
    return self.vit_model(jnp.asarray(LEVELS)[self.picture(batch["image"])].astype(self.dtype))


class ClassMixture(PictureClassifier):
  """One token for each image: an adapted mixture of learned vectors."""

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
    """Builds the layers after the classifier; see PictureClassifier for the other arguments.

    Args:
      sizes: of the classifier.
      width: D, of the UNet's context.
      count: number of learned vectors.
      adapt: module from vectors to tokens.
      class_scores: "logits" or "probabilities" of the classifier.
      vit_bytes, padding: of the classifier's image.
      **common: dtype, param_dtype and rngs.

    Raises:
      ValueError: an unknown option, no vectors.
    """
    super().__init__(sizes, vit_bytes=vit_bytes, padding=padding, **common)
    check_choice("method.class_scores", class_scores, SCORES)
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
      ValueError: an unknown option, or the width of the transformer is not that of the UNet's context.
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


def _padded(image: Array, size: list[int], value: int) -> Array:
  """Pads [B, H, W, C] at the bottom and right to `size`."""
  below, right = (new - old for new, old in zip(size, image.shape[1:3], strict=True))
  return jnp.pad(image, ((0, 0), (0, below), (0, right), (0, 0)), constant_values=value)


def _softmax(x: Array) -> Array:
  """Softmax in float32 or wider."""
  return jax.nn.softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1)
