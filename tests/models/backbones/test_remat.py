"""What a block of the UNet recomputes in the backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import print_saved_residuals

from tests.helpers import tiny
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import attention, unet
from vpd_jax.models.initializers import InitKeys
from vpd_jax.monitoring import xla_cost

SIZES = unet.UNetSizes(model_channels=64, channel_mult=(1,), num_res_blocks=1, attention_levels=(0,), context_dim=16)
SIDE = 32  # 1024 positions at the finest level, from which on attention is chunked on CPU


def gradients(remat):
  """The function (arrays, latents, context) -> gradients of the features' mean, and shapes or values of its inputs."""
  kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
  spec = params_lib.describe(lambda: unet.UNet(SIZES, remat=remat, with_out=False, rngs=InitKeys(0), **kinds))

  def loss(named, latents, context):
    out = spec.merge(named)(latents, context, timesteps=3, map_max_positions=SIDE**2)
    return sum(x.mean() for x in (*out.features, *out.maps.values()))

  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return jax.grad(loss), (tiny.filled(spec.shapes), draw(1, SIDE, SIDE, 4), draw(1, 5, 16))


def test_minimal_repeats_no_convolution_and_no_product_with_weights():
  count = {remat: xla_cost.model_flops(*_flat(remat)) for remat in (None, "minimal", "full")}
  assert count["full"] > 1.25 * count[None]  # a second forward pass
  assert count[None] < count["minimal"] < 1.06 * count[None]  # scores of attention with few positions or few keys


@pytest.mark.parametrize("remat, kept", [("minimal", 2), ("full", 0)])
def test_minimal_keeps_what_the_backward_pass_of_the_fused_kernel_of_tpus_needs(capsys, remat, kept):
  """Its result and the sums of its softmax, without which the kernel would run again."""
  splash = lambda *args: attention._splash(*args, interpret=True)
  query = np.zeros((1, 512, 2, 40), np.float32)
  print_saved_residuals(jax.checkpoint(splash, policy=unet.REMAT_POLICIES[remat]), query, query, query)
  assert capsys.readouterr().out.count("output of jitted function '_splash_attention'") == kept


@pytest.mark.parametrize("remat, calls", [("minimal", 1), ("full", 2)])
def test_minimal_runs_the_fused_kernel_of_gpus_once(monkeypatch, remat, calls):
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *_: True)
  fused = functools.partial(attention.attention, implementation="cudnn")
  loss = lambda *args: jax.checkpoint(fused, policy=unet.REMAT_POLICIES[remat])(*args).astype(jnp.float32).sum()
  shape = jax.ShapeDtypeStruct((1, 512, 2, 40), jnp.bfloat16)
  text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape))
  assert text.count(f"{attention.CUDNN_PRIMITIVE}[") == calls


def _flat(remat):
  function, arguments = gradients(remat)
  return function, *arguments


def test_minimal_changes_no_gradient():
  plain, again = (jax.jit(function)(*arguments) for function, arguments in map(gradients, (None, "minimal")))
  for name, value in plain.items():
    np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)
