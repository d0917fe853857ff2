"""Flax's msgpack files, read without Flax's classes and tensor by tensor."""

import json
import tracemalloc

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util

from tests.helpers import flax_form, oracle, text_folders
from vpd_jax.checkpoints import class_name_encoding
from vpd_jax.convert.formats import flax_folder, lazy_tensor, weight_files
from vpd_jax.convert.tables import clip

# diffusers and transformers: Flax -> PyTorch, and the axes of PyTorch in those of Flax.
NAMES = {
  ("time_embedding/linear_1/kernel", 2): ("time_embedding.linear_1.weight", (1, 0)),
  ("conv_in/kernel", 4): ("conv_in.weight", (3, 2, 0, 1)),
  ("down_blocks_0/resnets_1/norm1/scale", 1): ("down_blocks.0.resnets.1.norm1.weight", (0,)),
  ("down_blocks_11/downsamplers_0/conv/bias", 1): ("down_blocks.11.downsamplers.0.conv.bias", (0,)),
  ("up_blocks_1/attentions_2/transformer_blocks_0/attn1/to_out_0/kernel", 2): (
    "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.weight",
    (1, 0),
  ),
  ("mid_block/attentions_0/transformer_blocks_0/ff/net_0/proj/bias", 1): (
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias",
    (0,),
  ),
  ("encoder/mid_block/attentions_0/query/kernel", 2): ("encoder.mid_block.attentions.0.query.weight", (1, 0)),
  ("text_model/embeddings/token_embedding/embedding", 2): ("text_model.embeddings.token_embedding.weight", (0, 1)),
  ("text_model/encoder/layers/11/mlp/fc1/kernel", 2): ("text_model.encoder.layers.11.mlp.fc1.weight", (1, 0)),
  ("text_model/embeddings/position_ids", 2): ("text_model.embeddings.position_ids", (0, 1)),
}


def test_names_and_axes_become_those_of_pytorch():
  for (name, ndim), (expected, axes) in NAMES.items():
    shape = (2, 3, 4, 5)[:ndim]
    tensor = lazy_tensor.LazyTensor(None, 0, np.dtype(np.float32), shape, lazy_tensor.contiguous(shape))
    found, moved = flax_folder.in_pytorch(tuple(name.split("/")), tensor)
    assert (found, moved.shape) == (expected, tuple(shape[axis] for axis in axes))


def assert_read(path, content):
  """The file holds the arrays of `content`, as Flax itself reads them."""
  path.write_bytes(serialization.msgpack_serialize(content))
  tensors = weight_files.open_file(path).tensors
  flat = traverse_util.flatten_dict(serialization.msgpack_restore(path.read_bytes()), sep=".")
  assert list(tensors) == list(flat)
  for name, value in flat.items():
    assert tensors[name].shape == value.shape and tensors[name].dtype == value.dtype, name
    assert np.asarray(tensors[name]).tobytes() == value.tobytes(), name


