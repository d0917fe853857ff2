"""Every implementation of attention gives the same numbers and gradients; the chunked one takes less memory."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill
from vpd_jax.distributed import sharding
from vpd_jax.models.backbones import attention as module
from vpd_jax.models.backbones.attention import attention, attention_with_map, masked_attention

BATCH, HEADS, WIDTH = 2, 3, 8


def inputs(tokens, keys=None, dtype=jnp.float32, batch=BATCH, heads=HEADS, width=WIDTH):
  sizes = {"query": tokens, "key": keys or tokens, "value": keys or tokens}
  return tuple(jnp.asarray(fill.normal(name, (batch, n, heads, width), 0), dtype) for name, n in sizes.items())


def restated(query, key, value, mask=None):
  """The formula in float64, head by head."""
  q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
  out, maps = np.zeros(q.shape), []
  for b, h in np.ndindex(q.shape[0], q.shape[2]):
    scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[3])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * (1 if mask is None else mask)
    weights /= weights.sum(-1, keepdims=True)
    out[b, :, h] = weights @ v[b, :, h]
    maps.append(weights)
  return out, np.stack(maps).reshape(q.shape[0], q.shape[2], *maps[0].shape).mean(1)


# One block, whole blocks, a last block of one query, a last block of 188; as many keys, fewer, one.
TOKENS = [(5, 5), (256, 256), (512, 7), (257, 257), (700, 1)]


@pytest.mark.parametrize("implementation", ["xla", "chunked", "auto"])
@pytest.mark.parametrize("tokens, keys", TOKENS)
def test_attention_is_its_formula(implementation, tokens, keys):
  args = inputs(tokens, keys)
  actual = jax.jit(lambda *a: attention(*a, implementation=implementation))(*args)
  np.testing.assert_allclose(actual, restated(*args)[0], rtol=1e-5, atol=1e-5)


def gradients(implementation, args):
  weights = fill.normal("cotangent", args[0].shape, 0)
  loss = lambda *a: (attention(*a, implementation=implementation) * weights).sum()
  return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)


@pytest.mark.parametrize("tokens, keys", TOKENS)
def test_gradients_of_chunked_are_those_of_xla(tokens, keys):
  args = inputs(tokens, keys)
  for name, xla, chunked in zip("qkv", *(gradients(i, args) for i in ("xla", "chunked")), strict=True):
    np.testing.assert_allclose(chunked, xla, rtol=0, atol=1e-5 * np.abs(xla).max() + 1e-7, err_msg=name)


# 64 and 320 tokens, the UNet's coarsest level at 512 x 512 and a finer one at 512 x 640, do not fill blocks of 128.
@pytest.mark.parametrize("tokens, keys, width", [(256, 128, 40), (64, 64, 160), (320, 320, 40), (257, 7, 8)])
def test_the_splash_kernel_interpreted_is_xla(tokens, keys, width):
  args = inputs(tokens, keys, batch=1, heads=2, width=width)
  actual = module._splash(*args, interpret=True)
  np.testing.assert_allclose(actual, attention(*args, implementation="xla"), rtol=1e-5, atol=1e-5)


def test_gradients_of_the_splash_kernel_interpreted_are_those_of_xla(monkeypatch):
  splash = module._splash
  monkeypatch.setattr(module, "_splash", lambda *args: splash(*args, interpret=True))
  args = inputs(200, 140, batch=1, heads=2)
  for xla, kernel in zip(*(gradients(i, args) for i in ("xla", "splash")), strict=True):
    np.testing.assert_allclose(kernel, xla, rtol=0, atol=1e-5 * np.abs(xla).max())


@pytest.mark.multidevice
@pytest.mark.parametrize("batch", [8, 3], ids=["a row each", "rows that do not divide"])
def test_on_a_mesh_every_device_runs_the_splash_kernel_on_its_rows(batch, monkeypatch):
  seen, here = [], module._splash_here
  monkeypatch.setattr(module, "_splash_here", lambda *args, **kw: seen.append(args[0].shape) or here(*args, **kw))
  mesh = sharding.make_mesh(2, 4)
  args = inputs(200, 140, batch=batch, heads=2)

  def attend(*args):
    with sharding.tracing(mesh):
      return module._splash(*args, interpret=True)

  expected = attention(*args, implementation="xla")
  placed = jax.device_put(args, sharding.batch_sharding(mesh) if batch == 8 else sharding.replicated(mesh))
  np.testing.assert_allclose(jax.jit(attend)(*placed), expected, rtol=1e-5, atol=1e-5)
  assert [shape[0] for shape in seen] == [1 if batch == 8 else batch]


@pytest.mark.x64
@pytest.mark.parametrize("implementation", ["xla", "chunked", "auto"])
def test_float64_stays_float64(implementation):
  args = inputs(300, dtype=jnp.float64)
  actual = attention(*args, implementation=implementation)
  assert actual.dtype == jnp.float64
  np.testing.assert_allclose(actual, restated(*args)[0], rtol=0, atol=1e-14)


@pytest.mark.x64
def test_gradients_in_float64_agree_to_the_last_digits():
  args = inputs(300, dtype=jnp.float64)
  for xla, chunked in zip(*(gradients(i, args) for i in ("xla", "chunked")), strict=True):
    np.testing.assert_allclose(chunked, xla, rtol=0, atol=1e-13)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_bfloat16_has_a_float32_softmax_and_a_bfloat16_result(implementation):
  args = inputs(300, dtype=jnp.bfloat16)
  actual = attention(*args, implementation=implementation)
  assert actual.dtype == jnp.bfloat16
  assert module._probabilities(args[0], args[1]).dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(actual, np.float32), restated(*args)[0], atol=2e-2)


# On CPU few keys are cut too; the fused kernels are for long self-attention.
@pytest.mark.parametrize("tokens, keys, width, backend, expected", [
  (1023, 1023, 40, "cpu", "xla"), (1024, 1024, 40, "cpu", "chunked"), (4096, 1, 40, "cpu", "chunked"),
  (1023, 1023, 40, "gpu", "xla"), (1024, 1024, 80, "gpu", "cudnn"), (4096, 50, 40, "gpu", "xla"),
  (4096, 4096, 512, "gpu", "chunked"), (1024, 1024, 80, "tpu", "xla"), (4096, 4096, 40, "tpu", "splash"),
  (4096, 50, 40, "tpu", "xla"), (4096, 4096, 40, "something new", "xla"),
])  # fmt: skip
def test_auto_takes_the_kernel_of_the_platform_for_long_self_attention(
  tokens, keys, width, backend, expected, monkeypatch
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", compute_capability="9.0")])
  query, key = (jax.ShapeDtypeStruct((1, n, 8, width), jnp.bfloat16) for n in (tokens, keys))
  assert module._best(query, key) == expected


@pytest.mark.parametrize("dtype, capability", [(jnp.float32, "9.0"), (jnp.bfloat16, "7.0"), (jnp.bfloat16, None)])
def test_auto_cuts_long_self_attention_where_the_fused_kernel_does_not_take_it(dtype, capability, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", compute_capability=capability)])
  query, short = (jax.ShapeDtypeStruct((1, tokens, 8, 40), dtype) for tokens in (4096, 256))
  assert module._best(query, query) == "chunked"
  assert module._best(short, short) == module._best(query, short) == "xla"


def test_an_unknown_implementation_names_the_known_ones():
  with pytest.raises(ValueError, match=r"attention='flash' is unknown; choose one of \('auto', 'xla', 'chunked', "):
    attention(*inputs(4), implementation="flash")


def test_chunked_takes_less_memory_than_xla():
  shape = jax.ShapeDtypeStruct((1, 2048, 8, 40), jnp.float32)

  def temporary(implementation):
    """Bytes that the compiled forward and backward pass need beside arguments and results."""
    loss = lambda *a: attention(*a, implementation=implementation).sum()
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

  xla, chunked = temporary("xla"), temporary("chunked")
  assert xla > 8 * 2048 * 2048 * 4  # all scores
  assert chunked < xla / 4, (chunked, xla)


def test_the_map_is_the_mean_of_the_probabilities_over_the_heads():
  args = inputs(6, 4)
  out, probabilities = attention_with_map(*args)
  expected, mean = restated(*args)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(probabilities, mean, rtol=1e-5)
  np.testing.assert_allclose(probabilities.sum(-1), np.ones((BATCH, 6)), rtol=1e-6)


def test_a_masked_key_is_not_seen():
  args = inputs(6)
  mask = np.tril(np.ones((6, 6), bool))
  np.testing.assert_allclose(masked_attention(*args, mask), restated(*args, mask)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.accelerator
def test_cudnn_on_a_gpu_is_xla():
  args = inputs(256, dtype=jnp.bfloat16, width=64)
  actual, expected = (np.asarray(attention(*args, implementation=i), np.float32) for i in ("cudnn", "xla"))
  np.testing.assert_allclose(actual, expected, atol=2e-2)
