"""A tiny pipeline of diffusers and transformers, saved by them for PyTorch and for Flax, converted and run in ours.

Three levels at the most: latents of 8x12 halve only twice; where a level is odd, diffusers cuts what it enlarges, VPD
resizes what it joins to it.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpd_jax.convert import load
from vpd_jax.convert.tables import clip, stable_diffusion
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import clip_text, unet, vae
from vpd_jax.models.initializers import InitKeys

pytestmark = [
  pytest.mark.reference,
  pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

VARIANTS = {
  "sd1": {"layers_per_block": 1, "attention_head_dim": 8, "use_linear_projection": False},
  "sd2": {"layers_per_block": 2, "attention_head_dim": [2, 4, 4], "use_linear_projection": True},
}
FORMS = ("torch", "flax")
LATENTS = ((8, 12), (12, 8))
ACTIVE = 3.0  # What the inputs of every GELU must reach, either way: only there do its exact and tanh forms differ.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def quiet():
  """Both libraries log, module by module, that their Flax classes will go."""
  import diffusers
  import transformers

  logs = (diffusers.utils.logging, transformers.utils.logging)
  before = [log.get_verbosity() for log in logs]
  for log in logs:
    log.set_verbosity_error()
  yield
  for log, level in zip(logs, before, strict=True):
    log.set_verbosity(level)


def randomize(*modules):
  """No weight zero, no bias or scale at its default; signals keep their size, and the gates of GEGLU are wide."""
  import torch

  for module in modules:
    for name, parameter in module.named_parameters():
      if parameter.ndim > 1:
        wide = 1.5 if "ff.net.0" in name or "fc1" in name else 0.7
        embedding = "_embedding" in name
        torch.nn.init.normal_(parameter, std=1.0 if embedding else wide / parameter[0].numel() ** 0.5)
      else:
        torch.nn.init.normal_(parameter, std=0.1, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0)


@pytest.fixture(scope="module", params=VARIANTS)
def pipeline(request, tmp_path_factory):
  """(PyTorch's networks by folder, Flax's networks with their parameters, form -> folder)."""
  import torch
  from diffusers import AutoencoderKL, FlaxAutoencoderKL, FlaxUNet2DConditionModel, UNet2DConditionModel
  from diffusers.models.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax
  from transformers import CLIPTextConfig, CLIPTextModel, FlaxCLIPTextModel

  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp(request.param)
  nets = {
    "unet": UNet2DConditionModel(
      sample_size=16,
      down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
      up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
      block_out_channels=(32, 64, 64),
      cross_attention_dim=32,
      **VARIANTS[request.param],
    ),
    "vae": AutoencoderKL(
      down_block_types=("DownEncoderBlock2D",) * 2,
      up_block_types=("UpDecoderBlock2D",) * 2,
      block_out_channels=(32, 64),
      layers_per_block=1,
    ),
    "text_encoder": CLIPTextModel(
      CLIPTextConfig(
        vocab_size=99,
        eos_token_id=98,
        bos_token_id=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="quick_gelu" if request.param == "sd1" else "gelu",
      )
    ),
  }
  randomize(*nets.values())
  for part, net in nets.items():
    net.eval().save_pretrained(folder / "torch" / part, safe_serialization=request.param == "sd1")
  flax = {}
  for part, kind in (("unet", FlaxUNet2DConditionModel), ("vae", FlaxAutoencoderKL)):
    model = kind.from_config(nets[part].config)
    init = model.init_weights
    object.__setattr__(model, "init_weights", functools.partial(jax.eval_shape, init))  # Only names and shapes matter.
    flax[part] = model, convert_pytorch_state_dict_to_flax(nets[part].state_dict(), model)
    model.save_pretrained(folder / "flax" / part, params=flax[part][1])
  text = FlaxCLIPTextModel.from_pretrained(folder / "torch" / "text_encoder", from_pt=True)
  text.save_pretrained(folder / "flax" / "text_encoder")
  flax["text_encoder"] = text, text.params
  return nets, flax, {form: folder / form for form in FORMS}


def described(build):
  kinds = {"dtype": np.float32, "param_dtype": np.float32}
  return params_lib.describe(lambda: build(rngs=InitKeys(0), **kinds))


def below(named, prefix):
  return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def converted(pipeline):
  """form -> folder of a network -> (our network, its arrays)."""
  result = {}
  for form, folder in pipeline[2].items():
    sizes = stable_diffusion.sizes(folder)
    ours = {
      "unet": described(lambda **kinds: unet.UNet(unet.UNetSizes(**sizes["unet"]), **kinds)),  # noqa: B023
      "vae": described(lambda **kinds: vae.VaeEncoder(vae.VaeSizes(**sizes["vae"]), **kinds)),  # noqa: B023
      "text_encoder": described(lambda **kinds: clip_text.ClipText(clip_text.TextSizes(**sizes["text"]), **kinds)),  # noqa: B023
    }
    targets = {f"method/{part}/{name}": s for part in ("unet", "vae") for name, s in ours[part].shapes.items()}
    named, report = load.load_pretrained(folder, targets)
    assert report.table == "diffusers" and report.fresh == ()
    text = clip.load_text(folder, ours["text_encoder"].shapes)
    arrays = {part: below(named, f"method/{part}/") for part in ("unet", "vae")} | {"text_encoder": text}
    result[form] = {part: (ours[part], arrays[part]) for part in ours}
  return result


def test_both_forms_give_the_same_bits(pipeline, converted):
  nets, _, folders = pipeline
  for part, net in nets.items():
    files = {form: {file.suffix for file in (folders[form] / part).iterdir()} for form in FORMS}
    assert ".msgpack" in files["flax"] and ".msgpack" not in files["torch"], files
    (_, first), (_, second) = (converted[form][part] for form in FORMS)
    assert first.keys() == second.keys()
    for name, value in first.items():
      assert (value.dtype, value.shape) == (second[name].dtype, second[name].shape), name
      assert value.tobytes() == second[name].tobytes(), name
    held = sum(p.numel() for name, p in net.named_parameters() if "decoder" not in name)
    assert sum(value.size for value in first.values()) == held, "every number of theirs is in ours"


def gap(ours, theirs):
  """The largest difference, in terms of the largest number."""
  theirs = np.asarray(theirs)
  assert ours.shape == theirs.shape
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@contextlib.contextmanager
def active(net, layers):
  """Checks that the inputs of each of these layers' activations reach ACTIVE on both sides."""
  reached, hooks = {}, []
  for name, module in net.named_modules():
    if name.endswith(layers):
      # GEGLU's second half is what goes through GELU.
      take = lambda x: x.chunk(2, -1)[1] if layers.endswith("proj") else x
      note = lambda _, __, out, name=name, take=take: reached.update({name: (take(out).min(), take(out).max())})
      hooks.append(module.register_forward_hook(note))
  yield
  assert reached and all(low < -ACTIVE and high > ACTIVE for low, high in reached.values()), reached
  for hook in hooks:
    hook.remove()


