"""Scaled dot-product attention: one function, four implementations."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.types import Array

Implementation = Literal["auto", "xla", "chunked", "cudnn", "splash"]
IMPLEMENTATIONS = ("auto", "xla", "chunked", "cudnn", "splash")
CHUNK = 256  # queries per scan step: 8 heads x 256 x 4096 float32 scores are 32 MiB per image
CUDNN_WIDTH = 128  # widest head the fused kernel takes on every GPU; SD's coarsest levels and its VAE are wider
CHUNKED_FROM = 1024  # tokens from which "auto" cuts the queries on CPU


def attention(query: Array, key: Array, value: Array, *, implementation: Implementation = "auto") -> Array:
  """softmax(query key^T / sqrt(D)) value, softmax in float32 or wider.

  Args:
    query: float [B, N, heads, D].
    key, value: float [B, M, heads, D].
    implementation: "xla" keeps all scores; "chunked" scans over blocks of queries and recomputes them in the backward
      pass, so that memory grows with N and not N^2; "cudnn" is the fused kernel on NVIDIA GPUs (float16, bfloat16), in
      whose place "auto" serves heads that are too wide for it; "splash" the Pallas kernel on TPUs; "auto" takes
      "chunked" on CPU from 1024 queries on, else "xla".

  Returns:
    float [B, N, heads, D], the dtype of `query`.

  Raises:
    ValueError: unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention={implementation!r} is unknown; choose one of {IMPLEMENTATIONS}.")
  if implementation == "auto" or (implementation == "cudnn" and query.shape[-1] > CUDNN_WIDTH):
    long = query.shape[1] >= CHUNKED_FROM
    implementation = "chunked" if long and jax.default_backend() == "cpu" else "xla"
  if implementation == "chunked":
    return _chunked(query, key, value)
  if implementation == "splash":
    return _splash(query, key, value)
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
  return _weighted(_probabilities(query, key), value)


def attention_with_map(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
  """Attention as above, and its probabilities averaged over the heads.

  Returns:
    float [B, N, heads, D] and float [B, N, M].

  Source: VPD vpd/models.py register_attention_control (the mean over heads).
  """
  probabilities = _probabilities(query, key)
  return _weighted(probabilities, value), probabilities.mean(axis=1).astype(query.dtype)


def masked_attention(query: Array, key: Array, value: Array, mask: np.ndarray) -> Array:
  """Attention where `mask`, bool [N, M], says which keys a query may see."""
  return _weighted(_probabilities(query, key, mask), value)


def _probabilities(query: Array, key: Array, mask: np.ndarray | None = None) -> Array:
  """softmax(query key^T / sqrt(D)): float32 or wider [B, heads, N, M].

  Not jax.nn.dot_product_attention, whose softmax is float32 even for float64 inputs.
  """
  high = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=high) * query.shape[-1] ** -0.5
  if mask is not None:
    scores = jnp.where(jnp.asarray(mask)[None, None], scores, jnp.finfo(high).min)
  return jax.nn.softmax(scores, axis=-1)


def _weighted(probabilities: Array, value: Array) -> Array:
  """The values under the probabilities: [B, N, heads, D]."""
  return jnp.einsum("bhnm,bmhd->bnhd", probabilities.astype(value.dtype), value)


def _chunked(query: Array, key: Array, value: Array) -> Array:
  """Blocks of queries in a `lax.scan`; the last block is filled with zeros, whose rows are cut off again."""
  batch, tokens, heads, width = query.shape
  count = -(-tokens // CHUNK)
  padded = jnp.pad(query, ((0, 0), (0, count * CHUNK - tokens), (0, 0), (0, 0)))
  blocks = padded.reshape(batch, count, CHUNK, heads, width).swapaxes(0, 1)  # [count, B, CHUNK, heads, D]

  @jax.checkpoint
  def step(_, block):
    return None, _weighted(_probabilities(block, key), value)

  _, out = jax.lax.scan(step, None, blocks)
  return out.swapaxes(0, 1).reshape(batch, count * CHUNK, heads, width)[:, :tokens]  # [B, N, heads, D]


def _splash(query: Array, key: Array, value: Array, *, interpret: bool = False) -> Array:
  """The Pallas kernel for TPUs: no scores in memory. Widths and tokens are filled with zeros to multiples of 128."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  tokens, heads, width = query.shape[1:]
  fill = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128), (0, 0), (0, -width % 128)))
  q, k, v = (fill(x).swapaxes(1, 2) for x in (query * width**-0.5, key, value))  # [B, heads, N, lanes]
  full = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2])) for _ in range(heads)])
  attend = kernel.make_splash_mha_single_device(mask=full, interpret=interpret)
  # A query sees the keys of its own segment: the added queries see the real keys too, so that no softmax is empty.
  segments = kernel.SegmentIds(np.zeros(q.shape[2], np.int32), (np.arange(k.shape[2]) >= key.shape[1]).astype(np.int32))
  out = jax.vmap(lambda *qkv: attend(*qkv, segments))(q, k, v)
  return out.swapaxes(1, 2)[:, :tokens, :, :width].astype(query.dtype)  # [B, N, heads, D]
