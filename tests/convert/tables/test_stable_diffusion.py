"""Stable Diffusion's tables: the CompVis file and the diffusers folder give the same arrays."""

import jax
import numpy as np
import pytest

from tests.helpers import oracle, pth
from tests.helpers.stable_diffusion_folders import SD1, folder
from vpd_jax.config import presets
from vpd_jax.convert import load, rules
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import stable_diffusion

UNET, VAE = "model.diffusion_model.", "first_stage_model."


def described(named):
  return {name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in named.items()}


@pytest.fixture(scope="module")
def source():
  return oracle.weights("sd_unet_hier") | oracle.weights("sd_vae_encoder")


@pytest.fixture(scope="module")
def expected(source):
  """Our names and layouts, restated."""
  unet = {f"method/unet/{name}": value for name, value in oracle.plain_names(source, UNET).items()}
  vae = {f"method/vae/{name}": value for name, value in oracle.plain_names(source, VAE).items()}
  return unet | {name: value for name, value in vae.items() if "/decoder/" not in name}


EXTRAS = {
  "model_ema.decay": (),
  "model_ema.diffusion_modelinput_blocks00weight": (3,),
  "cond_stage_model.transformer.text_model.final_layer_norm.weight": (4,),
  "first_stage_model.decoder.extra.weight": (2, 2),
  **{
    name: (5,)
    for name in (
      *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
      *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "lvlb_weights"),
      *(
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "logvar",
      ),
    )
  },
}


def assert_same(named, expected):
  assert named.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(named[name], value, err_msg=name)


def test_a_compvis_file_fills_unet_and_vae(tmp_path, source, expected):
  full = source | {name: np.zeros(shape, np.float32) for name, shape in EXTRAS.items()}
  lightning = pth.foreign("pytorch_lightning.callbacks", "ModelCheckpoint")
  content = {"state_dict": {name: pth.tensor(value) for name, value in full.items()}, "callbacks": {lightning: {}}}
  path = pth.write_zip(tmp_path / "v1.ckpt", content)
  targets = described(expected) | described({"neck/x/kernel": np.ones(2), "method/gamma": np.ones(2)})
  named, report = load.load_pretrained(path, targets)
  assert report.table == "compvis"
  assert_same(named, expected)
  assert set(report.fresh) == {"neck/x/kernel", "method/gamma"}
  assert report.dropped.keys() >= EXTRAS.keys()
  assert report.dropped["model_ema.decay"] == "the plain weights are used"


def test_the_last_convolution_is_dropped_where_the_model_has_none(source, expected):
  without = {name: value for name, value in expected.items() if "/unet/out/" not in name}
  named, report = rules.convert(source, stable_diffusion.compvis(without), described(without))
  assert_same(named, without)
  assert report.dropped[f"{UNET}out.2.weight"] == "the model ends at the features"


def test_unet_and_vae_may_not_stay_fresh(source, expected):
  partial = {name: value for name, value in source.items() if "input_blocks.3." not in name}
  with pytest.raises(rules.ConversionError, match=r"2 are filled by nothing .*input_blocks/3/0/op/kernel"):
    rules.convert(
      partial, stable_diffusion.compvis(expected), described(expected), fresh=load.OUTSIDE_SD, table="compvis"
    )


def test_a_source_of_other_sizes_is_refused(source, expected):
  wrong = source | {f"{UNET}input_blocks.0.0.weight": np.zeros((32, 9, 3, 3), np.float32)}
  with pytest.raises(rules.ConversionError, match=r"gives \[3, 3, 9, 32\], .* needs \[3, 3, 4, 32\]"):
    rules.convert(wrong, stable_diffusion.compvis(expected), described(expected))


