"""The text encoder in each of its spellings."""

import jax
import numpy as np
import pytest

from tests import oracle
from tests.convert import pth
from vpd_jax.convert import load, write


@pytest.fixture(scope="module")
def source():
  return oracle.weights("clip_text")


@pytest.fixture(scope="module")
def expected(source):
  return oracle.plain_names(source)


def load_from(path, expected):
  targets = {name: jax.ShapeDtypeStruct(value.shape, np.float32) for name, value in expected.items()}
  named, report = load.load_text_encoder(path, targets)
  assert named.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(named[name], value, err_msg=name)
  return report


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
  report = load_from(tmp_path / "text.ckpt", expected)
  assert len(report.used) == len(source)


@pytest.mark.parametrize("place", ["text_encoder", "."])
def test_folders_hold_it_below_or_at_the_top(tmp_path, source, expected, place):
  write.write(tmp_path / place / "model.safetensors", source)
  load_from(tmp_path, expected)


def test_openclip_names_point_to_the_diffusers_folder(tmp_path):
  write.write(tmp_path / "v2.safetensors", {"cond_stage_model.model.ln_final.weight": np.ones(2, np.float32)})
  with pytest.raises(ValueError, match=r"v2\.safetensors: .*OpenCLIP's own names; give the diffusers folder"):
    load.load_text_encoder(tmp_path / "v2.safetensors", {})


def test_a_source_without_text_encoder_says_so(tmp_path):
  write.write(tmp_path / "x.safetensors", {"a.weight": np.ones(2, np.float32)})
  with pytest.raises(ValueError, match=r"x.safetensors: no text encoder"):
    load.load_text_encoder(tmp_path / "x.safetensors", {})
