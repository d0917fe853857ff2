"""--mode=export: the network in a process without this package gives the numbers that it gives here."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import jax.export
import numpy as np
import pytest

import vpd_jax
from tests.helpers import one_convolution, tiny
from vpd_jax.config import loader
from vpd_jax.prediction import export

CONFIGS = {
  "one convolution": one_convolution.rooms,
  "depth": lambda: tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")),
  "segmentation": lambda: tiny.shrunk(loader.load("configs/ade20k_seg.py:meta_prompts,tiny")),
  "referring": lambda: tiny.shrunk(loader.load("configs/refcoco_refer.py:tiny")),
  "pose": lambda: tiny.shrunk(loader.load("configs/coco_pose.py:vpd,tiny")),
}
INPUTS = {
  "one convolution": {"image"},
  "depth": {"image", "class_id"},
  "segmentation": {"image"},
  "referring": {"image", "tokens"},
  "pose": {"image"},
}
OUTPUTS = {
  "one convolution": {"depth"},
  "depth": {"depth"},
  "segmentation": {"logits", "aux_logits"},
  "referring": {"logits"},
  "pose": {"heatmaps"},
}

# Argument: a folder of exported networks, each with inputs.npz.
ELSEWHERE = """
import importlib.util, pathlib, sys
import numpy as np
sys.modules["vpd_jax"] = sys.modules["flax"] = None  # whose import fails from here on
for folder in pathlib.Path(sys.argv[1]).iterdir():
  spec = importlib.util.spec_from_file_location("load", folder / "load.py")
  load = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(load)
  for count in (3, 1):
    given = {name: x[:count] for name, x in np.load(folder / "inputs.npz").items()}
    np.savez(folder / f"outputs{count}.npz", **load.run(**given))
"""


LONG = ("segmentation", "pose")  # what they add to the others is in their own tests
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CONFIGS]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Name to (folder, predictor), after a process without this package has run the network and those of its kind."""
  found = {}

  def write(names):
    root = tmp_path_factory.mktemp("exported")
    with one_convolution.known():
      for name in names:
        predictor = tiny.predictor(CONFIGS[name]())
        export.write(predictor, root / name)
        np.savez(root / name / "inputs.npz", **inputs(predictor))
        found[name] = root / name, predictor
    done = elsewhere("-c", ELSEWHERE, str(root))
    assert done.returncode == 0, done.stderr

  def of(name):
    if name not in found:
      write([other for other in CONFIGS if (other in LONG) == (name in LONG)])
    return found[name]

  return of


def inputs(predictor):
  """Three noisy images, and what else the network reads of them."""
  images = np.random.default_rng(0).random((3, *predictor.input_size, 3), np.float32)
  return predictor.batch(images, **words(predictor))


def words(predictor):
  """Arguments of `forward` beside three images."""
  if predictor.takes_sentence:
    return {"sentences": ["the red car", "a man", "a dog on the left"]}
  return {"class_id": [3, -1, 0]} if predictor.takes_class else {}