def test_all_lengths_of_msgpack_are_read(tmp_path):
  """Of names, maps and arrays: 4, 5, 8, 16 and 32 bits."""
  kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8)
  content = {f"k{i}": np.arange(7, dtype=kind) for i, kind in enumerate(kinds)}
  content |= {"n" * length: np.full(length, 3.0) for length in (20, 40, 300, 70000)}
  content["many"] = {str(i): np.zeros((), np.int32) for i in range(20)}
  content["shape"] = {"s": np.zeros((300, 1, 70000 // 300), np.int8), "d": np.zeros((1,) * 20, np.int8)}
  assert_read(tmp_path / "a.msgpack", content)
  array = msgpack.ExtType(1, msgpack.packb(((2,), "int8", b"ab")))
  (tmp_path / "b.msgpack").write_bytes(msgpack.packb({str(i): i for i in range(65536)} | {"last": array}))
  opened = weight_files.open_file(tmp_path / "b.msgpack")
  assert len(opened.others) == 65536 and bytes(np.asarray(opened.tensors["last"])) == b"ab"


def test_tensors_are_read_one_by_one_and_in_pytorchs_axes(tmp_path):
  state = {f"net.{i}.weight": np.random.default_rng(i).normal(size=(256, 512)).astype("f") for i in range(16)}
  flax_form.write(tmp_path / "w.msgpack", state)
  tracemalloc.start()
  for name, tensor in weight_files.open_file(tmp_path / "w.msgpack").tensors.items():
    assert np.array_equal(tensor, state[name])
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 3 * state["net.0.weight"].nbytes


def test_entries_that_are_no_arrays_are_listed(tmp_path):
  content = {"a": {"b": np.ones(2)}, "step": 70000, "rate": 0.5, "done": True, "c": 1j, "s": np.float32(2), "n": None}
  (tmp_path / "w.msgpack").write_bytes(serialization.msgpack_serialize(content | {"t": -3, "u": -70000}))
  opened = weight_files.open_file(tmp_path / "w.msgpack")
  kinds = {"step": "int", "rate": "float", "done": "bool", "c": "bytes", "s": "bytes", "n": "NoneType"}
  assert opened.others == kinds | {"t": "int", "u": "int"} and list(opened.tensors) == ["a.b"]


def test_divided_files_are_joined(tmp_path):
  """As transformers divides them: whole paths in the index, nested below."""
  for i in range(2):
    flax_form.write(tmp_path / "unet" / f"s{i}.msgpack", {f"layers.{i}.weight": np.full((2, 3), i, np.float32)})
  index = {"weight_map": {f"layers/{i}/kernel": f"s{i}.msgpack" for i in range(2)}}
  (tmp_path / "unet" / "flax_model.msgpack.index.json").write_text(json.dumps(index))
  tensors = weight_files.open_folder(tmp_path, ("unet",)).tensors
  assert {name: np.asarray(t).tolist() for name, t in tensors.items()} == {
    f"unet.layers.{i}.weight": [[i] * 3] * 2 for i in range(2)
  }


def bad_files(tmp_path):
  """(path, part of the message)"""

  def made(name, data):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name

  array = lambda *parts: msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(parts))})
  whole = serialization.msgpack_serialize({"a": np.ones(1000, np.float32), "b": np.ones(3, np.float32)})
  yield made("cut", whole[:2000]), r"\d+ bytes are missing at its end"
  yield made("cut_name", whole[:2]), "its end is missing"
  yield made("longer", whole + b"more"), "it goes on after its end, 4 bytes"
  yield made("strange", b"\x81\xa1a\xc1"), "byte 0xc1 begins nothing"
  yield made("object", array((1,), "object", b"12345678")), "it holds an array of object"
  yield made("type", array((8,), "float8_e4m3fn", b"12345678")), "holds 1 tensors of type float8_e4m3fn, like"
  yield made("short", array((2,), "float32", b"1234")), r"shape \[2\] does not fit the 4 bytes"
  yield made("negative", array((-2, -1), "float32", b"12345678")), "does not fit"
  yield made("deep", b"\x81\xa1a" * 100000), "damaged or not a file of Flax"
  yield made("plain", msgpack.packb({"step": 3})), r"holds no weights, but \['step'\]"


def test_a_bad_file_is_one_line_that_names_it(tmp_path):
  for path, message in bad_files(tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
      weight_files.open_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_the_text_encoder_of_a_flax_folder_is_that_of_pytorch(tmp_path, kind):
  """Sizes and weights, as class vectors need them."""
  folder = text_folders.write_diffusers(tmp_path)
  expected = class_name_encoding.load_text_encoder(folder, dtype=kind)
  file = folder / "text_encoder" / "model.safetensors"
  state = {name: np.asarray(tensor, kind) for name, tensor in weight_files.open_file(file).tensors.items()}
  file.unlink()
  flax_form.write(folder / "text_encoder" / "flax_model.msgpack", state)
  found = class_name_encoding.load_text_encoder(folder, dtype=kind)
  assert found.weights.keys() == expected.weights.keys()
  assert all(np.array_equal(found.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.parametrize("spelling", ["text_model.", "", "positions"])
def test_every_spelling_of_a_text_encoder_passes_through(tmp_path, spelling):
  state = oracle.weights("clip_text")
  targets = {n: jax.ShapeDtypeStruct(x.shape, np.float32) for n, x in oracle.plain_names(state).items()}
  given = {name.removeprefix("text_model.") if spelling == "" else name: value for name, value in state.items()}
  if spelling == "positions":
    given["text_model.embeddings.position_ids"] = np.arange(77)[None]
  named = clip.load_text(flax_form.write(tmp_path / "t.msgpack", given), targets)
  assert all(np.array_equal(named[name], value) for name, value in oracle.plain_names(state).items())
