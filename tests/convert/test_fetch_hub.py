"""Hub ids: how they are told from paths, and what is fetched of them."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest

from tests.helpers import text_folders
from tests.helpers.folders import (
  NAMED,
  TEXT,
  TOKENIZER,
  WEIGHTS,
  held,
  one_line,
  read_all,
  write_networks,
  write_repository,
  write_shards,
)
from tests.helpers.paths import ROOT
from vpd_jax.checkpoints import class_name_encoding
from vpd_jax.convert import fetch, load
from vpd_jax.convert.formats import weight_files
from vpd_jax.convert.tables import stable_diffusion


@pytest.mark.parametrize(
  "source, expected",
  [
    ("runwayml/stable-diffusion-v1-5", ("runwayml/stable-diffusion-v1-5", None)),
    ("CompVis/stable-diffusion-v1-4@bf16", ("CompVis/stable-diffusion-v1-4", "bf16")),
    ("org/sd-v1.5", ("org/sd-v1.5", None)),
    ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
    ("org/weights.ckpt@main", ("org/weights.ckpt", "main")),
    ("here/absent@main", ("here/absent", "main")),
    ("org/weights.ckpt", None),
    ("here/absent", None),
    ("here/present", None),
    ("weights", None),
    ("a/b/c", None),
    ("./org/name", None),
    ("../name", None),
    ("/org/name", None),
    ("~/name", None),
    ("gs://org/name", None),
    (pathlib.Path("org/name"), None),
  ],
)
def test_a_hub_id_is_told_from_a_path(tmp_path, monkeypatch, source, expected):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "here" / "present").mkdir(parents=True)
  assert fetch.hub_id(source) == expected


@pytest.mark.parametrize("source", ["weights/v1.ckpt", "a/b/c", "./sd15", "sd15", "~/absent", "gone.safetensors"])
def test_what_looks_like_a_path_never_goes_to_the_network(tmp_path, monkeypatch, source):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
  with pytest.raises(ValueError, match=r"does not exist; give .* or a hub id") as caught:
    load.load_pretrained(source, {})
  assert source in one_line(caught)
  assert stable_diffusion.sizes(source) is None


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write_networks(tmp_path / "sd")
  assert len(load.source_files("~/sd")) == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub of one repository; (its files, the snapshot, the revisions asked for)."""
  monkeypatch.chdir(tmp_path)
  repository, snapshot, revisions = tmp_path / "repository", tmp_path / "cache" / "snapshot", []

  def snapshot_download(repo_id, *, revision=None, allow_patterns):
    assert repo_id == "org/name"
    revisions.append(revision)
    for name in huggingface_hub.utils.filter_repo_objects(sorted(held(repository)), allow_patterns=allow_patterns):
      (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(repository / name, snapshot / name)
    snapshot.mkdir(parents=True, exist_ok=True)
    return str(snapshot)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  return repository, snapshot, revisions


def test_of_a_hub_id_one_form_is_fetched_and_only_what_is_needed(hub):
  repository, snapshot, _ = hub
  write_repository(repository)
  stable_diffusion.sizes("org/name")
  assert held(snapshot) == NAMED | {"text_encoder/config.json"}
  load.source_files("org/name")
  assert held(snapshot) == NAMED | {"text_encoder/config.json"} | WEIGHTS
  read_all("org/name")
  assert held(snapshot) == NAMED | WEIGHTS | TOKENIZER | TEXT


@pytest.mark.parametrize("suffix", weight_files.SUFFIXES)
def test_every_form_is_found_on_the_hub(hub, suffix):
  repository, snapshot, revisions = hub
  write_networks(repository, suffixes=(suffix,), parts=("unet",))
  write_networks(repository, parts=("vae",))
  assert len(load.source_files("org/name@flax")) == 2
  assert len(held(snapshot)) == 4 and set(revisions) == {"flax"}


def test_shards_are_fetched_from_the_hub(hub):
  repository, _, _ = hub
  write_shards(write_networks(repository, parts=("vae",)))
  (repository / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.bin").write_text("of another form")
  assert list(weight_files.open_folder(fetch.local("org/name", ("unet",)), ("unet",)).tensors) == [
    "unet.0.bias",
    "unet.1.bias",
  ]


def test_a_tokenizer_of_its_own_is_fetched_from_the_hub(hub):
  repository, _, _ = hub
  text_folders.write_tokenizer(repository)
  assert class_name_encoding.load_tokenizer("org/name")("a")["input_ids"]


def test_a_repository_without_the_weights_is_named(hub):
  repository, _, _ = hub
  write_networks(repository, parts=("unet",))
  with pytest.raises(ValueError, match=r"hub id 'org/name' holds no weights of vae/, or the network is off") as caught:
    load.load_pretrained("org/name", {})
  one_line(caught)


HUB_CHILD = "import sys; from vpd_jax.convert import fetch; print(fetch.local(sys.argv[1], ('unet',)))"


def ask_hub(tmp_path, source, **environment):
  """(seconds, result) of a process whose hub is a port of this machine at which nobody answers."""
  environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"} | environment
  started = time.monotonic()
  command = [sys.executable, "-c", HUB_CHILD, source]
  result = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
  return time.monotonic() - started, result


def test_a_hub_that_refuses_is_told_at_once_in_one_line(tmp_path):
  seconds, result = ask_hub(tmp_path, "org/name")
  assert result.stderr.strip().splitlines()[-1] == (
    "vpd_jax.errors.UserError: 'org/name' is no local path, and as a hub id it cannot be fetched ([Errno 111] "
    "Connection refused); check the name, the network and HF_HUB_OFFLINE, or give a local folder."
  )
  assert seconds < 30, "imports included"


def test_offline_the_cache_of_the_hub_is_used(tmp_path):
  cached = tmp_path / "hf" / "hub" / "models--org--name"
  write_networks(cached / "snapshots" / ("0" * 40), parts=("unet",))
  (cached / "refs").mkdir()
  (cached / "refs" / "main").write_text("0" * 40)
  _, result = ask_hub(tmp_path, "org/name", HF_HUB_OFFLINE="1")
  assert result.stdout.strip() == str(cached / "snapshots" / ("0" * 40)), result.stderr
  _, result = ask_hub(tmp_path, "org/other", HF_HUB_OFFLINE="1")
  last = result.stderr.strip().splitlines()[-1]
  assert (
    last.startswith("vpd_jax.errors.UserError: 'org/other' is no local path") and "offline mode is enabled" in last
  ), result.stderr
