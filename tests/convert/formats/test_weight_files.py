"""The readers and writers of foreign files, without torch."""

import fnmatch
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import pth
from vpd_jax.convert import fetch
from vpd_jax.convert.formats import pickles, weight_files, write

LAYOUTS = pytest.mark.parametrize("save", [pth.write_zip, pth.write_legacy])


def arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "b.weight": rng.normal(size=(3, 2, 2, 2)).astype(np.float32),
    "a.half": rng.normal(size=(4,)).astype(np.float16),
    "a.brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "a.count": np.asarray(7),
  }


def assert_same(tensors, expected, *, ordered=True):
  """Of a .safetensors the order is the library's."""
  assert list(tensors) == list(expected) if ordered else tensors.keys() == expected.keys()
  for name, value in expected.items():
    read = np.asarray(tensors[name])
    assert read.dtype == value.dtype and read.shape == value.shape == tensors[name].shape, name
    assert read.tobytes() == value.tobytes(), name


@LAYOUTS
def test_pickled_files_give_their_tensors_bit_for_bit(tmp_path, save):
  path = save(tmp_path / "w.pth", {name: pth.tensor(value) for name, value in arrays().items()})
  assert_same(weight_files.open_file(path).tensors, arrays())


@LAYOUTS
def test_views_of_one_storage_are_read_by_offset_and_stride(tmp_path, save):
  storage = pth.Storage(np.arange(24, dtype=np.float32))
  path = save(
    tmp_path / "w.pth",
    {"t": pth.tensor(storage, shape=(2, 3), strides=(1, 4), offset=5), "e": pth.tensor(storage, shape=(0, 3))},
  )
  tensors = weight_files.open_file(path).tensors
  np.testing.assert_array_equal(tensors["t"], [[5, 9, 13], [6, 10, 14]])
  assert np.asarray(tensors["e"]).shape == (0, 3)


@LAYOUTS
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_training_objects_beside_the_weights_are_inert(tmp_path, save, wrapper):
  callback = pth.foreign("pytorch_lightning.callbacks", "ModelCheckpoint")()
  callback.best, callback.paths = 0.5, ["a"]
  moments = {0: {"step": 3, "exp_avg": pth.tensor(np.ones(3, np.float32))}}
  extras = {
    "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    "callbacks": {callback.__class__: callback},
    "hyper": pth.Call("omegaconf.dictconfig", "DictConfig", {"a": 1}),
  }
  weights = {f"module.{name}": pth.tensor(value) for name, value in arrays().items()}
  content = {wrapper: weights, "epoch": 1, **extras} if wrapper else weights
  opened = weight_files.open_file(save(tmp_path / "w.ckpt", content))
  assert_same(opened.tensors, arrays())
  assert opened.others == {}


def test_entries_that_are_no_tensors_are_listed(tmp_path):
  content = {"w": pth.tensor(np.ones(2, np.float32)), "epoch": 3, "x": pth.Call("a", "b")}
  opened = weight_files.open_file(pth.write_zip(tmp_path / "w.pth", content))
  assert (list(opened.tensors), opened.others) == (["w"], {"epoch": "int", "x": "b"})


def test_parameters_and_tensor_subclasses_are_tensors(tmp_path):
  inner = pth.tensor(np.ones(2, np.float32))
  wrapped = pth.Call("torch._tensor", "_rebuild_from_type_v2", inner.function, pth.foreign("a", "B"), inner.args, {})
  content = {"p": pth.Call("torch._utils", "_rebuild_parameter", inner, True, {}), "s": wrapped}
  assert list(weight_files.open_file(pth.write_zip(tmp_path / "w.pth", content)).tensors) == ["p", "s"]


@LAYOUTS
@pytest.mark.parametrize(
  "module, name", [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("subprocess", "run")]
)
def test_a_file_cannot_run_anything(tmp_path, save, module, name):
  mark = tmp_path / "mark"
  command = f"open({str(mark)!r}, 'w')" if name == "eval" else f"touch {mark}"
  path = save(tmp_path / "w.pth", {"w": pth.tensor(np.ones(2, np.float32)), "evil": pth.Call(module, name, command)})
  assert list(weight_files.open_file(path).tensors) == ["w"]
  assert not mark.exists()