# diffusers -> CompVis in SD 1.x; the numbers are those of its published files.
BLOCKS = {
  "unet.conv_in": "unet/input_blocks/0/0",
  "unet.time_embedding.linear_2": "unet/time_embed/2",
  "unet.down_blocks.0.resnets.1.conv1": "unet/input_blocks/2/0/in_layers/2",
  "unet.down_blocks.0.attentions.1.proj_in": "unet/input_blocks/2/1/proj_in",
  "unet.down_blocks.0.downsamplers.0.conv": "unet/input_blocks/3/0/op",
  "unet.down_blocks.1.resnets.0.conv_shortcut": "unet/input_blocks/4/0/skip_connection",
  "unet.down_blocks.2.resnets.1.time_emb_proj": "unet/input_blocks/8/0/emb_layers/1",
  "unet.down_blocks.3.resnets.1.conv2": "unet/input_blocks/11/0/out_layers/3",
  "unet.mid_block.resnets.1.norm2": "unet/middle_block/2/out_layers/0",
  "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "unet/middle_block/1/transformer_blocks/0/attn2/to_k",
  "unet.up_blocks.0.resnets.2.norm1": "unet/output_blocks/2/0/in_layers/0",
  "unet.up_blocks.0.upsamplers.0.conv": "unet/output_blocks/2/1/conv",
  "unet.up_blocks.1.attentions.2.proj_out": "unet/output_blocks/5/1/proj_out",
  "unet.up_blocks.1.upsamplers.0.conv": "unet/output_blocks/5/2/conv",
  "unet.up_blocks.3.attentions.2.norm": "unet/output_blocks/11/1/norm",
  "unet.conv_norm_out": "unet/out/0",
  "unet.conv_out": "unet/out/2",
  "vae.encoder.conv_in": "vae/encoder/conv_in",
  "vae.encoder.down_blocks.1.resnets.0.conv_shortcut": "vae/encoder/down/1/block/0/nin_shortcut",
  "vae.encoder.down_blocks.2.downsamplers.0.conv": "vae/encoder/down/2/downsample/conv",
  "vae.encoder.down_blocks.3.resnets.1.norm2": "vae/encoder/down/3/block/1/norm2",
  "vae.encoder.mid_block.resnets.1.conv2": "vae/encoder/mid/block_2/conv2",
  "vae.encoder.mid_block.attentions.0.group_norm": "vae/encoder/mid/attn_1/norm",
  "vae.encoder.conv_norm_out": "vae/encoder/norm_out",
  "vae.quant_conv": "vae/quant_conv",
  "vae.post_quant_conv": "vae/post_quant_conv",
}
NAMES = [
  *(f"unet.down_blocks.{i}.resnets.{j}.norm1.weight" for i in range(4) for j in range(2)),
  *(f"unet.down_blocks.{i}.attentions.0.transformer_blocks.0.norm1.weight" for i in range(3)),
  *(f"unet.down_blocks.{i}.attentions.1.transformer_blocks.0.norm1.weight" for i in range(3)),
  *(f"unet.up_blocks.{i}.attentions.{j}.transformer_blocks.0.norm1.weight" for i in (1, 2, 3) for j in range(3)),
  *(f"vae.encoder.down_blocks.{i}.resnets.{j}.norm1.weight" for i in range(4) for j in range(2)),
]


def test_blocks_of_diffusers_get_the_numbers_of_compvis():
  table = stable_diffusion.diffusers(NAMES, ["method/unet/out/0/scale", "method/unet/time_embed/0/kernel"])
  for source, target in BLOCKS.items():
    found = {
      match[0] for rule in table if isinstance(rule, rules.Rule) and (match := rule.to_target(f"{source}.bias", 1))
    }
    assert found == {f"method/{target}/bias"}, source


