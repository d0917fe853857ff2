"""UNet, VAE encoder and CLIP text encoder against the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle
from vpd_jax.convert.rules import Rule, to_source
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import clip_text, unet, vae
from vpd_jax.models.backbones.layers import timestep_embedding
from vpd_jax.models.initializers import InitKeys

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}
TINY_UNET = unet.UNetSizes(model_channels=32, context_dim=64)
TINY_VAE = vae.VaeSizes(channels=32)
TINY_TEXT = clip_text.TextSizes(vocab_size=1000, width=64, layers=3, heads=4, mlp_width=256)
PREFIX = {"sd_unet_hier": "model.diffusion_model.", "sd_vae_encoder": "first_stage_model.", "clip_text": ""}


def network(setup, build, size="tiny"):
  """(merge, arrays): the described model and the rebuilt weights under our names."""
  parts = params_lib.describe(lambda: build(rngs=InitKeys(0), **KINDS))
  named = oracle.plain_names(oracle.weights(setup, size), PREFIX[setup])
  named = {n: v for n, v in named.items() if not n.startswith("decoder/")}  # the VAE decoder is not ours
  assert {n: v.shape for n, v in named.items()} == {n: s.shape for n, s in parts.shapes.items()}
  return parts, named


def nhwc(x):
  return jnp.asarray(x.transpose(0, 2, 3, 1))


def vae_taps(model, image):
  """The encoder's modules one after the other, with what each gives under the authors' names."""
  taps, encoder = {}, model.encoder

  def keep(name, x):
    taps[f"tap/{name}"] = x
    return x

  x = keep("encoder.conv_in", encoder.conv_in(image))
  for i, level in enumerate(encoder.down):
    for j, block in enumerate(level.block):
      x = keep(f"encoder.down.{i}.block.{j}", block(x))
    if level.downsample:
      x = keep(f"encoder.down.{i}.downsample", level.downsample(x))
  for name in ("block_1", "attn_1", "block_2"):
    x = keep(f"encoder.mid.{name}", getattr(encoder.mid, name)(x))
  x = keep("encoder.conv_out", encoder.conv_out(jax.nn.silu(encoder.norm_out(x))))
  keep("quant_conv", model.quant_conv(x))
  return taps


def test_vae_encoder_gives_the_authors_latents_and_taps():
  parts, named = network("sd_vae_encoder", lambda **k: vae.VaeEncoder(TINY_VAE, **k))
  arrays = oracle.golden("sd_vae_encoder.tiny.npz")
  image = nhwc(arrays["input/image"])
  posterior, taps = jax.jit(lambda a, x: (parts.merge(a)(x), vae_taps(parts.merge(a), x)))(named, image)
  oracle.compare(oracle.nchw(posterior.mean), arrays, "output/latents", 1e-5)
  oracle.compare(oracle.nchw(posterior.log_variance), arrays, "output/logvar", 1e-5)
  stored = {name.partition("@")[0] for name in arrays if name.startswith("tap/")}
  assert stored == set(taps)
  for name, value in taps.items():
    oracle.compare(oracle.nchw(value), arrays, name, 1e-5)


def test_latents_in_bfloat16_are_the_authors_within_its_rounding():
  """Twenty layers of 8 bits each, norms and softmax in float32: 1.8 % of the latents' spread was seen."""
  kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
  parts = params_lib.describe(lambda: vae.VaeEncoder(TINY_VAE, rngs=InitKeys(0), **kinds))
  _, named = network("sd_vae_encoder", lambda **k: vae.VaeEncoder(TINY_VAE, **k))
  arrays = oracle.golden("sd_vae_encoder.tiny.npz")
  mean = jax.jit(lambda a, x: parts.merge(a)(x).mean)(named, nhwc(arrays["input/image"]))
  assert mean.dtype == jnp.bfloat16
  expected = arrays["output/latents"]
  error = np.abs(oracle.nchw(mean.astype(jnp.float32)) - expected)
  assert np.sqrt((error**2).mean()) <= 0.025 * expected.std()
  assert error.max() <= 0.05 * np.abs(expected).max()


def test_clip_text_gives_the_authors_states():
  parts, named = network("clip_text", lambda **k: clip_text.ClipText(TINY_TEXT, **k))
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
  """Stored arrays; output with maps, noise and blocks; loss of the recipe and its gradients."""
  parts, named = network("sd_unet_hier", lambda **k: unet.UNet(TINY_UNET, **k))
  return run_unet(parts, named, oracle.golden("sd_unet_hier.tiny.npz"))


