"""A small pipeline of Stable Diffusion 2.1's build, as diffusers saves it and as a single file, against PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import single_file, text_folders
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import stable_diffusion

pytestmark = [
  pytest.mark.reference,
  pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

LEVELS, BLOCKS, LAYERS, WIDTH = 4, 2, 3, 128
SENTENCES = ("the photo of a room", "a room")
SOURCES = ("folder", "file")
TOLERANCE = 1e-5


def randomize(*modules):
  """No weight zero, no bias or scale at its default; signals keep their size."""
  import torch

  for module in modules:
    for name, parameter in module.named_parameters():
      if parameter.ndim > 1:
        std = 1.0 if "_embedding." in name and "time" not in name else 0.8 / parameter[0].numel() ** 0.5
        torch.nn.init.normal_(parameter, std=std)
      else:
        torch.nn.init.normal_(parameter, std=0.1, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """(PyTorch's networks by folder, {"folder": .., "file": ..}, a tokenizer that pads as that of SD 1.5)."""
  import torch
  from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
  from transformers import CLIPTextConfig, CLIPTextModel

  torch.manual_seed(0)
  root = tmp_path_factory.mktemp("sd21")
  words = text_folders.text_config(text_folders.SIZES) | {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 256,
    "hidden_act": "gelu", "max_position_embeddings": 77,
  }  # fmt: skip
  nets = {
    "unet": UNet2DConditionModel(
      down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
      up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
      block_out_channels=(64, 128, 128, 128),
      layers_per_block=BLOCKS,
      attention_head_dim=[1, 2, 2, 2],
      cross_attention_dim=WIDTH,
      use_linear_projection=True,
      upcast_attention=True,
    ),
    "vae": AutoencoderKL(
      down_block_types=("DownEncoderBlock2D",) * LEVELS,
      up_block_types=("UpDecoderBlock2D",) * LEVELS,
      block_out_channels=(32, 32, 64, 64),
      layers_per_block=2,
      scaling_factor=0.18215,
    ),
    "text_encoder": CLIPTextModel(CLIPTextConfig(**words)),
  }
  randomize(*nets.values())
  for part, net in nets.items():
    net.eval().save_pretrained(root / "folder" / part)
  DDIMScheduler(prediction_type="v_prediction").save_pretrained(root / "folder" / "scheduler")
  text_folders.write_tokenizer(root / "folder" / "tokenizer")
  marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!"}
  (root / "folder" / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(marks))
  text_folders.write_tokenizer(root / "tokenizer")
  arrays = {part: {name: x.numpy() for name, x in net.state_dict().items()} for part, net in nets.items()}
  state = single_file.unet(arrays["unet"], blocks=BLOCKS, attended=(1, 2, 3)) | single_file.vae(arrays["vae"])
  state |= single_file.text(arrays["text_encoder"], layers=LAYERS)
  write.write(root / "v2-1.safetensors", state)
  return nets, {"folder": root / "folder", "file": root / "v2-1.safetensors"}, root / "tokenizer"


def config_of(pipeline, source, method="tadp"):
  """A run from a source; the single file brings no sizes, so that the config states them."""
  _, sources, tokenizer = pipeline
  config = loader.load(f"configs/nyu_depth.py:{method},sd21").unlock()
  config.init.pretrained = str(sources[source])
  config.head.update(width=8, filters=(8, 8, 8))
  if "width" in config.neck:
    config.neck.width = 32
  if source == "file":
    config.method.tokenizer = str(tokenizer)
    for part, values in stable_diffusion.sizes(sources["folder"]).items():
      config.backbone[part].update({key: value or 0 for key, value in values.items() if key != "padding"})
  return initialize.with_backbone_sizes(config.lock(), config.init.pretrained)


@pytest.fixture(scope="module")
def runs(pipeline):
  """source -> (experiment, arrays by name, lines of the start)."""
  result = {}
  for source in SOURCES:
    config = config_of(pipeline, source)
    exp = experiment.assemble(config)
    result[source] = (exp, *initialize.weights(config, exp))
  return result


def test_both_sources_give_the_same_bits(pipeline, runs):
  nets, sources, _ = pipeline
  (exp, first, lines), (_, second, of_file) = (runs[source] for source in SOURCES)
  assert exp.method.latent_scale == 0.18215
  assert first.keys() == second.keys()
  for name in first:
    assert first[name].tobytes() == second[name].tobytes(), name
  held = {
    part: sum(
      x.numel()
      for n, x in net.named_parameters()
      if "decoder" not in n and not n.startswith(("conv_norm_out", "conv_out"))
    )
    for part, net in nets.items()
  }
  for part, count in held.items():
    assert sum(x.size for n, x in first.items() if n.startswith(f"method/{part}/")) == count, part
  for source, told in (("folder", lines), ("file", of_file)):
    assert f"CLIP text encoder: {sources[source]}" in told


def test_heads_are_64_channels_wide(runs):
  for exp, _, _ in runs.values():
    attentions = [exp.method.unet.input_blocks[i][1].transformer_blocks[0] for i in (1, 4, 7)]
    assert [block.attn1.heads for block in attentions] == [block.attn2.heads for block in attentions] == [1, 2, 2]


@pytest.fixture(scope="module")
def tokens(pipeline):
  """Those of the folder's tokenizer, as diffusers' pipeline asks for them."""
  from transformers import CLIPTokenizer

  reader = CLIPTokenizer.from_pretrained(pipeline[1]["folder"] / "tokenizer")
  ids = reader(list(SENTENCES), padding="max_length", max_length=77, truncation=True, return_tensors="np")["input_ids"]
  assert reader.pad_token == "!" and not ids[:, -1].any()
  return ids


@pytest.mark.parametrize("source", SOURCES)
def test_sentences_have_the_same_tokens(runs, tokens, source):
  """From the file too, beside which stands the tokenizer of SD 1.5."""
  prepare = runs[source][0].method.prepare
  for sentence, expected in zip(SENTENCES, tokens, strict=True):
    np.testing.assert_array_equal(prepare({"sentence": sentence})["tokens"], expected)


def gap(ours, theirs):
  """The largest difference, in terms of the largest number."""
  theirs = np.asarray(theirs)
  assert ours.shape == theirs.shape
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def nhwc(tensor):
  return tensor.numpy().transpose(0, 2, 3, 1)


def test_the_unet_has_the_same_features(pipeline, runs):
  import torch

  net, seen = pipeline[0]["unet"], {}
  # Before each up-sampling its block runs once more: VPD's features are those of the module before the last, of the
  # finest level those of the last.
  taps = {
    i: [*(block.attentions if i else block.resnets)][-1 if i == LEVELS - 1 else -2]
    for i, block in enumerate(net.up_blocks)
  }
  hooks = [
    module.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out[0] if isinstance(out, tuple) else out}))
    for i, module in taps.items()
  ]
  torch.manual_seed(1)
  latents, context = torch.randn(2, 4, 8, 16), torch.randn(2, 77, WIDTH)
  with torch.no_grad():
    net(latents, 1, context)
  for hook in hooks:
    hook.remove()
  exp = runs["file"][0]
  run = jax.jit(lambda n, x, c: exp.spec.merge(n).method.unet(x, c, timesteps=1).features)
  for source in SOURCES:
    features = run(runs[source][1], nhwc(latents), context.numpy())
    assert len(features) == LEVELS
    for i, ours in enumerate(reversed(features)):
      assert gap(ours, nhwc(seen[i])) <= TOLERANCE, (source, i)


