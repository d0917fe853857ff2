"""Class vectors from files, from names, and where they are taken from."""

import functools
import importlib.resources
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import pth
from tests.helpers.paths import ROOT
from tests.helpers.text_folders import MERGES, SIZES, VOCABULARY, random_weights, write_diffusers, write_tokenizer
from vpd_jax.checkpoints import class_name_encoding
from vpd_jax.convert import rules
from vpd_jax.convert.tables import clip

SCRIPT = ROOT / "scripts" / "embed_class_names.py"
NAMES = ("dining_room", "Office", "cafe's 2nd floor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_diffusers(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def text(folder):
  return class_name_encoding.load_text_encoder(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokenizer(folder):
  return class_name_encoding.load_tokenizer(folder)


def tokens_by_hand(sentence, max_length):
  """Byte-pair encoding where every merge, in turn, is made wherever it can be."""
  ids = []
  for word in sentence.lower().replace("'s", " 's").replace("2", "2 ").replace(".", " .").split():
    symbols = [*word[:-1], f"{word[-1]}</w>"]
    for left, right in (merge.split() for merge in MERGES):
      i = 0
      while i < len(symbols) - 1:
        if symbols[i : i + 2] == [left, right]:
          symbols[i : i + 2] = [left + right]
        i += 1
    ids += [VOCABULARY[symbol] for symbol in symbols]
  return [VOCABULARY["<|startoftext|>"], *ids[: max_length - 2], VOCABULARY["<|endoftext|>"]]


def encode_by_hand(name, templates, states, max_length):
  """VPD's recipe, sentence by sentence; the end is where it was put, and what follows it cannot matter."""
  vectors = []
  for template in templates:
    tokens = tokens_by_hand(template.format(name.replace("_", " ")), max_length)
    padded = np.zeros((1, max_length), np.int32)
    padded[0, : len(tokens)] = tokens
    vectors.append(np.asarray(states(padded))[0, len(tokens) - 1])
  return sum(vectors) / len(vectors)


@functools.cache
def first_templates():
  return class_name_encoding.read_templates("imagenet_80")[:5]


def test_the_templates_are_eighty_different_sentences():
  templates = class_name_encoding.read_templates("imagenet_80")
  assert len(set(templates)) == 80 and all(t.count("{}") == 1 for t in templates)
  assert class_name_encoding.read_templates("a picture of {}") == ("a picture of {}",)
  assert (importlib.resources.files("vpd_jax") / "data/assets/prompt_templates.json").is_file()
  with pytest.raises(ValueError, match=r"templates='imagenet_8' is unknown; choose one of \['imagenet_80', 'name'"):
    class_name_encoding.read_templates("imagenet_8")


@pytest.mark.parametrize("max_length", [20, 32])
def test_encoding_is_the_mean_over_the_sentences(text, tokenizer, max_length):
  found = class_name_encoding.encode(
    NAMES, tokenizer=tokenizer, text=text, templates=first_templates(), max_length=max_length
  )
  states = jax.jit(lambda tokens: text.spec.merge(text.weights)(tokens).last)
  lengths = [len(tokens_by_hand(t.format("dining room"), 32)) for t in first_templates()]
  assert min(lengths) < 20 < max(lengths), "20 must cut some sentences and not others"
  expected = [encode_by_hand(name, first_templates(), states, max_length) for name in NAMES]
  assert found.dtype == np.float32 and found.shape == (3, SIZES.width)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_encoding_compiles_once_for_all_names(text, tokenizer, caplog):
  with jax.log_compiles(), caplog.at_level("WARNING"):
    class_name_encoding.encode(["a", "bed room", "c_d"], tokenizer=tokenizer, text=text, templates=("the {}", "{}"))
  assert sum("Finished XLA compilation of jit(mean_vector)" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.reference
def test_vectors_equal_those_of_transformers(folder, text, tokenizer):
  import torch
  from transformers import CLIPTextModel

  templates = class_name_encoding.read_templates("imagenet_80")
  theirs = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()
  found = class_name_encoding.encode(NAMES, tokenizer=tokenizer, text=text, templates=templates)
  for name, vector in zip(NAMES, found, strict=True):
    sentences = [template.format(name.replace("_", " ")) for template in templates]
    batch = tokenizer(sentences, truncation=True, max_length=20, padding="max_length", return_tensors="pt")
    with torch.no_grad():
      expected = theirs(input_ids=batch["input_ids"]).pooler_output.mean(dim=0).numpy()
    np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5, err_msg=name)


def test_what_cannot_be_encoded_is_refused(text, tokenizer, tmp_path):
  encode = functools.partial(class_name_encoding.encode, tokenizer=tokenizer, text=text, templates=("{}",))
  with pytest.raises(ValueError, match="there are 0 names and 1 templates"):
    encode([])
  with pytest.raises(ValueError, match="max_length=33 must be between 2 and the 32 positions"):
    encode(NAMES, max_length=33)
  larger = class_name_encoding.load_tokenizer(
    write_diffusers(tmp_path / "larger", vocabulary=VOCABULARY | {"<|endoftext|>": len(VOCABULARY) + 7})
  )
  with pytest.raises(ValueError, match=rf"gives id {len(VOCABULARY) + 7}, the text encoder knows {len(VOCABULARY)}"):
    encode(NAMES, tokenizer=larger)
  end, start = VOCABULARY["<|startoftext|>"], VOCABULARY["<|endoftext|>"]
  write_tokenizer(tmp_path / "swapped", VOCABULARY | {"<|startoftext|>": start, "<|endoftext|>": end})
  with pytest.raises(ValueError, match=f"end of text, id {end}, is not the largest id"):
    encode(NAMES, tokenizer=class_name_encoding.load_tokenizer(tmp_path / "swapped"))


def test_tokenizers_are_found_in_both_places_and_damage_is_named(folder, tmp_path):
  for place in (folder, folder / "tokenizer"):
    assert class_name_encoding.load_tokenizer(place).eos_token_id == len(VOCABULARY) - 1
  with pytest.raises(ValueError, match=r"holds no CLIP tokenizer: vocab.json and merges.txt missing"):
    class_name_encoding.load_tokenizer(tmp_path)
  write_tokenizer(tmp_path / "tokenizer")
  (tmp_path / "tokenizer" / "vocab.json").write_text('{"a": 0,')
  with pytest.raises(ValueError, match=r"^the tokenizer in .* cannot be read \(.*\); fetch its files again.$"):
    class_name_encoding.load_tokenizer(tmp_path)


VECTORS = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)


def write_vectors(path, **arrays):
  """One array of any name, or several, in the format of the suffix."""
  if path.suffix == ".NPY":
    with path.open("wb") as file:  # numpy would add an ending
      np.save(file, next(iter(arrays.values())))
  elif path.suffix == ".npy":
    np.save(path, next(iter(arrays.values())))
  elif path.suffix == ".npz":
    np.savez(path, **arrays)
  else:
    pth.write_zip(path, {name.replace("__", "."): pth.tensor(value) for name, value in arrays.items()})
  return path


@pytest.mark.parametrize(
  ("file", "arrays"),
  [
    ("a.npy", {"x": VECTORS.astype(np.float64)}),
    ("a.NPY", {"x": VECTORS}),
    ("a.npz", {"anything": VECTORS}),
    ("a.npz", {"names": np.array(NAMES), "class_vectors": VECTORS}),
    ("a.pth", {"class_embeddings": VECTORS}),
    ("a.pth", {"encoder__class_embeddings": VECTORS, "other": np.zeros((2, 2), np.float32)}),
    ("a.pth", {"module__encoder__class_embeddings": VECTORS}),
  ],
)
def test_every_format_gives_the_same_vectors(tmp_path, file, arrays):
  found = class_name_encoding.read(write_vectors(tmp_path / file, **arrays))
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, VECTORS)


