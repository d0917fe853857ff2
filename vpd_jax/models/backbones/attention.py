"""Scaled dot-product attention: one function, four implementations."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from vpd_jax.errors import check_choice
from vpd_jax.models.backbones.platform import platform
from vpd_jax.types import Array, Fields

Implementation = Literal["auto", "xla", "chunked", "cudnn", "splash"]
IMPLEMENTATIONS = ("auto", "xla", "chunked", "cudnn", "splash")
BY_PLATFORM: dict[str, Implementation] = {"cpu": "chunked", "gpu": "cudnn", "tpu": "splash", "any": "chunked"}
# Name of results, and of what the backward pass of "splash" needs, and the primitive of "cudnn", for policies of
# jax.checkpoint.
RESULT, CUDNN_PRIMITIVE = "attention", "dot_product_attention_fwd_wrapper"
CHUNK = 256  # queries per scan step: 8 heads x 256 x 4096 float32 scores are 32 MiB per image
CUDNN_WIDTH = 128  # widest head that the fused kernel supports on every GPU; SD's coarsest levels and its VAE are wider
CUDNN_FROM = 8.0  # compute capability: Ampere
# Minimum number of queries and keys for which "auto" does not use "xla", which is fast for short sequences.
LONG = {"chunked": 1024, "cudnn": 1024, "splash": 2048}
BLOCK = 512  # queries and keys per block of the TPU kernel


def attention(query: Array, key: Array, value: Array, *, implementation: Implementation = "auto") -> Array:
  """softmax(query key^T / sqrt(D)) value, softmax in float32 or wider.

  Args:
    query: float [B, N, heads, D].
    key, value: float [B, M, heads, D].
    implementation: "xla" stores all scores; "chunked" scans over blocks of queries and recomputes them in the backward
      pass, so that memory grows with N instead of N^2; "cudnn" is the fused kernel on NVIDIA GPUs (float16, bfloat16);
      "splash" the Pallas kernel on TPUs; "auto" selects "chunked", "cudnn" or "splash" by the platform for long
      self-attention, "chunked" on GPUs if the fused kernel does not support it, and "xla" otherwise. "cudnn" uses "xla"
      for heads that are too wide.

  Returns:
    float [B, N, heads, D], the dtype of `query`.

  Raises:
    ValueError: unknown implementation.
  """
  check_choice("attention", implementation, IMPLEMENTATIONS)
  if implementation == "auto":
    implementation = _best(query, key)
  if implementation == "chunked":
    return checkpoint_name(_chunked(query, key, value), RESULT)
  if implementation == "splash":
    return _splash(query, key, value)
  if implementation == "cudnn" and query.shape[-1] <= CUDNN_WIDTH:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
  return checkpoint_name(_weighted(_probabilities(query, key), value), RESULT)


def _best(query: Array, key: Array) -> Implementation:
  """The implementation that "auto" selects."""
  device_platform = platform()
  best: Implementation = BY_PLATFORM.get(device_platform, "xla")
  if best == "cudnn" and not _cudnn_supports(query):
    best = "chunked"
  # On CPU, chunking also pays off for many queries with few keys.
  tokens = query.shape[1] if device_platform in ("cpu", "any") else min(query.shape[1], key.shape[1])
  return best if tokens >= LONG.get(best, 0) else "xla"


def _cudnn_supports(query: Array) -> bool:
  """Whether the fused kernel supports this dtype, width and GPU; GPU topologies are assumed to be recent."""
  device = jax.devices()[0]
  capability = CUDNN_FROM if device.platform == "cpu" else getattr(device, "compute_capability", None)
  return (
    query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[-1] <= CUDNN_WIDTH
    and query.shape[-1] % 8 == 0
    and float(capability or 0) >= CUDNN_FROM
  )


def attention_with_map(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
  """Attention as above, and its probabilities averaged over the heads.

  Returns:
    float [B, N, heads, D] and float [B, N, M].

  Source: VPD vpd/models.py register_attention_control (the mean over heads).
  """
  probabilities = _probabilities(query, key)
  return checkpoint_name(_weighted(probabilities, value), RESULT), probabilities.mean(axis=1).astype(query.dtype)


def masked_attention(query: Array, key: Array, value: Array, mask: np.ndarray) -> Array:
  """Attention with `mask`, bool [N, M]: the keys that each query may attend to."""
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
  """The values weighted by the probabilities: [B, N, heads, D]."""
  return jnp.einsum("bhnm,bmhd->bnhd", probabilities.astype(value.dtype), value)


def _chunked(query: Array, key: Array, value: Array) -> Array:
  """Processes blocks of queries; on CPUs head by head, since many keys and values of one head stay in the cache."""
  if platform() == "cpu" and key.shape[1] > CHUNK:
    by_head = tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, value))  # [heads, B, N, D]
    return jnp.moveaxis(jax.lax.map(lambda head: _in_blocks(_head, *head), by_head), 0, 2)
  return _in_blocks(lambda block, key, value: _weighted(_probabilities(block, key), value), query, key, value)


def _in_blocks(attend: Callable[..., Array], query: Array, key: Array, value: Array) -> Array:
  """attend(query, key, value) for blocks of the queries, [B, N, ...], in a loop; the last one is padded with zeros."""
  batch, tokens, *trailing = query.shape
  count = -(-tokens // CHUNK)
  padded = jnp.pad(query, ((0, 0), (0, count * CHUNK - tokens), *((0, 0),) * len(trailing)))
  blocks = padded.reshape(batch, count, CHUNK, *trailing).swapaxes(0, 1)
  out = jax.lax.map(jax.checkpoint(lambda block: attend(block, key, value)), blocks)
  return out.swapaxes(0, 1).reshape(batch, count * CHUNK, *trailing)[:, :tokens]


def _head(query: Array, key: Array, value: Array) -> Array:
  """Attention of one head: [B, N, D], [B, M, D] and [B, M, D] to [B, N, D].

  Not for one key, for which the gradient of the scores is exactly 0 only if the weights are normalized first.
  """
  high = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum("bnd,bmd->bnm", query, key, preferred_element_type=high) * query.shape[-1] ** -0.5
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  # Normalized after the product, which has fewer elements than the weights.
  product = jnp.einsum("bnm,bmd->bnd", weights.astype(value.dtype), value, preferred_element_type=high)
  return (product / weights.sum(axis=-1, keepdims=True)).astype(value.dtype)


def _splash(query: Array, key: Array, value: Array, *, interpret: bool = False) -> Array:
  """Calls the kernel; on a mesh by `shard_map` over rows, since XLA cannot partition kernels."""
  call = functools.partial(_splash_here, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual)
  count = math.prod(mesh.shape[name] for name in axes)
  if count == 1:
    return call(query, key, value)
  rows = PartitionSpec(axes) if query.shape[0] % count == 0 else PartitionSpec()
  return jax.shard_map(call, in_specs=rows, out_specs=rows, check_vma=False)(query, key, value)


def _splash_here(query: Array, key: Array, value: Array, *, interpret: bool) -> Array:
  """The Pallas kernel for TPUs, which stores no scores. Pads tokens with zeros to full blocks, and widths to 128."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  tokens, heads, width = query.shape[1:]
  q_block, kv_block = (min(BLOCK, n + -n % 128) for n in (tokens, key.shape[1]))
  fill = lambda x, block: jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, -width % 128))).swapaxes(1, 2)
  q = fill(query * width**-0.5, q_block)  # [B, heads, N, lanes]
  k, v = fill(key, kv_block), fill(value, kv_block)
  full = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2])) for _ in range(heads)])
  options: Fields = {"residual_checkpoint_name": RESULT, "interpret": interpret}
  sizes: Fields = {name: q_block if name.startswith("block_q") else kv_block for name in _BLOCKS}
  attend = kernel.make_splash_mha_single_device(mask=full, block_sizes=kernel.BlockSizes(**sizes), **options)
  # Queries attend to the keys of their segment. Padding queries share that of the real keys: no softmax is empty.
  segments: Any = None
  if k.shape[2] > key.shape[1]:
    real = np.arange(k.shape[2]) < key.shape[1]
    ids: Any = np.zeros(q.shape[2], np.int32), (~real).astype(np.int32)
    segments = kernel.SegmentIds(*ids)
  out: Any = jax.vmap(lambda *qkv: attend(*qkv, segments))(q, k, v)
  return out.swapaxes(1, 2)[:, :tokens, :, :width].astype(query.dtype)  # [B, N, heads, D]


# Of the forward pass, the gradient of keys and values, and the gradient of queries.
_BLOCKS = (
  *("block_q", "block_kv", "block_kv_compute"),
  *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
)