@pytest.mark.parametrize("words", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")])
@pytest.mark.parametrize("ndim", [2, 4])
def test_attention_of_the_vae_has_two_spellings_and_two_shapes(words, ndim):
  table = stable_diffusion.diffusers(NAMES, [])
  weight = np.arange(6.0).reshape(2, 3, *(1,) * (ndim - 2))
  for word, ours in zip(words, ("q", "k", "v", "proj_out"), strict=True):
    name = f"vae.encoder.mid_block.attentions.0.{word}.weight"
    [(target, leaf)] = [m for r in table if isinstance(r, rules.Rule) and (m := r.to_target(name, ndim))]
    assert target == f"method/vae/encoder/mid/attn_1/{ours}/kernel"
    np.testing.assert_array_equal(leaf.forward(weight)[0, 0], weight.reshape(2, 3).T)


SD2 = {
  "unet": SD1["unet"] | {
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
    "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False,
  },
  "vae": SD1["vae"],
  "text_encoder": SD1["text_encoder"] | {
    "hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096,
    "hidden_act": "gelu",
  },
}  # fmt: skip


def test_sizes_of_sd_1_are_read_from_its_configs(tmp_path):
  assert stable_diffusion.sizes(folder(tmp_path, SD1)) == {
    "unet": {
      "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": (1, 2, 4, 4), "num_res_blocks": 2,
      "attention_levels": (0, 1, 2), "num_heads": 8, "head_width": None, "context_dim": 768, "linear_projection": False,
    },
    "vae": {
      "channels": 128, "channel_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 4, "latent_scale": 0.18215,
    },
    "text": {
      "vocab_size": 49408, "width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "positions": 77,
      "activation": "quick_gelu", "padding": -1,
    },
  }  # fmt: skip


def test_sizes_of_sd_2_are_read_from_its_configs(tmp_path):
  sizes = stable_diffusion.sizes(folder(tmp_path, SD2))
  unet = {"num_heads": None, "head_width": 64, "context_dim": 1024, "linear_projection": True}
  assert {key: sizes["unet"][key] for key in unet} == unet
  ours = presets.backbone("sd21")
  assert {key: value or 0 for key, value in sizes["unet"].items()} == ours["unet"]
  assert (sizes["vae"], sizes["text"]) == (ours["vae"], ours["text"])


def test_sizes_fit_the_backbones(tmp_path):
  from vpd_jax.models.backbones import clip_text, unet, vae

  sizes = stable_diffusion.sizes(folder(tmp_path, SD1))
  assert unet.UNetSizes(**sizes["unet"]) == unet.UNetSizes()
  assert vae.VaeSizes(**sizes["vae"]) == vae.VaeSizes()
  assert clip_text.TextSizes(**sizes["text"]) == clip_text.TextSizes()


def test_a_single_file_brings_no_sizes(tmp_path):
  write.write(tmp_path / "x.safetensors", {})
  assert stable_diffusion.sizes(tmp_path / "x.safetensors") is None


@pytest.mark.parametrize(
  "change, message",
  [
    ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
    ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, "asks for blocks"),
    ({"block_out_channels": [320, 500]}, "not multiples of the first"),
    ({"attention_head_dim": [5, 10, 10, 20]}, "neither equal in number nor in width"),
  ],
)
def test_other_networks_are_refused(tmp_path, change, message):
  with pytest.raises(ValueError, match=message) as caught:
    stable_diffusion.sizes(folder(tmp_path, {"unet": SD1["unet"] | change}))
  assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_incomplete_config_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"unet.config\.json lacks 'block_out_channels'"):
    stable_diffusion.sizes(folder(tmp_path, {"unet": {"down_block_types": []}}))
  (tmp_path / "vae").mkdir()
  with pytest.raises(ValueError, match=r"vae.config\.json cannot be read"):
    stable_diffusion.sizes(folder(tmp_path, {"unet": SD1["unet"]}))


@pytest.mark.parametrize(
  "channels, model", [(9, "inpainting"), (5, "depth2img"), (8, "InstructPix2Pix, Marigold"), (6, "another model")]
)
def test_a_model_whose_unet_reads_more_than_latents_is_refused_by_name(tmp_path, channels, model):
  made = folder(tmp_path, {"unet": SD1["unet"] | {"in_channels": channels}, "vae": SD1["vae"]})
  (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
  with pytest.raises(ValueError, match=rf"UNet takes {channels} channels, its VAE gives 4: .*{model}.*SomePipeline"):
    stable_diffusion.sizes(made)
