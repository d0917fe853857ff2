"""CLIP's two encoders in each of their spellings, their sizes, and what an image is compared with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle, pth, text_folders
from vpd_jax.checkpoints import clip_towers
from vpd_jax.convert import rules, tokenizer
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import clip
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import clip_image
from vpd_jax.models.backbones.clip_text import TextSizes
from vpd_jax.models.initializers import InitKeys


@pytest.fixture(scope="module")
def source():
  return oracle.weights("clip_text")


@pytest.fixture(scope="module")
def expected(source):
  return oracle.plain_names(source)


def load_from(path, expected):
  targets = {name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in expected.items()}
  named = clip.load_text(path, targets)
  assert named.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(named[name], value, err_msg=name)


def test_names_are_ours_with_slashes(expected):
  assert "text_model/embeddings/token_embedding/embedding" in expected
  assert "text_model/encoder/layers/0/self_attn/q_proj/kernel" in expected
  assert "text_model/final_layer_norm/scale" in expected


@pytest.mark.parametrize("spelling", ["text_model.", "", "positions", "compvis"])
def test_every_spelling_gives_the_same_arrays(tmp_path, source, expected, spelling):
  given = dict(source)
  if spelling == "":
    given = {name.removeprefix("text_model."): value for name, value in given.items()}
  elif spelling == "positions":
    given["text_model.embeddings.position_ids"] = np.arange(77)[None]
    given |= {"vision_model.embeddings.position_ids": np.arange(3)[None], "logit_scale": np.float32(1)[None]}
  elif spelling == "compvis":
    given = {f"cond_stage_model.transformer.{name}": value for name, value in given.items()}
    given |= {"model.diffusion_model.out.0.bias": np.zeros(3, np.float32), "betas": np.zeros(3, np.float32)}
    given["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
  pth.write_zip(tmp_path / "text.ckpt", {name: pth.tensor(value) for name, value in given.items()})
  load_from(tmp_path / "text.ckpt", expected)


@pytest.mark.parametrize("place", ["text_encoder", "."])
def test_folders_hold_it_below_or_at_the_top(tmp_path, source, expected, place):
  write.write(tmp_path / place / "model.safetensors", source)
  load_from(tmp_path, expected)


def test_a_source_without_text_encoder_says_so(tmp_path):
  write.write(tmp_path / "x.safetensors", {"a.weight": np.ones(2, np.float32)})
  with pytest.raises(ValueError, match=r"x.safetensors: no text encoder"):
    clip.load_text(tmp_path / "x.safetensors", {})


@pytest.fixture(scope="module")
def vision():
  return oracle.weights("clip_vision")


def load_image_from(path, vision, *, projected):
  expected = oracle.plain_names(vision)
  if not projected:
    expected = {n: x for n, x in expected.items() if "post_layernorm" not in n and "visual_projection" not in n}
  targets = {name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in expected.items()}
  named = clip.load_image(path, targets, projected=projected)
  assert named.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(named[name], value, err_msg=name)


def spelled(vision, source, spelling):
  """A whole CLIP, a vision model with and without its prefix, and old files with positions."""
  if spelling == "whole":
    projection = {"text_projection.weight": np.ones((48, 64), np.float32)}
    return vision | source | projection | {"logit_scale": np.ones((), np.float32)}
  if spelling == "bare":
    given = {n: x for n, x in vision.items() if n != "visual_projection.weight"}
    return {n.removeprefix("vision_model."): x for n, x in given.items()}
  return vision | {"vision_model.embeddings.position_ids": np.arange(17)[None]} if spelling == "positions" else vision


@pytest.mark.parametrize("spelling", ["whole", "vision_model.", "positions", "bare"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_every_spelling_of_the_image_encoder_gives_the_same_arrays(tmp_path, vision, source, spelling, file):
  given = spelled(vision, source, spelling)
  if file.endswith("bin"):
    pth.write_zip(tmp_path / file, {name: pth.tensor(value) for name, value in given.items()})
  else:
    write.write(tmp_path / file, given)
  load_image_from(tmp_path, vision, projected=False)
  load_image_from(tmp_path / file, vision, projected=False)
  if spelling == "bare":
    with pytest.raises(ValueError, match=r"no 'visual_projection.weight': an image encoder alone; give the folder"):
      load_image_from(tmp_path, vision, projected=True)
  else:
    load_image_from(tmp_path, vision, projected=True)


def test_the_way_back_gives_the_source(vision, source):
  for state, table in (
    (vision, clip.image(vision, projected=True)),
    (source | {"text_projection.weight": np.ones((48, 64), np.float32)}, None),
  ):
    table = table or clip.text(state, projected=True)
    targets = {name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in oracle.plain_names(state).items()}
    named, _ = rules.convert(state, table, targets)
    back = rules.to_source(named, table)
    assert back.keys() == state.keys()
    for name, value in state.items():
      np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_what_is_no_clip_says_so(tmp_path, source):
  write.write(tmp_path / "text.safetensors", source)
  with pytest.raises(
    ValueError, match=r"text.safetensors: no image encoder: .*openai/clip-vit-large-patch14"
  ) as caught:
    clip.load_image(tmp_path / "text.safetensors", {}, projected=False)
  assert "\n" not in str(caught.value)
  with pytest.raises(ValueError, match=r"no 'text_projection.weight': a text encoder alone"):
    clip.load_text(tmp_path / "text.safetensors", {}, projected=True)
  with pytest.raises(ValueError, match="does not exist; give the folder of a whole CLIP"):
    clip.load_image(tmp_path / "none", {}, projected=False)


def test_sizes_are_read_from_the_config(tmp_path):
  vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
  vision |= {"patch_size": 14, "image_size": 224, "projection_dim": 768}
  words = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
  write_config = lambda content: (tmp_path / "config.json").write_text(json.dumps(content))
  assert clip.sizes(tmp_path) == {}
  write_config({"model_type": "clip", "vision_config": vision, "text_config": words, "projection_dim": 768})
  found = clip.sizes(tmp_path)
  assert clip_image.ImageSizes(**found["image"]) == clip_image.ImageSizes()
  assert TextSizes(**found["text"]) == TextSizes()
  write_config({"model_type": "clip_vision_model", **vision})
  assert clip.sizes(tmp_path) == {"image": found["image"]}
  for wrong in ({"hidden_act": "relu"}, {"patch_size": 15}):
    write_config({"model_type": "clip_vision_model", **vision, **wrong})
    with pytest.raises(ValueError, match=r"config.json asks for .*"):
      clip.sizes(tmp_path)


def test_random_towers_keep_the_scale_and_follow_the_seed():
  kinds = {"dtype": jnp.float32, "param_dtype": jnp.bfloat16}
  sizes = clip_image.ImageSizes(width=64, layers=2, heads=4, mlp_width=128, image_size=28, projection=8)
  parts = params_lib.describe(lambda: clip_image.ClipImage(sizes, projected=True, **kinds, rngs=InitKeys(0)))
  first, again, other = (clip_towers.image_encoder(parts.shapes, source=f"random:{seed}") for seed in (0, 0, 1))
  name = "vision_model/encoder/layers/0/mlp/fc1/kernel"
  np.testing.assert_array_equal(first[0][name], again[0][name])
  assert not np.array_equal(first[0][name], other[0][name]) and "(seed 0), for smoke tests only" in first[1]
  assert {n: (x.shape, x.dtype) for n, x in first[0].items()} == {
    n: (s.shape, s.dtype) for n, s in parts.shapes.items()
  }
  image = jax.random.normal(jax.random.key(0), (1, 28, 28, 3))
  last = jax.jit(lambda n, x: parts.merge(n)(x).last)(first[0], image)
  assert 0.3 < float(jnp.std(last)) < 10
  with pytest.raises(ValueError, match=r"init.clip='random:x' needs a whole number"):
    clip_towers.image_encoder(parts.shapes, source="random:x")
  with pytest.raises(ValueError, match=r"there is no CLIP image encoder: config\.init\.clip is empty; set") as caught:
    clip_towers.image_encoder(parts.shapes, source="")
  assert "\n" not in str(caught.value)


NAMES, TEMPLATES = ("dining_room", "Office", "cafe"), ("a photo of the {}.", "{}", "two {}")


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_whole_clip_of_transformers_tells_the_same_classes(tmp_path):
  import torch
  from transformers import CLIPConfig, CLIPModel

  small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
  words = text_folders.text_config(text_folders.SIZES) | {"eos_token_id": 2}
  config = CLIPConfig(text_config=words, vision_config=small | {"image_size": 28, "patch_size": 14}, projection_dim=8)
  torch.manual_seed(0)
  theirs = CLIPModel(config).eval()
  with torch.no_grad():
    for value in theirs.parameters():
      value.copy_(0.3 * torch.randn_like(value))
  theirs.save_pretrained(tmp_path)
  text_folders.write_tokenizer(tmp_path / "words")
  for file in (tmp_path / "words").iterdir():
    file.rename(tmp_path / file.name)
  stated = clip.sizes(tmp_path)
  sizes, reader = clip_image.ImageSizes(**stated["image"]), tokenizer.load(tmp_path)
  kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
  parts = params_lib.describe(lambda: clip_image.ClipImage(sizes, projected=True, **kinds, rngs=InitKeys(0)))
  named = clip.load_image(tmp_path, parts.shapes, projected=True)
  image = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
  ours = jax.jit(lambda n, x: parts.merge(n)(x).embeds)(named, image)
  with torch.no_grad():
    expected = theirs.get_image_features(torch.from_numpy(image.transpose(0, 3, 1, 2))).numpy()
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  vectors = clip_towers.name_vectors(
    tmp_path, NAMES, TEMPLATES, text_tokenizer=reader, sizes=TextSizes(**stated["text"]), projection=8
  )
  for name, vector in zip(NAMES, vectors, strict=True):
    sentences = [template.replace("{}", name.replace("_", " ")) for template in TEMPLATES]
    batch = reader(sentences, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
      encoded = theirs.get_text_features(input_ids=batch["input_ids"]).numpy()
    mean = (encoded / np.linalg.norm(encoded, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=0, atol=1e-5, err_msg=name)
