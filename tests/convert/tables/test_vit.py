"""The classifier of ImageNet from Hugging Face's folders and files, and where a model gets it from."""

import json
import os
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest

from tests.helpers import fill, oracle
from tests.helpers.buckets import bucket
from tests.helpers.modules import COMMON
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize, vit_tower
from vpd_jax.config import loader
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import vit
from vpd_jax.models import parameters
from vpd_jax.models.backbones.vit import VitClassifier, VitSizes

__all__ = ["bucket"]  # a fixture

TINY = VitSizes(width=64, layers=3, heads=4, mlp_width=256, image_size=56, patch=14, labels=1000)
PREFIX = "encoder.cide_module.vit_model."
CONFIG = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
CONFIG |= {"image_size": 56, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
CONFIG |= {"id2label": {str(i): f"LABEL_{i}" for i in range(1000)}}


@pytest.fixture(scope="module")
def state():
  """A classifier's state dict, in Hugging Face's names."""
  return {n.removeprefix(PREFIX): x for n, x in oracle.weights("eco_depth").items() if n.startswith(PREFIX)}


def shapes_of(sizes):
  return parameters.describe(lambda: VitClassifier(sizes, **COMMON.layer)).shapes


@pytest.fixture
def folder(tmp_path, state):
  write.write(tmp_path / "vit" / "model.safetensors", state)
  (tmp_path / "vit" / "config.json").write_text(json.dumps(CONFIG))
  return tmp_path / "vit"


@pytest.mark.parametrize("place", ["folder", "file"])
def test_every_tensor_of_a_folder_or_file_is_used(folder, state, place):
  named = vit.load(folder if place == "folder" else folder / "model.safetensors", shapes_of(TINY))
  assert named.keys() == shapes_of(TINY).keys() and len(named) == len(state)
  key = "vit/encoder/layer/2/attention/attention/key/kernel"
  np.testing.assert_array_equal(named[key], state["vit.encoder.layer.2.attention.attention.key.weight"].T)
  np.testing.assert_array_equal(named["vit/embeddings/cls_token"], state["vit.embeddings.cls_token"])


def test_a_folder_states_its_sizes(folder):
  assert VitSizes(**vit.sizes(folder)) == TINY
  assert vit.sizes(folder / "model.safetensors") == {}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"layer_norm_eps": 1e-6}, r"config\.json asks for layer_norm_eps=1e-06; known are"),
    ({"hidden_act": "relu"}, r"config\.json asks for hidden_act=relu; known are"),
    ({"patch_size": 15}, r"config\.json asks for patches of 15 in 56 pixels, which do not divide them"),
  ],
)
def test_what_the_network_does_not_do_is_refused(folder, change, message):
  (folder / "config.json").write_text(json.dumps(CONFIG | change))
  with pytest.raises(ValueError, match=message):
    vit.sizes(folder)


def test_a_classifier_of_another_size_is_refused_in_one_line(folder):
  other = VitSizes(width=64, layers=3, heads=4, mlp_width=256, image_size=56, patch=14, labels=10)
  with pytest.raises(ValueError) as caught:
    vit.load(folder, shapes_of(other))
  assert str(caught.value) == (
    f"{folder} holds a classifier of another size: 2 of its tensors differ, such as classifier.bias is [1000], "
    f"config.backbone.vit needs [10]; give {vit.EXPECTED}, or a folder with its config.json."
  )


@pytest.mark.parametrize("name", ["vit.layernorm.weight", "classifier.weight"])
def test_a_network_without_last_norm_or_classifier_is_refused(tmp_path, state, name):
  write.write(tmp_path / "x.safetensors", {n: x for n, x in state.items() if n != name})
  with pytest.raises(ValueError, match=rf"x\.safetensors: no classifier of pictures: it has no '{name}'; give the"):
    vit.load(tmp_path / "x.safetensors", shapes_of(TINY))