def test_the_vae_gives_the_same_latents(pipeline, runs):
  import torch

  net = pipeline[0]["vae"]
  torch.manual_seed(2)
  image = torch.randn(2, 3, 32, 48)
  with torch.no_grad():
    expected = net.encode(image).latent_dist.mode() * net.config.scaling_factor
  exp = runs["file"][0]
  run = jax.jit(lambda n, x: exp.spec.merge(n).method.vae(x).mean * exp.method.latent_scale)
  for source in SOURCES:
    assert gap(run(runs[source][1], nhwc(image)), nhwc(expected)) <= TOLERANCE, source


def test_the_text_encoder_gives_the_same_states(pipeline, runs, tokens):
  import torch

  with torch.no_grad():
    expected = pipeline[0]["text_encoder"](torch.from_numpy(tokens)).last_hidden_state
  exp = runs["file"][0]
  run = jax.jit(lambda n, x: exp.spec.merge(n).method.text_states({"tokens": x}))
  for source in SOURCES:
    assert gap(run(runs[source][1], jnp.asarray(tokens, jnp.int32)), expected) <= TOLERANCE, source


def test_a_method_that_reads_the_last_block_is_told_that_it_predicts_v(pipeline, runs):
  told = "the UNet's last block was trained to predict v, not noise"
  assert not any(told in line for _, _, lines in runs.values() for line in lines)  # they have no such block
  config = config_of(pipeline, "folder", method="meta_prompts")
  _, lines = initialize.weights(config, experiment.assemble(config))
  assert [line for line in lines if told in line]