def test_a_bare_tensor_and_a_wrapped_one_are_read(tmp_path):
  pth.write_zip(tmp_path / "a.pth", pth.tensor(VECTORS))
  np.testing.assert_array_equal(class_name_encoding.read(tmp_path / "a.pth"), VECTORS)
  pth.write_legacy(tmp_path / "b.pth", {"model": {"encoder.class_embeddings": pth.tensor(VECTORS)}, "epoch": 3})
  np.testing.assert_array_equal(class_name_encoding.read(tmp_path / "b.pth"), VECTORS)


@pytest.mark.parametrize(
  ("file", "arrays", "message"),
  [
    ("a.npy", {"x": VECTORS[0]}, r"holds float32 \[16\]; class vectors are floats \[classes, width\]"),
    ("a.npy", {"x": np.zeros((3, 4), np.int64)}, r"holds int64 \[3, 4\]"),
    ("a.npy", {"x": np.zeros((0, 4), np.float32)}, r"holds float32 \[0, 4\]"),
    ("a.npy", {"x": np.array([[1.0, np.nan]])}, "holds 1 values that are not finite"),
    ("a.npy", {"x": np.array([[{}]])}, "is damaged or not a numpy file"),
    ("a.npz", {"a": VECTORS, "b": VECTORS}, r"holds the arrays a, b; it must hold one, or one named"),
    ("a.pth", {"weight": VECTORS}, r"holds \['weight'\]; it must hold a tensor alone, or one of"),
  ],
)
def test_files_that_hold_no_vectors_are_refused_in_one_line(tmp_path, file, arrays, message):
  with pytest.raises(ValueError, match=message) as caught:
    class_name_encoding.read(write_vectors(tmp_path / file, **arrays))
  assert "\n" not in str(caught.value)


def test_missing_unknown_and_damaged_files_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"must end in one of \['.npy', '.npz', '.pth'\]"):
    class_name_encoding.read("vectors.txt")
  with pytest.raises(ValueError, match=r"are not a file; give init\.pretrained"):
    class_name_encoding.read(tmp_path / "none.npy")
  for name in ("a.npy", "a.npz", "a.pth"):
    (tmp_path / name).write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="is damaged"):
      class_name_encoding.read(tmp_path / name)