def run_unet(parts, named, arrays):
  latents, context = nhwc(arrays["input/latents"]), jnp.asarray(arrays["input/context"])
  positions = latents.shape[1] * latents.shape[2] // 4
  original = unet.UNet._run

  def loss(named, latents, context):
    blocks = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(unet.UNet, "_run", lambda self, *args: (blocks.append(original(self, *args)), blocks[-1])[1])
      out = parts.merge(named)(latents, context, timesteps=1, map_max_positions=positions)
    joined = []
    for feature in out.features:
      maps = out.maps.get(feature.shape[1:3])  # the authors' maps carry no gradient
      joined.append(feature if maps is None else jnp.concatenate([feature, jax.lax.stop_gradient(maps)], axis=-1))
    return sum(
      (x.transpose(0, 3, 1, 2) * fill.normal(f"probe/hier.{i}", (x.shape[0], x.shape[3], *x.shape[1:3]), 0)).mean()
      for i, x in enumerate(joined)
    ), (joined, [x for x, _ in blocks])

  @jax.jit
  def run(named, latents, context):
    (value, (joined, blocks)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(named, latents, context)
    steps = jnp.asarray(arrays["input/eps_timesteps"])
    noise = parts.merge(named)(latents, context, timesteps=steps, predict_noise=True).noise
    return value, joined, blocks, noise, grads

  return arrays, run(named, latents, context)


def check_unet_features(arrays, joined, noise, limit=1e-5):
  for i, feature in enumerate(joined):
    oracle.compare(oracle.nchw(feature), arrays, f"output/hier_attn.{i}", limit)
    width = TINY_UNET.widths[i] if feature.shape[0] == 2 else unet.UNetSizes().widths[i]
    oracle.compare(oracle.nchw(feature[..., :width]), arrays, f"output/hier.{i}", limit)
  oracle.compare(oracle.nchw(noise), arrays, "output/eps", limit)


def test_unet_gives_the_authors_features_maps_and_noise(unet_run):
  arrays, (_, joined, _, noise, _) = unet_run
  check_unet_features(arrays, joined, noise)


def test_unet_blocks_give_the_authors_taps(unet_run):
  arrays, (_, _, blocks, _, _) = unet_run
  names = [*(f"input_blocks.{i}" for i in range(12)), "middle_block", *(f"output_blocks.{i}" for i in range(12))]
  for name, block in zip(names, blocks, strict=True):
    oracle.compare(oracle.nchw(block), arrays, f"tap/unet.{name}", 1e-5)


def check_unet_gradients(arrays, value, grads, limit):
  """Loss, every parameter's gradient norm and probe, which get none, gradients of the inputs; returns the worst."""
  of_params, of_latents, of_context = grads
  assert abs(float(value) - float(arrays["train/loss"])) < 2e-5
  source = to_source(of_params, [Rule(PREFIX["sd_unet_hier"][:-1], "unet")])
  total, worst = float(arrays["train/grad_total_l2"]), 0.0
  names = [str(name) for name in arrays["train/grad_names"]]
  none = {str(name) for name in arrays["train/no_grad_names"]}
  assert set(source) == set(names) | none
  assert all(not np.any(source[name]) for name in none)
  for name, l2, probe in zip(names, arrays["train/grad_l2"], arrays["train/grad_probe"], strict=True):
    g = np.asarray(source[name], np.float64)
    along = fill.normal("probe/" + name, g.shape, 0)
    worst = max(worst, abs(np.linalg.norm(g) - l2) / total, abs((g * along).sum() - probe) / total)
  assert worst < limit, f"{worst:.2e}"
  oracle.compare(oracle.nchw(of_latents), arrays, "train/grad_input/latents", 1e-3)
  oracle.compare(of_context, arrays, "train/grad_input/context", 1e-3)
  return worst


def test_every_unet_gradient_is_the_authors(unet_run):
  arrays, (value, _, _, _, grads) = unet_run
  named = {"unet/" + name: g for name, g in grads[0].items()}
  check_unet_gradients(arrays, value, (named, *grads[1:]), 1e-3)


@pytest.mark.slow
def test_full_size_vae_encoder_gives_the_authors_latents(full_oracle):
  parts, named = network("sd_vae_encoder", lambda **k: vae.VaeEncoder(vae.VaeSizes(), **k), "full")
  arrays = full_oracle("sd_vae_encoder")
  shape = [int(arrays["output/latents"].shape[0]), 3, *(8 * side for side in arrays["output/latents"].shape[2:])]
  image = nhwc(fill.uniform("input/image", shape, 0, -1, 1))
  posterior = jax.jit(lambda a, x: parts.merge(a)(x))(named, image)
  worst = [
    oracle.compare(oracle.nchw(posterior.mean), arrays, "output/latents", 1e-5),
    oracle.compare(oracle.nchw(posterior.log_variance), arrays, "output/logvar", 1e-5),
  ]
  print(f"full-size VAE encoder: {max(worst):.1e} of the largest value")


@pytest.mark.slow
def test_full_size_unet_gives_the_authors_features_and_gradients(full_oracle):
  parts, named = network("sd_unet_hier", lambda **k: unet.UNet(unet.UNetSizes(), **k), "full")
  arrays, (value, joined, _, noise, grads) = run_unet(parts, named, full_oracle("sd_unet_hier"))
  check_unet_features(arrays, joined, noise)
  worst = check_unet_gradients(arrays, value, ({"unet/" + n: g for n, g in grads[0].items()}, *grads[1:]), 1e-3)
  print(
    f"full-size UNet: loss {float(value) - float(arrays['train/loss']):.1e}, gradients {worst:.1e} of the total norm"
  )