def test_the_same_pickle_does_run_under_plain_pickle(tmp_path):
  """The test above would notice: Python's own unpickler obeys such a file."""
  mark = tmp_path / "mark"
  pickle.loads(pickle.dumps(_Evil(str(mark))))
  assert mark.exists()


class _Evil:
  def __init__(self, path: str):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_two_readings_share_no_state():
  """What one file can reach and alter is not there for the next."""
  first, second = (pickles._Unpickler(io.BytesIO()).find_class("collections", "OrderedDict") for _ in range(2))
  assert first is not second


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_written_files_read_back_bit_for_bit_and_a_pth_in_order(tmp_path, ending):
  state = arrays() | {"t": np.arange(6, dtype=np.float32).reshape(2, 3).T, "empty": np.zeros((0, 2), np.float32)}
  write.write(tmp_path / f"w{ending}", state)
  assert_same(weight_files.open_file(tmp_path / f"w{ending}").tensors, state, ordered=ending == ".pth")
  assert os.listdir(tmp_path) == [f"w{ending}"]


def test_arrays_that_are_not_contiguous_are_not_scrambled(tmp_path):
  """safetensors 0.8.0 writes the bytes of an array as they lie; its own reader must find the numbers."""
  numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  state = {"t": numbers.transpose(2, 0, 1), "every": numbers[:, ::2], "back": numbers[::-1], "one": np.float32(3)}
  write.write(tmp_path / "w.safetensors", {name: np.asarray(value) for name, value in state.items()})
  for name, value in load_file(tmp_path / "w.safetensors").items():
    np.testing.assert_array_equal(value, state[name], strict=True)


def test_a_failed_write_leaves_nothing(tmp_path):
  with pytest.raises(ValueError, match="x is complex64, which this format cannot hold"):
    write.write(tmp_path / "w.pth", {"x": np.zeros(2, np.complex64)})
  with pytest.raises(ValueError, match="must end in one of"):
    write.write(tmp_path / "w.bin", {})
  with pytest.raises(ValueError, match="x is complex64, which this format cannot hold"):
    write.write(tmp_path / "w.safetensors", {"x": np.zeros(2, np.complex64)})
  assert not os.listdir(tmp_path)


def test_tensors_are_read_one_by_one(tmp_path):
  state = {f"{i}.weight": np.full((256, 256), i, np.float32) for i in range(16)}
  write.write(tmp_path / "w.pth", state)
  tracemalloc.start()
  for tensor in weight_files.open_file(tmp_path / "w.pth").tensors.values():
    np.asarray(tensor).sum()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 3 * state["0.weight"].nbytes


def test_shards_of_a_folder_are_joined(tmp_path):
  names = list(arrays())
  (tmp_path / "unet").mkdir()
  for i, part in enumerate((names[:2], names[2:])):
    write.write(tmp_path / "unet" / f"s{i}.safetensors", {name: arrays()[name] for name in part})
  index = {"weight_map": {name: f"s{i // 2}.safetensors" for i, name in enumerate(names)}}
  (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
  opened = weight_files.open_folder(tmp_path, ("unet",))
  assert_same(opened.tensors, {f"unet.{name}": value for name, value in arrays().items()}, ordered=False)
  assert [file.name for file in opened.files] == ["s0.safetensors", "s1.safetensors"]


def test_a_damaged_index_is_named(tmp_path):
  (tmp_path / "unet").mkdir()
  (tmp_path / "unet" / "model.safetensors.index.json").write_text("[]")
  with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not an index of shards"):
    weight_files.open_folder(tmp_path, ("unet",))


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])
  return path


