"""Buckets: a local copy of what is needed, kept until it changes."""

import os
import shutil

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.helpers.buckets import bucket
from tests.helpers.folders import (
  NAMED,
  TEXT,
  TOKENIZER,
  WEIGHTS,
  held,
  one_line,
  read_all,
  state,
  write_networks,
  write_repository,
  write_shards,
)
from vpd_jax.checkpoints import class_name_encoding
from vpd_jax.convert import fetch, load
from vpd_jax.convert.formats import weight_files, write
from vpd_jax.convert.tables import stable_diffusion
from vpd_jax.monitoring import progress

__all__ = ["bucket"]  # a fixture


def test_of_a_bucket_one_form_is_copied_once_and_only_what_is_needed(bucket, capsys):
  folder, opened = bucket
  write_repository(folder / "sd")
  progress.show()
  read_all("gs://bucket/sd")
  wanted = NAMED | WEIGHTS | TOKENIZER | TEXT
  assert {name.removeprefix("sd/") for name in opened} == wanted
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fetch gs://bucket/sd (")]
  assert lines and all("vpd_jax/sd-" in line and " files in " in line for line in lines)
  assert not [name for name in held(folder.parent / "cache") if "unfinished" in name]
  opened.clear()
  read_all("gs://bucket/sd")
  progress.hide()
  assert not opened and "fetch" not in capsys.readouterr().out


def test_what_has_changed_in_a_bucket_is_fetched_anew(bucket):
  folder, _ = bucket
  for value in (1.0, 2.0):
    write.write(folder / "w.safetensors", state(value))
    os.utime(folder / "w.safetensors", (1e9 + value, 1e9 + value))
    [tensor] = weight_files.open_file(fetch.local("gs://bucket/w.safetensors")).tensors.values()
    np.testing.assert_array_equal(tensor, state(value)["conv_in.weight"])


def test_files_of_a_bucket_are_read(bucket):
  folder, _ = bucket
  folder.mkdir()
  np.save(folder / "vectors.npy", np.ones((2, 3), np.float32))
  assert class_name_encoding.read("gs://bucket/vectors.npy").shape == (2, 3)
  write.write(folder / "v1.safetensors", {"model.diffusion_model.a": np.ones(2, np.float32)})
  assert load.source_files("gs://bucket/v1.safetensors").keys() == {"v1.safetensors"}
  assert stable_diffusion.sizes("gs://bucket/v1.safetensors") is None


def test_shards_are_copied_from_a_bucket(bucket):
  folder, _ = bucket
  write_shards(write_networks(folder / "sd", parts=("vae",)))
  local = fetch.local("gs://bucket/sd", ("unet",))
  assert list(weight_files.open_folder(local, ("unet",)).tensors) == ["unet.0.bias", "unet.1.bias"]


def test_a_failed_copy_leaves_nothing_under_the_name(bucket, monkeypatch):
  folder, _ = bucket
  write.write(folder / "w.safetensors", state())

  def fail(read, write, _):
    write.write(read.read(3))
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(ValueError, match=r"cannot be copied to .*No space left.*XDG_CACHE_HOME") as caught:
      load.load_pretrained("gs://bucket/w.safetensors", {})
  one_line(caught)
  assert not held(folder.parent / "cache")
  assert fetch.local("gs://bucket/w.safetensors").read_bytes() == (folder / "w.safetensors").read_bytes()


def test_a_bucket_without_the_weights_is_one_line(bucket, monkeypatch):
  folder, _ = bucket
  write_networks(folder / "sd", parts=("unet",))
  cases = {
    "gs://bucket/absent": r"gs://bucket/absent does not exist; check the name",
    "gs://bucket/sd": r"gs://bucket/sd holds no weights of vae/; give a diffusers folder",
    "s3://bucket/sd": r"s3://bucket/sd needs a package that is not installed \(.*s3fs.*\); for gs:// .*vpd_jax\[gcs\]",
    "https://bucket/sd": r"https:// is not known; give gs://",
  }
  for source, message in cases.items():
    with pytest.raises(ValueError, match=message) as caught:
      load.load_pretrained(source, {})
    one_line(caught)
  monkeypatch.setattr(LocalFileSystem, "exists", lambda *_: (_ for _ in ()).throw(PermissionError("403: no access")))
  with pytest.raises(ValueError, match=r"cannot be reached \(403: no access\); check the name, the network and your"):
    load.load_pretrained("gs://bucket/sd", {})