def resolve(**changes):
  options = {"setting": "", "classes": NAMES, "width": 16, "pretrained": "", "dtype": jnp.float32} | changes
  return class_name_encoding.resolve(**options)


def test_a_file_goes_before_the_text_encoder_and_random_numbers_are_asked_for(tmp_path, folder):
  file = str(write_vectors(tmp_path / "a.npy", x=VECTORS))
  found, line = resolve(setting=file, pretrained=str(folder))
  np.testing.assert_array_equal(found, VECTORS)
  assert line == f"class vectors: 3 x 16 from {file}"
  found, line = resolve(setting="random:7", pretrained=str(folder))
  np.testing.assert_array_equal(found, class_name_encoding.random_class_vectors(3, 16, 7))
  assert found.dtype == np.float32 and "(seed 7), for smoke tests only" in line


def test_names_are_encoded_by_the_pretrained_folder(folder, text, tokenizer):
  found, line = resolve(pretrained=str(folder))
  templates = class_name_encoding.read_templates("imagenet_80")
  expected = class_name_encoding.encode(NAMES, tokenizer=tokenizer, text=text, templates=templates)
  np.testing.assert_array_equal(found, expected)
  assert line == f"class vectors: 3 x 16 from the names, templates imagenet_80, text encoder of {folder}"


def test_a_single_file_needs_a_tokenizer_beside_it(tmp_path, folder, text):
  table = clip.text(["cond_stage_model.transformer.text_model.final_layer_norm.weight"])
  tensors = {n: pth.tensor(x) for n, x in rules.to_source(random_weights(SIZES), table).items()}
  file = str(pth.write_zip(tmp_path / "v1.ckpt", {"state_dict": tensors}))
  with pytest.raises(ValueError, match=r"v1.ckpt' brings no tokenizer; give init.pretrained a diffusers folder"):
    resolve(pretrained=file)
  with pytest.raises(ValueError, match="the sizes of its text encoder are not known"):
    resolve(pretrained=file, tokenizer=str(folder))
  found, _ = resolve(pretrained=file, tokenizer=str(folder), sizes=SIZES)
  np.testing.assert_array_equal(found, resolve(pretrained=str(folder))[0])


CHOICES = r"give init.pretrained a diffusers folder with .*method.class_vectors=FILE .*=random:SEED for smoke tests\.?$"


def test_nothing_to_take_them_from_names_the_choices(tmp_path, folder):
  with pytest.raises(ValueError, match=f"method.class_vectors and init.pretrained are empty; {CHOICES}"):
    resolve()
  with pytest.raises(ValueError, match=f"holds no CLIP tokenizer.* Or else: {CHOICES}"):
    resolve(pretrained=str(tmp_path))
  with pytest.raises(ValueError, match=f"is a folder without text_encoder/.* Or else: {CHOICES}"):
    resolve(pretrained=str(tmp_path), tokenizer=str(folder))
  for setting in ("random:", "random:x", "random:-1"):
    with pytest.raises(ValueError, match=f"method.class_vectors='{setting}' needs a whole number after 'random:'"):
      resolve(setting=setting)


def test_vectors_of_another_size_are_refused(tmp_path, folder):
  file = str(write_vectors(tmp_path / "a.npy", x=VECTORS))
  for changes in ({"width": 64}, {"classes": NAMES[:2]}):
    with pytest.raises(ValueError, match=rf"are \[3, 16\], the model needs \[\d, \d+\].* {CHOICES}"):
      resolve(setting=file, **changes)
  with pytest.raises(ValueError, match=f"is 16 wide, the model's context needs 64; {CHOICES}"):
    resolve(pretrained=str(folder), width=64)


def run_script(*arguments, cwd):
  return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_script_writes_what_read_takes(tmp_path, folder, text, tokenizer):
  (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
  options = ("--templates=a photo of a {}", "--max_length=24")
  done = run_script(f"--weights={folder}", "--names=names.txt", "--output=out/v.npz", *options, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("\nwrote out/v.npz: 3 names, width 16, 1 templates\n")
  assert re.search(r"^class names: 3 names in [\d.]+ s", done.stdout, re.MULTILINE)
  expected = class_name_encoding.encode(
    NAMES, tokenizer=tokenizer, text=text, templates=("a photo of a {}",), max_length=24
  )
  np.testing.assert_allclose(class_name_encoding.read(tmp_path / "out" / "v.npz"), expected, rtol=0, atol=1e-6)
  with np.load(tmp_path / "out" / "v.npz") as arrays:
    assert tuple(arrays["names"]) == NAMES


def test_the_script_fails_in_one_line(tmp_path):
  done = run_script(f"--weights={tmp_path}", "--names=a,b", "--output=v.npz", cwd=tmp_path)
  assert done.returncode == 1 and len(done.stdout.splitlines()) == 1, "its arguments"
  assert done.stderr.startswith("embed_class_names: ") and len(done.stderr.splitlines()) == 1
  assert "holds no CLIP tokenizer" in done.stderr and not (tmp_path / "v.npz").exists()