def bad_files(tmp_path):
  """(path, part of the message)"""
  state = {"w": np.ones((64, 64), np.float32)}
  tensors = {"w": pth.tensor(state["w"])}
  write.write(tmp_path / "cut.safetensors", state)
  yield cut(tmp_path / "cut.safetensors", 9000), r"is damaged .*file not fully covered.*; fetch it again"
  write.write(tmp_path / "header.safetensors", state)
  yield cut(tmp_path / "header.safetensors", 40), r"is damaged .*invalid header length.*; fetch it again"
  yield cut(pth.write_zip(tmp_path / "cut.pth", tensors), 9000), "its end, where the table of contents lies, is missing"
  yield cut(pth.write_legacy(tmp_path / "old.pth", tensors), 9000), "bytes are missing at its end"
  yield cut(pth.write_legacy(tmp_path / "older.pth", tensors), 200), "damaged or not a PyTorch checkpoint"
  outside = pth.tensor(pth.Storage(np.ones(4, np.float32)), shape=(5,), strides=(1,))
  yield pth.write_zip(tmp_path / "outside.pth", {"w": outside}), "reaches outside its storage"
  yield pth.write_zip(tmp_path / "module.pth", {"model": pth.Call("a", "Net")}), "holds no weights by name"
  yield pth.write_zip(tmp_path / "bare.pth", pth.Call("a", "Net")), "holds no weights by name, but Net"
  texts = {
    "web.ckpt": "<!doctype html>",
    "lfs.ckpt": "version https://git-lfs.github.com/spec/v1",
    "text.ckpt": "hello",
  }
  wanted = {"web.ckpt": "is a web page", "lfs.ckpt": "git lfs pull", "text.ckpt": "is not a checkpoint"}
  for name, text in texts.items():
    (tmp_path / name).write_text(text)
    yield tmp_path / name, wanted[name]
  (tmp_path / "empty.pth").write_bytes(b"")
  yield tmp_path / "empty.pth", "is an empty file"
  (tmp_path / "plain.pth").write_bytes(pickle.dumps({"w": 1}, 2))
  yield tmp_path / "plain.pth", "is a pickle, but not one of PyTorch"
  with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
    archive.writestr("a", "b")
  yield tmp_path / "zip.pth", "zip archive without a PyTorch checkpoint"
  yield tmp_path / "absent.pth", "is not a file"


def test_a_bad_file_is_one_line_that_names_it(tmp_path):
  for path, message in bad_files(tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
      weight_files.open_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_readable_weights_says_what_it_holds(tmp_path):
  (tmp_path / "unet").mkdir()
  (tmp_path / "unet" / "model.onnx").touch()
  with pytest.raises(ValueError, match=r"holds no weights \(\['model\.onnx'\]\); complete it with"):
    weight_files.open_folder(tmp_path, ("unet",))
  with pytest.raises(ValueError, match="does not exist"):
    weight_files.open_folder(tmp_path, ("vae",))


@pytest.mark.parametrize("stem, form", [("diffusion_pytorch_model", "safetensors"), ("model", "safetensors")])
@pytest.mark.parametrize("older", [False, True])
def test_shards_of_a_variant_are_found(tmp_path, stem, form, older):
  """diffusers' and transformers' own names: `_add_variant` puts the variant before the last part."""
  (tmp_path / "unet").mkdir()
  shard = f"{stem}-00001-of-00001.fp16.{form}" if older else f"{stem}.fp16-00001-of-00001.{form}"
  index = f"{stem}.fp16.{form}.index.json" if older else f"{stem}.{form}.index.fp16.json"
  write.write(tmp_path / "unet" / shard, arrays())
  (tmp_path / "unet" / index).write_text(json.dumps({"weight_map": dict.fromkeys(arrays(), shard)}))
  opened = weight_files.open_folder(tmp_path, ("unet",))
  assert_same(opened.tensors, {f"unet.{name}": value for name, value in arrays().items()}, ordered=False)
  patterns = fetch._patterns("unet", ".fp16.safetensors")
  assert all(any(fnmatch.fnmatch(f"unet/{name}", pattern) for pattern in patterns) for name in (shard, index))


def safetensors(path, header, data=b"\0" * 64):
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)
  return path


