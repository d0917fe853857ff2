"""A vision transformer for ImageNet classification, with the names of Hugging Face.

Source: Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929; transformers models/vit/modeling_vit.py.
"""

import dataclasses
import math
from typing import NamedTuple, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.backbones.attention import attention
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array

EPSILON = 1e-12  # of its norms
# Normalized pixel values by byte, rounded like the image processor of transformers.
LEVELS = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
_BITS = 22  # fractional bits of Pillow's weights


@dataclasses.dataclass(frozen=True)
class VitSizes:
  """Sizes of a classifier, as read from its config; the defaults are google/vit-base-patch16-224.

  Attributes:
    width, layers, heads, mlp_width: of the transformer.
    image_size: side of the square image, in pixels.
    patch: side of a patch, in pixels.
    labels: number of classes.
  """

  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp_width: int = 3072
  image_size: int = 224
  patch: int = 16
  labels: int = 1000

  @property
  def tokens(self) -> int:
    """The class token and the patches."""
    return 1 + (self.image_size // self.patch) ** 2


class VitStates(NamedTuple):
  """Output of the classifier.

  Attributes:
    hidden: the states before each layer and after the last one, float [B, N, D], the class token first.
    last: float [B, N, D], the last of them after the final norm.
    logits: float [B, K], of the class token.
  """

  hidden: tuple[Array, ...]
  last: Array
  logits: Array


def resized_bytes(image: Array, size: int) -> Array:
  """Resizes a square of bytes, bit-identical to Pillow: bilinear with antialiasing.

  Two passes, columns first, each with weights of 22 bits and rounded to bytes.

  Args:
    image: int32 [B, S, S, C], 0 to 255.
    size: side of the result.

  Returns:
    int32 [B, size, size, C].

  Source: Pillow src/libImaging/Resample.c.
  """
  for axis in (2, 1):
    index, weights = _taps(image.shape[axis], size)
    weights = weights.reshape(*(1,) * axis, *weights.shape, *(1,) * (3 - axis))
    total = (jnp.take(image, index, axis=axis) * weights).sum(axis=axis + 1)
    image = (total + (1 << _BITS - 1)) >> _BITS  # [B, S, size, C], then [B, size, size, C]
  return image


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the source pixels of each new pixel, and their weights in units of 2^-22: int32 [new, taps] each."""
  scale = old / new
  support = max(scale, 1.0)
  index = np.zeros((new, 2 * math.ceil(support) + 1), np.int32)
  weights = np.zeros(index.shape, np.int32)
  for i in range(new):
    center = (i + 0.5) * scale
    first, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), old)
    pixels = np.arange(first, end)
    shares = np.maximum(1 - np.abs((pixels - center + 0.5) * (1 / support)), 0)
    index[i, : pixels.size] = pixels
    weights[i, : pixels.size] = np.floor(shares / shares.sum() * (1 << _BITS) + 0.5)
  return index, weights


class Dense(nnx.Module):
  """A linear layer named `dense`."""

  def __init__(self, in_width: int, out_width: int, **common: Unpack[LayerOptions]):
    self.dense = layers.linear(in_width, out_width, **common)

  def __call__(self, x: Array) -> Array:
    return self.dense(x)


class SelfAttention(nnx.Module):
  """Multi-head attention with biases, before its projection."""

  def __init__(self, width: int, heads: int, **common: Unpack[LayerOptions]):
    self.heads = heads
    self.query, self.key, self.value = (layers.linear(width, width, **common) for _ in range(3))

  def __call__(self, x: Array) -> Array:
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # [B, N, heads, D]
    return attention(split(self.query(x)), split(self.key(x)), split(self.value(x))).reshape(x.shape)


class Attention(nnx.Module):
  """Multi-head attention and its projection."""

  def __init__(self, width: int, heads: int, **common: Unpack[LayerOptions]):
    self.attention, self.output = SelfAttention(width, heads, **common), Dense(width, width, **common)

  def __call__(self, x: Array) -> Array:
    return self.output(self.attention(x))


class Layer(nnx.Module):
  """Attention and two linear layers around an exact GELU, each after a norm and with a skip."""

  def __init__(self, sizes: VitSizes, **common: Unpack[LayerOptions]):
    self.attention = Attention(sizes.width, sizes.heads, **common)
    self.intermediate = Dense(sizes.width, sizes.mlp_width, **common)
    self.output = Dense(sizes.mlp_width, sizes.width, **common)
    self.layernorm_before, self.layernorm_after = (
      normalization.LayerNorm(sizes.width, epsilon=EPSILON, **common) for _ in range(2)
    )

  def __call__(self, x: Array) -> Array:
    x = x + self.attention(self.layernorm_before(x))
    return x + self.output(layers.GELU()(self.intermediate(self.layernorm_after(x))))


class Encoder(nnx.Module):
  """The stack of layers; returns the state before each and after the last."""

  def __init__(self, sizes: VitSizes, **common: Unpack[LayerOptions]):
    self.layer = nnx.List([Layer(sizes, **common) for _ in range(sizes.layers)])

  def __call__(self, x: Array) -> tuple[Array, ...]:
    states = [x]
    for layer in self.layer:
      states.append(layer(states[-1]))
    return tuple(states)


class PatchEmbeddings(nnx.Module):
  """A token per patch, row by row."""

  def __init__(self, sizes: VitSizes, **common: Unpack[LayerOptions]):
    self.projection = layers.conv(3, sizes.width, sizes.patch, stride=sizes.patch, padding=0, **common)

  def __call__(self, image: Array) -> Array:
    patches = self.projection(image)
    return patches.reshape(patches.shape[0], -1, patches.shape[-1])  # [B, N - 1, D]


class Embeddings(nnx.Module):
  """Class token, then the patches; plus position."""

  def __init__(self, sizes: VitSizes, **common: Unpack[LayerOptions]):
    self.dtype = common["dtype"]
    draw = lambda tokens: initializers.truncated_normal(0.02)(
      common["rngs"].params(), (1, tokens, sizes.width), common["param_dtype"]
    )
    self.cls_token, self.position_embeddings = nnx.Param(draw(1)), nnx.Param(draw(sizes.tokens))
    self.patch_embeddings = PatchEmbeddings(sizes, **common)

  def __call__(self, image: Array) -> Array:
    patches = self.patch_embeddings(image)
    first = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (patches.shape[0], 1, patches.shape[-1]))
    return jnp.concatenate([first, patches], axis=1) + self.position_embeddings[...].astype(self.dtype)


class Vit(nnx.Module):
  """Embeddings, layers, last norm."""

  def __init__(self, sizes: VitSizes, **common: Unpack[LayerOptions]):
    self.embeddings, self.encoder = Embeddings(sizes, **common), Encoder(sizes, **common)
    self.layernorm = normalization.LayerNorm(sizes.width, epsilon=EPSILON, **common)

  def __call__(self, image: Array) -> tuple[tuple[Array, ...], Array]:
    hidden = self.encoder(self.embeddings(image))
    return hidden, self.layernorm(hidden[-1])


class VitClassifier(nnx.Module):
  """The transformer and a linear classifier of its class token."""

  def __init__(self, sizes: VitSizes, **common: Unpack[LayerOptions]):
    self.image_size, self.dtype = sizes.image_size, common["dtype"]
    self.vit, self.classifier = Vit(sizes, **common), layers.linear(sizes.width, sizes.labels, **common)

  def __call__(self, image: Array) -> VitStates:
    """Classifies float [B, image_size, image_size, 3], the LEVELS of bytes."""
    hidden, last = self.vit(image)
    return VitStates(hidden, last, self.classifier(last[:, 0]))
