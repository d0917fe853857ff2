"""UNet, VAE encoder and CLIP text encoder against the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import oracle
from vpd_jax import params as params_lib
from vpd_jax.backbones import clip, unet, vae
from vpd_jax.backbones.layers import timestep_embedding

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}
TINY_UNET = unet.UNetSizes(model_channels=32, context_dim=64)
TINY_VAE = vae.VaeSizes(channels=32)
TINY_TEXT = clip.TextSizes(vocab_size=1000, width=64, layers=3, heads=4, mlp_width=256)
PREFIX = {"sd_unet_hier": "model.diffusion_model.", "sd_vae_encoder": "first_stage_model.", "clip_text": ""}


def network(setup, build, size="tiny"):
  """(merge, arrays): the described model and the rebuilt weights under our names."""
  parts = params_lib.describe(lambda: build(rngs=nnx.Rngs(0), **KINDS))
  named = oracle.plain_names(oracle.weights(setup, size), PREFIX[setup])
  named = {n: v for n, v in named.items() if not n.startswith("decoder/")}  # the VAE decoder is not ours
  assert {n: v.shape for n, v in named.items()} == {n: s.shape for n, s in parts.shapes.items()}
  return parts, named


def nhwc(x):
  return jnp.asarray(x.transpose(0, 2, 3, 1))


def check_vae(size, file):
  parts, named = network(
    "sd_vae_encoder", lambda **k: vae.VaeEncoder(TINY_VAE if size == "tiny" else vae.VaeSizes(), **k), size
  )
  arrays = oracle.golden(file) if size == "tiny" else file
  posterior = jax.jit(lambda a, x: parts.merge(a)(x))(named, nhwc(arrays["input/image"]))
  return (
    oracle.compare(oracle.nchw(posterior.mean), arrays, "output/latents", 1e-5),
    oracle.compare(oracle.nchw(posterior.log_variance), arrays, "output/logvar", 1e-5),
  )


def test_vae_encoder_gives_the_authors_latents():
  check_vae("tiny", "sd_vae_encoder.tiny.npz")


def test_clip_text_gives_the_authors_states():
  parts, named = network("clip_text", lambda **k: clip.ClipText(TINY_TEXT, **k))
  arrays = oracle.golden("clip_text.tiny.npz")
  encode = jax.jit(lambda a, x: parts.merge(a)(x))
  for length in (77, 40):
    tokens = next(v for k, v in arrays.items() if k.startswith("input/"))[:, :length]
    states = encode(named, jnp.asarray(tokens))
    oracle.compare(states.last, arrays, f"output/last_hidden_state.{length}", 1e-5)
    oracle.compare(states.pooled, arrays, f"output/pooler_output.{length}", 1e-5)
    if length == 77:
      for i, hidden in enumerate(states.hidden):
        oracle.compare(hidden, arrays, f"tap/hidden_states.{i}", 1e-5)


def test_timestep_embedding_gives_the_authors_sinusoids():
  arrays = oracle.golden("sd_unet_hier.tiny.npz")
  for t, expected in zip(arrays["input/temb_timesteps"], arrays["output/timestep_embedding"], strict=True):
    np.testing.assert_allclose(timestep_embedding(int(t), 32)[0], expected, atol=1.2e-7)
  traced = timestep_embedding(jnp.asarray(arrays["input/temb_timesteps"]), 32)
  np.testing.assert_allclose(traced, arrays["output/timestep_embedding"], atol=2e-5)


@pytest.fixture(scope="module")
def unet_run():
  parts, named = network("sd_unet_hier", lambda **k: unet.UNet(TINY_UNET, **k))
  arrays = oracle.golden("sd_unet_hier.tiny.npz")
  latents, context = nhwc(arrays["input/latents"]), jnp.asarray(arrays["input/context"])

  @jax.jit
  def run(named, latents, context):
    model = parts.merge(named)
    return model(latents, context, timesteps=1, map_max_positions=64), model(
      latents, context, timesteps=jnp.asarray(arrays["input/eps_timesteps"]), predict_noise=True
    ).noise

  return arrays, run(named, latents, context)


def test_unet_gives_the_authors_features(unet_run):
  arrays, (out, noise) = unet_run
  for i, feature in enumerate(out.features):
    oracle.compare(oracle.nchw(feature), arrays, f"output/hier.{i}", 1e-5)
  oracle.compare(oracle.nchw(noise), arrays, "output/eps", 1e-5)


def test_unet_gives_the_authors_attention_maps(unet_run):
  arrays, (out, _) = unet_run
  for i, feature in enumerate(out.features):
    maps = out.maps.get(feature.shape[1:3])
    joined = feature if maps is None else jnp.concatenate([feature, maps], axis=-1)
    oracle.compare(oracle.nchw(joined), arrays, f"output/hier_attn.{i}", 1e-5)