@pytest.mark.parametrize("kind", ["F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2", "C64", "NEW"])
def test_types_of_safetensors_that_are_not_read_are_named(tmp_path, kind):
  header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
  header["w"] = {"dtype": kind, "shape": [4], "data_offsets": [8, 12]}
  with pytest.raises(ValueError, match=rf"holds 1 tensors of type {kind}, like 'w', .* save them in float32") as caught:
    weight_files.open_file(safetensors(tmp_path / "w.safetensors", header))
  assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8_is_read(tmp_path, kind):
  state = {"w": np.arange(6).reshape(2, 3).astype(kind), "a": np.ones(2, np.float32)}
  write.write(tmp_path / "w.safetensors", state)
  assert_same(weight_files.open_file(tmp_path / "w.safetensors").tensors, state, ordered=False)


def typed(kind, array):
  """A tensor as torch pickles those of types without a storage of their own."""
  storage = pth.Storage(array.view(np.uint8))
  args = (storage, 0, array.shape, (1,), False, pth.Call("collections", "OrderedDict"), pth.foreign("torch", kind))
  return pth.Call("torch._utils", "_rebuild_tensor_v3", *args)


@LAYOUTS
def test_types_of_pickled_files_that_are_not_read_are_named(tmp_path, save, monkeypatch):
  monkeypatch.setitem(pth.TYPES, "uint8", "UntypedStorage")
  monkeypatch.setitem(pth.TYPES, "complex64", "ComplexFloatStorage")
  whole = pth.tensor(np.ones(2, np.float32))
  for kind in ("float8_e4m3fn", "float8_e5m2fnuz", "float4_e2m1fn_x2", "complex32", "bits8"):
    path = save(tmp_path / "w.ckpt", {"state_dict": {"a": whole, "w": typed(kind, np.ones(4, np.uint8))}})
    with pytest.raises(ValueError, match=rf"holds 1 tensors of type {kind}, like 'w', .* save them in float32"):
      weight_files.open_file(path)
  path = save(tmp_path / "w.ckpt", {"w": pth.tensor(np.ones(3, np.complex64)), "a": whole})
  with pytest.raises(ValueError, match="1 tensors of type ComplexFloat, like 'w'"):
    weight_files.open_file(path)
  read = weight_files.open_file(
    save(tmp_path / "w.ckpt", {"w": typed("uint16", np.arange(4, dtype=np.uint16))})
  ).tensors
  assert_same(read, {"w": np.arange(4, dtype=np.uint16)})


@pytest.mark.parametrize(
  "form", ["module._orig_mod.{}", "_orig_mod.module.{}", "_orig_mod.{}", "_fsdp_wrapped_module.{}"]
)
def test_what_torch_puts_before_names_is_taken_off(tmp_path, form):
  write.write(tmp_path / "w.safetensors", {form.format(name): value for name, value in arrays().items()})
  assert_same(weight_files.open_file(tmp_path / "w.safetensors").tensors, arrays(), ordered=False)
  inner = {"a._orig_mod.weight": np.ones(2, np.float32), "b._checkpoint_wrapped_module.bias": np.ones(3, np.float32)}
  write.write(tmp_path / "w.pth", inner)
  assert list(weight_files.open_file(tmp_path / "w.pth").tensors) == ["a.weight", "b.bias"]


def test_tensors_of_several_names_that_are_stored_once_have_all_of_them(tmp_path):
  """As safetensors.torch.save_model writes them."""
  header = {"__metadata__": {"format": "pt", "z.weight": "a.weight"}}
  header["a.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
  tensors = weight_files.open_file(safetensors(tmp_path / "w.safetensors", header, b"\0" * 8)).tensors
  assert list(tensors) == ["a.weight", "z.weight"] and tensors["z.weight"] == tensors["a.weight"]