def test_a_place_that_is_not_there_is_named():
  with pytest.raises(ValueError, match=r"^'nowhere/vit.bin' does not exist; give the folder or file of a classifier"):
    vit.load("nowhere/vit.bin", {})


def config_of(source):
  config = loader.load("configs/rooms.py:depth,eco_depth,tiny").copy_and_resolve_references().unlock()
  config.init.vit = str(source)
  return initialize.with_backbone_sizes(config.lock(), "")


def test_a_model_takes_its_classifier_from_init_vit(folder, state):
  (folder / "config.json").write_text(json.dumps(CONFIG | {"num_attention_heads": 8}))
  config = config_of(folder)
  assert config.backbone.vit.heads == 8
  exp = experiment.assemble(config)
  named, lines = initialize.weights(config, exp)
  assert f"classifier of ImageNet: {folder}" in lines
  np.testing.assert_array_equal(named["method/vit_model/classifier/bias"], state["classifier.bias"])
  assert named.keys() == exp.spec.shapes.keys()


def test_a_random_classifier_says_so():
  wanted = {"a/kernel": jax.ShapeDtypeStruct((64, 8), np.float32), "n/scale": jax.ShapeDtypeStruct((8,), np.float32)}
  named, line = vit_tower.classifier(wanted, source="random:3")
  assert line == "classifier of ImageNet: random (seed 3), for smoke tests only"
  assert (named["n/scale"] == 1).all() and named["a/kernel"].std() < 0.2


def test_a_missing_classifier_is_told_in_one_line():
  config = config_of("")
  with pytest.raises(ValueError) as caught:
    initialize.weights(config, experiment.assemble(config))
  assert str(caught.value) == (
    f"there is no classifier of ImageNet: config.init.vit is empty; set it to {vit.EXPECTED}, or to random:SEED for "
    "smoke tests."
  )


def test_a_classifier_that_nothing_reads_is_refused():
  config = loader.load("configs/rooms.py:depth,vpd,tiny").unlock()
  config.init.vit = "random:0"
  with pytest.raises(ValueError, match=r"config\.init\.vit='random:0': nothing of method 'vpd' reads this"):
    experiment.assemble(config.lock())


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_network_is_that_of_transformers(tmp_path):
  import torch
  from transformers import ViTConfig, ViTForImageClassification

  torch.manual_seed(0)
  theirs = ViTForImageClassification(ViTConfig(**CONFIG)).eval()
  theirs.save_pretrained(tmp_path)
  sizes = VitSizes(**vit.sizes(tmp_path))
  parts = parameters.describe(lambda: VitClassifier(sizes, **COMMON.layer))
  image = fill.normal("image", (2, 56, 56, 3), 0)
  ours = parts.merge(vit.load(tmp_path, parts.shapes))(image)
  with torch.no_grad():
    out = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2)), output_hidden_states=True)
  np.testing.assert_allclose(ours.logits, out.logits.numpy(), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(ours.hidden[-1], out.hidden_states[-1].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["bucket", "hub"])
def test_a_classifier_is_fetched_with_its_sizes(folder, state, place, bucket, monkeypatch):
  remote = bucket[0] / "vit"
  shutil.copytree(folder, remote)
  (remote / "pytorch_model.bin").write_text("the same in another form")
  if place == "hub":
    fetched = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
      assert repo_id == "org/vit"
      names = huggingface_hub.utils.filter_repo_objects(os.listdir(remote), allow_patterns=allow_patterns)
      snapshot = folder.parent / "snapshot"
      for name in names:
        snapshot.mkdir(exist_ok=True)
        shutil.copy(remote / name, snapshot / name)
        fetched.append(name)
      return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  source = "gs://bucket/vit" if place == "bucket" else "org/vit"
  assert VitSizes(**vit.sizes(source)) == TINY
  assert vit.load(source, shapes_of(TINY)).keys() == shapes_of(TINY).keys()
  assert "pytorch_model.bin" not in (bucket[1] if place == "bucket" else fetched)
