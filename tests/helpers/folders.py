"""Folders as the hub and buckets have them, small and in every form, and what is read of them."""

import json

import jax.numpy as jnp
import numpy as np

from tests.helpers import flax_form, stable_diffusion_folders, text_folders
from vpd_jax.checkpoints import class_name_encoding
from vpd_jax.convert import load
from vpd_jax.convert.formats import write
from vpd_jax.convert.tables import stable_diffusion

CONFIGS = {"unet": stable_diffusion_folders.SD1["unet"], "vae": stable_diffusion_folders.SD1["vae"]}
WEIGHTS = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
NAMED = {f"{part}/config.json" for part in ("unet", "vae")}
TOKENIZER = {f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
TEXT = {"text_encoder/config.json", "text_encoder/model.safetensors"}


def state(value=1.0):
  return {"conv_in.weight": np.full((2, 3), value, np.float32)}


def write_networks(folder, *, suffixes=(".safetensors",), parts=("unet", "vae")):
  """Networks in several forms, each form with a number of its own, and their configs."""
  folder.mkdir(parents=True, exist_ok=True)
  stable_diffusion_folders.folder(folder, {part: CONFIGS[part] for part in parts})
  for part in parts:
    for i, suffix in enumerate(suffixes):
      if suffix == ".msgpack":
        flax_form.write(folder / part / "diffusion_flax_model.msgpack", state(i))
      else:
        write.write(folder / part / "x.safetensors", state(i))  # The kind is told by the content.
        (folder / part / "x.safetensors").rename(folder / part / f"diffusion_pytorch_model{suffix}")
  return folder


def held(folder):
  return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def one_line(caught):
  assert "\n" not in str(caught.value)
  return str(caught.value)


def write_repository(folder):
  """All that a repository of Stable Diffusion may hold, in every form."""
  write_networks(folder, suffixes=(".bin", ".fp16.safetensors", ".msgpack", ".safetensors", ".non_ema.bin"))
  text_folders.write_diffusers(folder)
  for extra in ("v1-5.ckpt", "README.md", "safety_checker/model.safetensors", "vae/diffusion_pytorch_model.onnx"):
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).write_text("not needed")


def read_all(source):
  """What a run with class vectors from names reads of a folder."""
  assert set(stable_diffusion.sizes(source)) == {"unet", "vae", "text"}
  assert load.source_files(source).keys() == WEIGHTS
  class_name_encoding.load_tokenizer(source)
  text = class_name_encoding.load_text_encoder(source, dtype=jnp.float32)
  expected = text_folders.random_weights(text_folders.SIZES)
  assert all(np.array_equal(text.weights[name], value) for name, value in expected.items())


def write_shards(folder):
  (folder / "unet").mkdir()
  names = [f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
  for i, name in enumerate(names):
    write.write(folder / "unet" / name, {f"{i}.bias": np.ones(2, np.float32)})
  index = {"weight_map": {f"{i}.bias": name for i, name in enumerate(names)}}
  (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