def nhwc(tensor):
  return tensor.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("size", LATENTS, ids=str)
def test_the_unet_predicts_the_same_noise(pipeline, converted, size, record_property):
  import torch

  nets, flax, _ = pipeline
  part, named = converted["flax"]["unet"]
  torch.manual_seed(1)
  # Small timesteps: at 700 the sines alone, of float32 arguments, are 4e-5 apart.
  latents, context, times = torch.randn(2, 4, *size), torch.randn(2, 5, 32), torch.tensor([1, 100])
  with torch.no_grad(), active(nets["unet"], "ff.net.0.proj"):
    expected = nets["unet"](latents, times, context).sample

  @jax.jit
  def run(named, latents, context, times):
    return part.merge(named)(latents, context, timesteps=times, predict_noise=True).noise

  ours = run(named, nhwc(latents), context.numpy(), times.numpy().astype(np.int32))
  assert gap(ours, nhwc(expected)) <= TOLERANCE
  if size == LATENTS[0]:
    model, params = flax["unet"]
    with jax.numpy_rank_promotion("allow"):
      other = jax.jit(lambda p, *x: model.apply({"params": p}, *x).sample)(
        params, latents.numpy(), jnp.asarray(times.numpy(), jnp.int32), context.numpy()
      )
    state_gap(record_property, "UNet", gap(ours, np.asarray(other).transpose(0, 2, 3, 1)))


def state_gap(record_property, network, found):
  """Flax's classes take the tanh form of GELU: the difference is told, not bounded."""
  record_property(f"gap to Flax, {network}", float(found))
  print(f"{network}: {found:.1e} of the largest number from Flax's own forward pass")


@pytest.mark.parametrize("size", [(16, 24), (24, 16)], ids=str)
def test_the_vae_encodes_the_same_latents(pipeline, converted, size, record_property):
  import torch

  nets, flax, _ = pipeline
  part, named = converted["flax"]["vae"]
  torch.manual_seed(2)
  image = torch.randn(2, 3, *size)
  with torch.no_grad():
    expected = nets["vae"].encode(image).latent_dist.mean
  ours = jax.jit(lambda n, x: part.merge(n)(x).mean)(named, nhwc(image))
  assert ours.shape[1:3] == (size[0] // 2, size[1] // 2)
  assert gap(ours, nhwc(expected)) <= TOLERANCE
  if size == (16, 24):
    model, params = flax["vae"]
    encode = lambda p, x: model.apply({"params": p}, x, method=model.encode).latent_dist.mean
    with jax.numpy_rank_promotion("allow"):
      state_gap(record_property, "VAE", gap(ours, jax.jit(encode)(params, image.numpy())))


def test_the_text_encoder_gives_the_same_states(pipeline, converted, record_property):
  import torch

  nets, flax, _ = pipeline
  part, named = converted["flax"]["text_encoder"]
  tokens = np.full((2, 77), 98, np.int32)
  tokens[:, :6] = np.random.default_rng(0).integers(0, 97, (2, 6))
  with torch.no_grad(), active(nets["text_encoder"], "fc1"):
    expected = nets["text_encoder"](torch.from_numpy(tokens.astype(np.int64))).last_hidden_state
  ours = jax.jit(lambda n, x: part.merge(n)(x).last)(named, tokens)
  assert gap(ours, expected) <= TOLERANCE
  model, params = flax["text_encoder"]
  with jax.numpy_rank_promotion("allow"):
    state_gap(record_property, "text encoder", gap(ours, model(jnp.asarray(tokens), params=params).last_hidden_state))
