"""Stable Diffusion 2.1: the names of its single files against the model, and what is told of another model."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.helpers import single_file, text_folders
from tests.helpers.single_file import TEXT, UNET, VAE
from tests.helpers.stable_diffusion_folders import SD1, folder
from vpd_jax.checkpoints import class_name_encoding, initialize
from vpd_jax.config import loader, presets
from vpd_jax.convert import load, rules
from vpd_jax.convert.formats import write
from vpd_jax.convert.formats.lazy_tensor import LazyTensor, contiguous
from vpd_jax.convert.tables import clip, stable_diffusion
from vpd_jax.convert.tokenizer import Tokenize
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import clip_text, unet, vae
from vpd_jax.models.initializers import InitKeys

LAYERS = text_folders.SIZES.layers
TEXT_21 = dataclasses.replace(text_folders.SIZES, activation="gelu", padding=0)
PUBLISHED = 5_214_604_494  # bytes of v2-1_768-ema-pruned.safetensors


@pytest.fixture(scope="module")
def networks():
  """Shapes of the three networks at the size `sd21`, by our names."""
  sizes = presets.backbone("sd21")
  sizes["unet"] |= {"num_heads": None}
  kinds = lambda: {"dtype": np.float32, "param_dtype": np.float32, "rngs": InitKeys(0)}
  build = {
    "method/unet/": lambda: unet.UNet(unet.UNetSizes(**sizes["unet"]), **kinds()),
    "method/vae/": lambda: vae.VaeEncoder(vae.VaeSizes(**sizes["vae"]), **kinds()),
    "": lambda: clip_text.ClipText(clip_text.TextSizes(**sizes["text"]), **kinds()),
  }
  return {
    prefix: {prefix + n: s for n, s in params_lib.describe(make).shapes.items()} for prefix, make in build.items()
  }


def of_no_memory(shapes):
  """Tensors of these shapes."""
  of_type = np.dtype(np.int8)
  return {n: LazyTensor(pathlib.Path("none"), 0, of_type, tuple(s), contiguous(tuple(s))) for n, s in shapes.items()}


def phantoms(shapes):
  return {name: np.broadcast_to(np.int8(0), tuple(shape)) for name, shape in shapes.items()}


def test_the_names_of_the_published_files_are_complete():
  count = sum(int(np.prod(shape)) for shape in single_file.shapes().values())
  assert 0 < PUBLISHED - 4 * count < 250_000  # what is left are the names themselves, and constants of the schedule


def planned(source, table):
  """{target: shape} of every tensor, each of which one row of the table must match."""
  targets = {}
  for name, x in source.items():
    found = [
      (rule.why if re.fullmatch(rule.pattern, name) else None)
      if isinstance(rule, rules.Drop)
      else rule.to_target(name, x.ndim)
      for rule in table
    ]
    (match,) = [x for x in found if x is not None]
    if not isinstance(match, str):
      assert match[0] not in targets
      targets[match[0]] = match[1].forward(np.broadcast_to(np.int8(0), x.shape)).shape
  return targets


def test_every_name_of_the_published_files_fits_the_model_and_comes_back(networks):
  held = of_no_memory(single_file.shapes())
  images = networks["method/unet/"] | networks["method/vae/"]
  table = stable_diffusion.compvis(images)
  assert planned(held, table) == {n: s.shape for n, s in images.items()}
  back = rules.to_source(phantoms({n: s.shape for n, s in images.items()}), table)
  theirs = {n: x.shape for n, x in held.items() if n.startswith((UNET, VAE)) and ".decoder." not in n}
  assert {n: x.shape for n, x in back.items()} == theirs

  words = networks[""]
  table = clip.text(clip.split_in_proj(held), words)
  assert planned(clip.split_in_proj(held), table) == {n: s.shape for n, s in words.items()}
  back = clip.join_in_proj(rules.to_source(phantoms({n: s.shape for n, s in words.items()}), table))
  unread = re.compile(r".*\.(resblocks\.23\..*|text_projection|logit_scale|attn_mask)")
  theirs = {n: x.shape for n, x in held.items() if n.startswith(TEXT) and not unread.fullmatch(n)}
  assert {n: x.shape for n, x in back.items()} == theirs


def states():
  """A small text encoder: our arrays, and the names of transformers."""
  named = text_folders.random_weights(TEXT_21)
  return named, rules.to_source(named, clip.text(["text_model.final_layer_norm.weight"]))


@pytest.mark.parametrize("last", [True, False])
def test_openclips_names_give_the_same_arrays_and_come_back(tmp_path, last):
  named, state = states()
  written = single_file.text(state, layers=LAYERS, last=last)
  write.write(tmp_path / "v2.safetensors", written | {"model.diffusion_model.out.0.bias": np.zeros(3, np.float32)})
  assert clip.holds_text(tmp_path / "v2.safetensors")
  found = clip.load_text(tmp_path / "v2.safetensors", named)
  assert found.keys() == named.keys()
  for name, value in named.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  back = clip.join_in_proj(rules.to_source(named, clip.openclip(named)))
  unread = ("text_projection", "logit_scale", "attn_mask")
  expected = {n: x for n, x in written.items() if f"resblocks.{LAYERS}." not in n and not n.endswith(unread)}
  assert back.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_what_is_no_such_file_is_refused(tmp_path):
  named, state = states()
  file = tmp_path / "v2.safetensors"
  deeper = single_file.text(state, layers=LAYERS)
  deeper |= {n.replace(f".{LAYERS}.", f".{LAYERS + 1}."): x for n, x in deeper.items() if f"resblocks.{LAYERS}." in n}
  write.write(file, deeper)
  with pytest.raises(rules.ConversionError, match=rf"match no rule: .*resblocks\.{LAYERS + 1}\."):
    clip.load_text(file, named)
  write.write(
    file, single_file.text(state, layers=LAYERS) | {f"{TEXT}transformer.resblocks.0.attn.in_proj_bias": np.ones(47)}
  )
  with pytest.raises(rules.ConversionError, match=r"in_proj_bias \[47\]"):
    clip.load_text(file, named)
  with pytest.raises(ValueError, match=r"no text encoder: no name ends in .*give a CLIP or Stable Diffusion source\.$"):
    clip.load_text(file, named, projected=True)


def test_a_text_encoder_of_another_width_is_refused_in_one_line(tmp_path):
  wider = dataclasses.replace(TEXT_21, width=32)
  write.write(tmp_path / "clip.safetensors", states()[1])
  with pytest.raises(
    ValueError, match=r"encoder of .*clip\.safetensors is 16 wide, that of config.backbone.text 32; give"
  ) as e:
    clip.load_text(tmp_path / "clip.safetensors", text_folders.random_weights(wider))
  assert "\n" not in str(e.value)


def test_class_vectors_are_encoded_by_a_single_file(tmp_path):
  named, state = states()
  write.write(tmp_path / "v2.safetensors", single_file.text(state, layers=LAYERS))
  text_folders.write_tokenizer(tmp_path / "tokenizer")
  vectors, line = class_name_encoding.resolve(
    setting="", classes=("office", "room"), width=16, pretrained=str(tmp_path / "v2.safetensors"), dtype=np.float32,
    sizes=TEXT_21, tokenizer=str(tmp_path / "tokenizer"),
  )  # fmt: skip
  assert vectors.shape == (2, 16) and "v2.safetensors" in line
  text = class_name_encoding.load_text_encoder(tmp_path / "v2.safetensors", dtype=np.float32, sizes=TEXT_21)
  assert all(np.array_equal(text.weights[name], value) for name, value in named.items())


def test_a_sentence_is_filled_with_id_0_whatever_the_tokenizer_says(tmp_path):
  text_folders.write_tokenizer(tmp_path / "sd1")
  vocabulary, end = len(text_folders.VOCABULARY), text_folders.VOCABULARY["<|endoftext|>"]
  told = [
    Tokenize((str(tmp_path / "sd1"),), vocabulary, 9, padding)(("a room", "the photo of a room")) for padding in (-1, 0)
  ]
  ends = (told[0] == end).argmax(axis=1)
  for row, (sd1, sd2) in enumerate(zip(*told, strict=True)):
    np.testing.assert_array_equal(sd1[: ends[row] + 1], sd2[: ends[row] + 1])
    assert (sd1[ends[row] :] == end).all() and not sd2[ends[row] + 1 :].any()
  assert told[1].dtype == np.int32 and ends[0] < 8


ATTENDED = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
WIDTHS = {"full": 768, "sd21": 1024}


@pytest.mark.parametrize("prefix", [UNET, "encoder.unet.unet.diffusion_model."], ids=["compvis", "released"])
@pytest.mark.parametrize("config, file", [("sd21", "full"), ("full", "sd21")])
def test_a_file_of_another_stable_diffusion_is_refused_with_both_named(tmp_path, prefix, config, file):
  path = tmp_path / "weights.safetensors"
  write.write(path, {f"{prefix}{ATTENDED}.weight": np.zeros((320, WIDTHS[file]), np.float32)})
  targets = {
    f"method/unet/{ATTENDED.replace('.', '/')}/kernel": jax.ShapeDtypeStruct((WIDTHS[config], 320), np.float32)
  }
  number = {"full": "1", "sd21": "2"}
  expected = (
    rf"weights\.safetensors holds Stable Diffusion {number[file]}\.x \(a context {WIDTHS[file]} wide\), the config "
    rf"describes Stable Diffusion {number[config]}\.x \({WIDTHS[config]}\); give .*full is 1\.x, sd21 is 2\.x\.$"
  )
  with pytest.raises(ValueError, match=expected) as caught:
    load.load_pretrained(path, targets)
  assert "\n" not in str(caught.value)


def test_a_folder_says_with_what_its_unet_was_trained(tmp_path):
  made = folder(tmp_path, {"vae": SD1["vae"] | {"scaling_factor": 0.13025}, "text_encoder": SD1["text_encoder"]})
  sizes = stable_diffusion.sizes(made)
  assert (sizes["vae"]["latent_scale"], sizes["text"]["padding"]) == (0.13025, -1)
  config = loader.load("configs/nyu_depth.py:sd21").unlock()
  del config.backbone.vae["latent_scale"]  # a config of one's own may leave it to the default
  config = initialize.with_backbone_sizes(config.lock(), str(made))
  assert (config.backbone.vae.latent_scale, config.backbone.text.padding) == (0.13025, -1)
  assert not stable_diffusion.predicts_v(made)
  (made / "scheduler").mkdir()
  for kind in ("epsilon", "v_prediction"):
    (made / "scheduler" / "scheduler_config.json").write_text(f'{{"prediction_type": "{kind}"}}')
    assert stable_diffusion.predicts_v(made) == (kind == "v_prediction")
