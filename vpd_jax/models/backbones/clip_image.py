"""CLIP's image encoder: a vision transformer with access to hidden states and the projected vector.

Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020; transformers models/clip/modeling_clip.py.
"""

import dataclasses
import functools
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.backbones.clip_text import Encoder
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array

# Of CLIP's training images, in [0, 1], RGB.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
RESIZES = {"bicubic": "cubic", "bilinear": "linear"}


@dataclasses.dataclass(frozen=True)
class ImageSizes:
  """Sizes of an image encoder, as read from its config; the defaults are ViT-L/14 at 224 pixels.

  Attributes:
    width, layers, heads, mlp_width: of the transformer.
    image_size: side of the square image, in pixels.
    patch: side of a patch, in pixels.
    projection: width of the joint embedding space.
    activation: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP).
  """

  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp_width: int = 4096
  image_size: int = 224
  patch: int = 14
  projection: int = 768
  activation: str = "quick_gelu"

  @property
  def tokens(self) -> int:
    """The class token and the patches."""
    return 1 + (self.image_size // self.patch) ** 2


class ImageStates(NamedTuple):
  """Output of the encoder.

  Attributes:
    last: float [B, N, D], the state after the last layer, the class token first, before any final norm.
    hidden: the states before each layer (the first one normed) and after the last one.
    embeds: float [B, P], the class token after norm and projection, or None if the encoder has no projection.
  """

  last: Array
  hidden: tuple[Array, ...]
  embeds: Array | None


def pixels(image: Array, size: int, *, dtype: DTypeLike, resize: str = "bicubic") -> Array:
  """Preprocesses an image for CLIP: resized to a square, clipped to [0, 1], normalized by CLIP's mean and std.

  The resize is that of Pillow, with which CLIP was trained: cubic with a = -0.5, antialiased, but without rounding to 8
  bits. The aspect ratio is not kept, and the image not cropped to its center as in CLIP's preprocessing.

  Args:
    image: uint8 [B, H, W, 3], or float in [0, 1]; RGB.
    size: side of the result.
    dtype: of the result; computed in float32 or wider.
    resize: "bicubic" or "bilinear".

  Returns:
    [B, size, size, 3].
  """
  high = jnp.promote_types(dtype, jnp.float32)
  image = image.astype(high) / 255 if jnp.issubdtype(image.dtype, jnp.integer) else image.astype(high)
  image = jnp.clip(_resize(image, size, RESIZES[resize]), 0, 1)  # cubic overshoots
  mean, std = (jnp.asarray(x, high)[None, None, None] for x in (MEAN, STD))
  return ((image - mean) / std).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _resize(image: Array, size: int, method: str) -> Array:
  """The same as jax.image.resize with antialiasing, which jax2onnx cannot convert."""
  scale = jnp.asarray([size / side for side in image.shape[1:3]], image.dtype)
  shape, offset = (image.shape[0], size, size, image.shape[3]), jnp.zeros(2, image.dtype)
  return jax.image.scale_and_translate(image, shape, (1, 2), scale, offset, method, antialias=True)


class ImageEmbeddings(nnx.Module):
  """Class token, then one token per patch, row by row; plus position."""

  def __init__(self, sizes: ImageSizes, **common: Unpack[LayerOptions]):
    self.dtype = common["dtype"]
    self.class_embedding = nnx.Param(
      initializers.normal(0.02)(common["rngs"].params(), (sizes.width,), common["param_dtype"])
    )
    patch = sizes.patch
    self.patch_embedding = layers.conv(3, sizes.width, patch, stride=patch, padding=0, use_bias=False, **common)
    self.position_embedding = layers.embed(sizes.tokens, sizes.width, **common)

  def __call__(self, image: Array) -> Array:
    patches = self.patch_embedding(image)
    patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])  # [B, N - 1, D]
    first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (patches.shape[0], 1, patches.shape[-1]))
    tokens = jnp.concatenate([first, patches], axis=1)
    return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))[None]


class VisionModel(nnx.Module):
  """Embeddings, norm, layers; `post_layernorm` for the class token if it is projected. Names as in the source."""

  def __init__(self, sizes: ImageSizes, *, projected: bool, **common: Unpack[LayerOptions]):
    self.embeddings = ImageEmbeddings(sizes, **common)
    self.pre_layrnorm = normalization.LayerNorm(sizes.width, **common)
    self.encoder = Encoder(sizes.layers, sizes.width, sizes.heads, sizes.mlp_width, sizes.activation, **common)
    if projected:
      self.post_layernorm = normalization.LayerNorm(sizes.width, **common)

  def __call__(self, image: Array) -> tuple[Array, ...]:
    return self.encoder(self.pre_layrnorm(self.embeddings(image)), None)


class ClipImage(nnx.Module):
  """CLIP's image encoder, with or without the projection into the joint embedding space."""

  def __init__(self, sizes: ImageSizes, *, projected: bool, **common: Unpack[LayerOptions]):
    self.image_size, self.projected, self.dtype = sizes.image_size, projected, common["dtype"]
    self.vision_model = VisionModel(sizes, projected=projected, **common)
    if projected:
      self.visual_projection = layers.linear(sizes.width, sizes.projection, use_bias=False, **common)

  def __call__(self, image: Array) -> ImageStates:
    """Encodes float [B, image_size, image_size, 3] from `pixels`."""
    hidden = self.vision_model(image)
    embeds = None
    if self.projected:
      embeds = self.visual_projection(self.vision_model.post_layernorm(hidden[-1][:, 0]))
    return ImageStates(hidden[-1], hidden, embeds)
