"""CLIP's text encoder, also in OpenCLIP's sizes; its layers also serve the image encoder.

Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020; transformers models/clip/modeling_clip.py.
"""

import dataclasses
from typing import NamedTuple, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.backbones.attention import attention, masked_attention
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Buffer


def quick_gelu(x: Array) -> Array:
  """x * sigmoid(1.702 x), OpenAI's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


@dataclasses.dataclass(frozen=True)
class TextSizes:
  """Sizes of a text encoder, as read from its config.

  Attributes:
    vocab_size, positions: rows of the two embedding tables.
    width, layers, heads, mlp_width: of the transformer.
    activation: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP, SD 2.x).
    padding: token id of the padding, 0 in SD 2.x regardless of the tokenizer; -1: that of the tokenizer, which is the
      end-of-text token in SD 1.x. All positions are used, so the padding affects the states.
  """

  vocab_size: int = 49408
  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp_width: int = 3072
  positions: int = 77
  activation: str = "quick_gelu"
  padding: int = -1


class TextStates(NamedTuple):
  """Output of the encoder.

  Attributes:
    last: float [B, N, D], after the final norm.
    pooled: float [B, D], `last` at the first occurrence of the largest token id, the end-of-text token.
    hidden: the states before each layer and after the last one, before the final norm.
    embeds: float [B, P], `pooled` after the projection, or None if the encoder has none.
  """

  last: Array
  pooled: Array
  hidden: tuple[Array, ...]
  embeds: Array | None = None


class SelfAttention(nnx.Module):
  """Multi-head attention with biases and a mask."""

  def __init__(self, width: int, heads: int, **common: Unpack[LayerOptions]):
    self.heads = heads
    self.q_proj, self.k_proj, self.v_proj, self.out_proj = (layers.linear(width, width, **common) for _ in range(4))

  def __call__(self, x: Array, mask: np.ndarray | None) -> Array:
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # [B, N, heads, D]
    query, key, value = (split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
    out = attention(query, key, value) if mask is None else masked_attention(query, key, value, mask)
    return self.out_proj(out.reshape(x.shape))


class Mlp(nnx.Module):
  """Two linear layers around the activation."""

  def __init__(self, width: int, hidden: int, activation: str, **common: Unpack[LayerOptions]):
    self.activation = activation
    self.fc1, self.fc2 = layers.linear(width, hidden, **common), layers.linear(hidden, width, **common)

  def __call__(self, x: Array) -> Array:
    return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
  """Attention and MLP, each after a norm and with a skip."""

  def __init__(self, width: int, heads: int, mlp_width: int, activation: str, **common: Unpack[LayerOptions]):
    self.self_attn = SelfAttention(width, heads, **common)
    self.layer_norm1 = normalization.LayerNorm(width, **common)
    self.mlp = Mlp(width, mlp_width, activation, **common)
    self.layer_norm2 = normalization.LayerNorm(width, **common)

  def __call__(self, x: Array, mask: np.ndarray | None) -> Array:
    x = x + self.self_attn(self.layer_norm1(x), mask)
    return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
  """The stack of layers; returns the state before each and after the last."""

  def __init__(
    self, count: int, width: int, heads: int, mlp_width: int, activation: str, **common: Unpack[LayerOptions]
  ):
    self.layers = nnx.List([Layer(width, heads, mlp_width, activation, **common) for _ in range(count)])

  def __call__(self, x: Array, mask: np.ndarray | None) -> tuple[Array, ...]:
    states = [x]
    for layer in self.layers:
      states.append(layer(states[-1], mask))
    return tuple(states)


class TextEmbeddings(nnx.Module):
  """Token plus position."""

  def __init__(self, sizes: TextSizes, **common: Unpack[LayerOptions]):
    self.token_embedding = layers.embed(sizes.vocab_size, sizes.width, **common)
    self.position_embedding = layers.embed(sizes.positions, sizes.width, **common)

  def __call__(self, tokens: Array) -> Array:
    return self.token_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[1]))[None]


class TextModel(nnx.Module):
  """Embeddings, causal layers, final norm."""

  def __init__(self, sizes: TextSizes, **common: Unpack[LayerOptions]):
    self.embeddings = TextEmbeddings(sizes, **common)
    self.encoder = Encoder(sizes.layers, sizes.width, sizes.heads, sizes.mlp_width, sizes.activation, **common)
    self.final_layer_norm = normalization.LayerNorm(sizes.width, **common)

  def __call__(self, tokens: Array) -> TextStates:
    causal = np.tri(tokens.shape[1], dtype=bool)
    hidden = self.encoder(self.embeddings(tokens), causal)
    last = self.final_layer_norm(hidden[-1])
    end = jnp.argmax(tokens, axis=1)
    pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]  # [B, D]
    return TextStates(last, pooled, hidden)


class ClipText(nnx.Module):
  """CLIP's text encoder. As in the releases, padding is not masked; only the causal mask is applied."""

  def __init__(self, sizes: TextSizes, *, projection: int = 0, **common: Unpack[LayerOptions]):
    """`projection`: width of the joint embedding space; 0 omits the projection."""
    self.projected = projection > 0
    self.text_model = TextModel(sizes, **common)
    if self.projected:
      self.text_projection = layers.linear(sizes.width, projection, use_bias=False, **common)

  def __call__(self, tokens: Array) -> TextStates:
    """Encodes int [B, N] token ids, N at most `positions`; the end-of-text id is the largest."""
    states = self.text_model(tokens)
    return states._replace(embeds=self.text_projection(states.pooled)) if self.projected else states


Tower = TypeVar("Tower", bound=nnx.Module)


def as_buffers(tower: Tower) -> Tower:
  """Converts all parameters of the module to buffers, which are never trained."""
  for _, module in nnx.iter_modules(tower):
    for name, value in list(vars(module).items()):
      if isinstance(value, nnx.Param):
        setattr(module, name, Buffer(value.get_value()))
  return tower