def elsewhere(*arguments):
  return subprocess.run([sys.executable, "-I", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_package(written, name):
  """For as many images: the network rounds differently for others."""
  folder, predictor = written(name)
  given = inputs(predictor)
  assert given.keys() == INPUTS[name]
  network = jax.jit(predictor.network)
  for count in (3, 1):
    here = jax.device_get(network(predictor.weights, {key: x[:count] for key, x in given.items()}))
    with np.load(folder / f"outputs{count}.npz") as file:
      there = dict(file)
    assert set(there) == OUTPUTS[name]
    for output, expected in here.items():
      assert there[output].dtype == expected.dtype == np.float32 and expected.std() > 0
      np.testing.assert_allclose(there[output], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_the_description_says_what_goes_in_and_comes_out(written, name):
  folder, predictor = written(name)
  facts = json.loads((folder / "network.json").read_text())
  size = list(predictor.input_size)
  assert facts["inputs"]["image"] | {"meaning": ""} == {
    "shape": ["batch", *size, 3],
    "dtype": "float32",
    "range": [0, 1],
    "meaning": "",
  }
  assert facts["inputs"].keys() == INPUTS[name] and facts["outputs"].keys() == OUTPUTS[name]
  for output in facts["outputs"].values():
    assert output["shape"][0] == "batch" and output["dtype"] == "float32" and output["meaning"]
  assert facts["preprocessing"] and facts["postprocessing"] and facts["batch"] == "any number of images"
  assert facts["platforms"] == ["cpu", "cuda", "tpu"] and facts["versions"]["jax"] == jax.__version__
  assert facts["weights"] == predictor.origin and facts["classes"] == list(predictor.experiment.classes)
  assert facts["config"]["method"]["name"] == predictor.config.method.name


def test_the_inputs_beside_the_image_are_described(written):
  described = lambda name: json.loads((written(name)[0] / "network.json").read_text())["inputs"]
  assert described("depth")["class_id"]["range"] == [-1, 26] and described("depth")["class_id"]["dtype"] == "int32"
  tokens, (_, predictor) = described("referring")["tokens"], written("referring")
  assert tokens["range"] == [0, 99] and tokens["shape"] == ["batch", 8]
  prepared = predictor.experiment.method.prepare({"sentence": tokens["example"]["sentence"]})
  assert tokens["example"]["tokens"] == prepared["tokens"].tolist()


def test_the_program_of_every_platform_is_in_the_file(written):
  folder, _ = written("depth")
  network = jax.export.deserialize(bytearray((folder / "network.jax_export").read_bytes()))
  assert network.platforms == export.PLATFORMS
  calls = set(re.findall(r"custom_call @(\w+)", network.mlir_module()))
  assert calls <= {"shape_assertion"}, "a kernel that one platform has"


def test_the_loader_prints_the_outputs(written):
  folder, _ = written("one convolution")
  lines = [elsewhere(str(folder / "load.py"), *given) for given in ([], [str(folder / "inputs.npz")])]
  shapes = ["(1, 64, 64)", "(3, 64, 64)"]
  for done, shape in zip(lines, shapes, strict=True):
    assert done.stdout.startswith(f"depth float32 {shape} from ") and ", mean " in done.stdout, done.stderr


def test_a_network_of_another_version_is_one_line(written, tmp_path):
  folder, _ = written("one convolution")
  facts = json.loads((folder / "network.json").read_text()) | {"versions": {"jax": "0.99.0"}}
  (tmp_path / "network.json").write_text(json.dumps(facts))
  (tmp_path / "load.py").write_text((folder / "load.py").read_text())
  raw = (folder / "network.jax_export").read_bytes()
  network = jax.export.deserialize(bytearray(raw))
  convention = dataclasses.replace(network, calling_convention_version=99).serialize()
  program = dataclasses.replace(network, mlir_module_serialized=b"ML\xefRStableHLO_v99.0.0").serialize()
  for written_there, why in ((convention, "its calling convention is 99"), (program, ""), (raw[:100], "")):
    (tmp_path / "network.jax_export").write_bytes(written_there)
    done = elsewhere(str(tmp_path / "load.py"))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    expected = f"network.jax_export was made by jax 0.99.0, and jax {jax.__version__} cannot read it: {why}"
    assert done.stderr.splitlines()[-1].startswith(expected), done.stderr  # XLA may say more above


def test_a_network_that_asks_for_the_number_of_images_has_one(tmp_path, monkeypatch, capsys):
  with one_convolution.known():
    predictor = vpd_jax.Predictor.load(one_convolution.rooms(), random_init=True)
  whole = predictor.network
  monkeypatch.setattr(
    predictor, "network", lambda weights, batch: whole(weights, batch) if int(batch["image"].shape[0]) else {}
  )
  export.write(predictor, tmp_path / "net")
  facts = json.loads((tmp_path / "net" / "network.json").read_text())
  assert facts["batch"].startswith("fixed to 1 (") and facts["inputs"]["image"]["shape"] == [1, 64, 64, 3]
  assert capsys.readouterr().out.startswith("the number of images is fixed to 1: ")


@pytest.mark.parametrize(
  "output, changes, message",
  [
    ("", {}, "^--mode=export needs a place for the network: give --output=FOLDER"),
    ("there", {}, "there' exists already; give a folder that does not"),
    ("file/net", {}, "file is not a folder that can be written to; give another"),
    ("gs://bucket/net", {}, "^--output='gs://bucket/net' is in a bucket; give a local path, and copy the result"),
    ("net", {}, "none' holds no checkpoint and config.init.pretrained is empty; give one of them"),
    (
      "net",
      {"backbone.attention": "cudnn"},
      "^config.backbone.attention='cudnn' does not run on all of cpu, cuda",
    ),
  ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, output, changes, message):
  (tmp_path / "there").mkdir()
  (tmp_path / "file").write_text("")
  config = loader.changed(loader.load("configs/nyu_depth.py:tiny"), changes)
  with pytest.raises(ValueError, match=message) as caught:
    export.run(config, str(tmp_path / "none"), output=output if ":" in output else output and str(tmp_path / output))
  assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == ["file", "there"]


def test_without_flatbuffers_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"^--mode=export needs flatbuffers, .* pip install 'vpd_jax\[export\]'\.$"):
    export.run(loader.load("configs/nyu_depth.py:tiny"), "", output=str(tmp_path / "net"))


@pytest.mark.parametrize("predicts, meaning", [(True, "the class that CLIP predicts"), (False, "the mean of all")])
def test_the_class_of_an_image_without_one_is_described(predicts, meaning):
  predictor = types.SimpleNamespace(predicts_class=predicts, experiment=types.SimpleNamespace(classes=("a", "b")))
  described = export._input(predictor, "class_id")
  assert described["range"] == [-1, 1] and f"-1 is {meaning}" in described["meaning"]


def test_attention_of_one_platform_is_refused_wherever_a_network_is_written(tmp_path):
  config = loader.changed(loader.load("configs/nyu_depth.py:tiny"), {"backbone.attention": "cudnn"})
  with pytest.raises(
    ValueError, match=r"attention='cudnn' does not run on all of .*; set config\.backbone\.attention="
  ):
    export.write(types.SimpleNamespace(config=config), tmp_path / "net")
  assert not any(tmp_path.iterdir())


def test_the_loader_refuses_numbers_out_of_range(written):
  folder, _ = written("one convolution")
  code = "import sys; sys.path.insert(0, sys.argv[1]); import load, numpy as np; load.run(image=np.full({}, {}))"
  shape = [1, *json.loads((folder / "network.json").read_text())["inputs"]["image"]["shape"][1:]]
  for value, message in (("255, np.uint8", "image is from 255 to 255; the network takes 0 to 1"), ("1.2", "")):
    done = elsewhere("-c", code.format(shape, value), str(folder))
    assert (message in done.stderr) if message else done.returncode == 0, done.stderr
