"""A folder that diffusers itself has written, converted and run in our networks."""

import jax
import numpy as np
import pytest
from flax import nnx

from vpd_jax import params as params_lib
from vpd_jax.backbones import clip, unet, vae
from vpd_jax.convert import load, stable_diffusion

pytestmark = [
  pytest.mark.reference,
  pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

LEVELS = 3
VARIANTS = {
  "sd1": {"attention_head_dim": 4, "use_linear_projection": False},
  "sd2": {"attention_head_dim": [2, 4, 4], "use_linear_projection": True},
}


def randomize(torch, *modules):
  """Zero-initialised convolutions would hide a wrong place."""
  for module in modules:
    for parameter in module.parameters():
      torch.nn.init.normal_(parameter, std=0.08 if parameter.ndim > 1 else 0.3)


@pytest.fixture(scope="module", params=VARIANTS)
def pipeline(request, tmp_path_factory):
  """(folder, UNet, VAE, text encoder): networks of diffusers and transformers, and what they save."""
  import torch
  from diffusers import AutoencoderKL, UNet2DConditionModel
  from transformers import CLIPTextConfig, CLIPTextModel

  torch.manual_seed(0)
  net = UNet2DConditionModel(
    sample_size=16,
    down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    block_out_channels=(32, 64, 64),
    layers_per_block=2,
    cross_attention_dim=24,
    **VARIANTS[request.param],
  )
  autoencoder = AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(32, 64),
    layers_per_block=1,
  )
  sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
  text = CLIPTextModel(CLIPTextConfig(vocab_size=99, eos_token_id=98, bos_token_id=97, **sizes))
  randomize(torch, net, autoencoder, text)
  folder = tmp_path_factory.mktemp(request.param)
  for part, module in (("unet", net), ("vae", autoencoder), ("text_encoder", text)):
    module.eval().save_pretrained(folder / part, safe_serialization=request.param == "sd1")
  return folder, net, autoencoder, text


def described(build):
  kinds = {"dtype": np.float32, "param_dtype": np.float32}
  return params_lib.describe(lambda: build(rngs=nnx.Rngs(0), **kinds))


def below(named, prefix):
  return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def converted(pipeline):
  folder, *_ = pipeline
  sizes = stable_diffusion.sizes(folder)
  parts = {
    "method/unet/": described(lambda **kinds: unet.UNet(unet.UNetSizes(**sizes["unet"]), **kinds)),
    "method/vae/": described(lambda **kinds: vae.VaeEncoder(vae.VaeSizes(**sizes["vae"]), **kinds)),
  }
  targets = {prefix + name: shape for prefix, part in parts.items() for name, shape in part.shapes.items()}
  named, report = load.load_pretrained(folder, targets)
  assert report.table == load.detect(folder) == "diffusers" and report.fresh == ()
  return {prefix: (part, below(named, prefix)) for prefix, part in parts.items()}


def close(ours, theirs):
  theirs = theirs.numpy().transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs.numpy()
  assert ours.shape == theirs.shape
  assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_the_unet_predicts_the_same_noise(pipeline, converted):
  import torch

  _, net, _, _ = pipeline
  part, named = converted["method/unet/"]
  latents, context, times = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 24), torch.tensor([3, 700])
  with torch.no_grad():
    expected = net(latents, times, context).sample

  @jax.jit
  def run(named, latents, context, times):
    return part.merge(named)(latents, context, timesteps=times, predict_noise=True).noise

  close(run(named, latents.numpy().transpose(0, 2, 3, 1), context.numpy(), times.numpy().astype(np.int32)), expected)


def test_the_vae_encodes_the_same_latents(pipeline, converted):
  import torch

  _, _, autoencoder, _ = pipeline
  part, named = converted["method/vae/"]
  image = torch.randn(2, 3, 32, 32)
  with torch.no_grad():
    expected = autoencoder.encode(image).latent_dist.mean
  close(jax.jit(lambda n, x: part.merge(n)(x).mean)(named, image.numpy().transpose(0, 2, 3, 1)), expected)


def test_the_text_encoder_gives_the_same_states(pipeline):
  import torch

  folder, _, _, text = pipeline
  sizes = stable_diffusion.sizes(folder)["text"]
  part = described(lambda **kinds: clip.ClipText(clip.TextSizes(**sizes), **kinds))
  named, _ = load.load_text_encoder(folder, part.shapes)
  tokens = np.full((2, 77), 98, np.int32)
  tokens[:, :6] = np.random.default_rng(0).integers(0, 97, (2, 6))
  with torch.no_grad():
    expected = text(torch.from_numpy(tokens.astype(np.int64))).last_hidden_state
  close(jax.jit(lambda n, x: part.merge(n)(x).last)(named, tokens), expected)
