"""The authors' depth checkpoint, as they would have written it, through every door: eval, predict, Predictor."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

import vpd_jax
from tests.helpers import oracle, pth
from vpd_jax.config import loader
from vpd_jax.convert import load
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import predict_folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """Tiny rebuilt weights in the authors' names with DataParallel's prefix, wrapped in `model` beside an optimizer."""
  path = tmp_path_factory.mktemp("released") / "vpd_depth_480x480.pth"
  state = {f"module.{name}": value for name, value in oracle.weights("vpd_depth").items()}
  optimizer = {"state": {0: {"step": 1009}}, "param_groups": [{"lr": 5e-4, "params": [0]}]}
  try:
    import torch  # the real writer, where it is installed
  except ImportError:
    state = {name: pth.tensor(value) for name, value in state.items()}
    return pth.write_zip(path, {"model": state, "optimizer": optimizer, "epoch": 25})
  state = {name: torch.tensor(value) for name, value in state.items()}
  torch.save({"model": state, "optimizer": optimizer, "epoch": 25}, path)
  return path


@pytest.fixture(scope="module")
def predictor(checkpoint):
  return vpd_jax.Predictor.load("configs/nyu_depth.py:tiny", weights=checkpoint)


def blending(predictor, blend):
  """The same network with this `eval.blend`."""
  if predictor.config.eval.blend == blend:
    return predictor
  config = predictor.config.copy_and_resolve_references().unlock()
  config.eval.blend = blend
  return vpd_jax.Predictor(config.lock(), predictor.experiment, predictor.weights, [])


@pytest.fixture(scope="module")
def nyu(tmp_path_factory):
  """Three test frames and three training frames in NYU's layout."""
  root = tmp_path_factory.mktemp("nyu")
  rng = np.random.default_rng(0)
  for split, folder, scenes in (
    ("train", "sync", ("kitchen_0001", "bedroom_0002", "office_0003")),
    ("test", "official_splits/test", ("kitchen", "bathroom", "study")),
  ):
    lines = []
    for i, scene in enumerate(scenes):
      (root / folder / scene).mkdir(parents=True)
      image = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (640, 480))
      depth = cv2.resize(rng.integers(500, 9000, (12, 16)).astype(np.uint16), (640, 480))
      depth[:50] = 0
      cv2.imwrite(str(root / folder / scene / f"rgb_{i:05}.jpg"), image)
      cv2.imwrite(str(root / folder / scene / f"sync_depth_{i:05}.png"), depth)
      lines.append(f"/{scene}/rgb_{i:05}.jpg /{scene}/sync_depth_{i:05}.png")
    (root / f"{split}_list.txt").write_text("\n".join(lines))
  return root


def config(nyu, checkpoint, **changes):
  made = loader.load("configs/nyu_depth.py:tiny").unlock()
  made.data.root, made.init.pretrained, made.eval.batch_size = str(nyu), str(checkpoint), 2
  made.update_from_flattened_dict(changes)
  return made.lock()


def test_class_vectors_come_from_the_checkpoint(predictor):
  assert any(line.startswith("class vectors: those of") for line in predictor.origin)
  np.testing.assert_array_equal(
    predictor.weights[1]["method/class_vectors"], oracle.weights("vpd_depth")["encoder.class_embeddings"]
  )


def test_forward_is_the_authors_output(predictor):
  arrays = oracle.golden("vpd_depth.tiny.npz")
  out = predictor.forward(arrays["input/image"].transpose(0, 2, 3, 1), class_id=arrays["input/class_ids"])
  assert set(out) == {"depth"} and isinstance(out["depth"], np.ndarray) and out["depth"].dtype == np.float32
  oracle.compare(out["depth"][:, None], arrays, "output/pred_d", 1e-5)


def test_forward_works_at_other_sizes_and_without_a_class(predictor):
  image = np.random.default_rng(0).random((1, 72, 136, 3), np.float32)
  assert predictor.forward(image)["depth"].shape == (1, 72, 136)


@pytest.mark.parametrize("blend", ["mean", "smooth"])
def test_predict_is_flip_and_two_windows(predictor, blend):
  image = np.random.default_rng(1).random((96, 128, 3), np.float32)
  windows = np.stack([image[:, :96], image[:, 32:]])
  plain = predictor.forward(windows, class_id=7)["depth"]
  mirrored = predictor.forward(windows[:, :, ::-1], class_id=7)["depth"][:, :, ::-1]
  both = (plain + mirrored) / 2
  total, count = np.zeros((96, 128)), np.zeros((1, 128))
  weight = {"smooth": np.sin(np.pi * (np.arange(96) + 0.5) / 96) ** 2, "mean": np.ones(96)}[blend]
  for part, left in zip(both, (0, 32), strict=True):
    total[:, left : left + 96] += weight * part
    count[:, left : left + 96] += weight
  (result,) = blending(predictor, blend).predict([image], class_id=7)
  assert result["depth"].dtype == np.float32
  np.testing.assert_allclose(result["depth"], total / count, rtol=1e-5)


def test_predict_takes_lists_of_any_sizes_and_types(predictor):
  rng = np.random.default_rng(2)
  images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((1, 1), (150, 40), (96, 128))]
  images.append(images[2].astype(np.float32) / 255)
  results = predictor.predict(images, class_id=[0, 1, 2, 2])
  assert [r["depth"].shape for r in results] == [(1, 1), (150, 40), (96, 128), (96, 128)]
  assert all(np.isfinite(r["depth"]).all() and (r["depth"] > 0).all() for r in results)
  np.testing.assert_array_equal(results[2]["depth"], results[3]["depth"])
  assert predictor.predict([]) == []


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda p: p.forward(np.zeros((1, 3, 96, 96), np.float32)), "its channels come first"),
    (lambda p: p.forward(np.full((1, 96, 96, 3), 200.0, np.float32)), "values up to 200; give float in"),
    (lambda p: p.forward(np.zeros((1, 96, 96, 3), np.float32), class_id=27), "between -1"),
    (lambda p: p.predict([np.zeros((9, 9, 2))]), r"give \[H, W, 3\]"),
    (lambda p: p.class_id("no such room"), "is unknown; choose one of"),
  ],
)
def test_wrong_input_is_answered_in_one_line(predictor, call, message):
  with pytest.raises(ValueError, match=message) as caught:
    call(predictor)
  assert "\n" not in str(caught.value)


def test_predictor_loads_in_a_script_elsewhere(checkpoint, tmp_path, predictor):
  script = tmp_path / "mine.py"
  script.write_text(
    "import sys, numpy as np, vpd_jax\n"
    "p = vpd_jax.Predictor.load('configs/nyu_depth.py:tiny', weights=sys.argv[1])\n"
    "np.save('depth.npy', p.forward(np.full((1, 96, 96, 3), 0.25, np.float32), class_id=3)['depth'])\n"
  )
  done = subprocess.run([sys.executable, str(script), str(checkpoint)], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  here = predictor.forward(np.full((1, 96, 96, 3), 0.25, np.float32), class_id=3)["depth"]
  np.testing.assert_allclose(np.load(tmp_path / "depth.npy"), here, rtol=1e-6)


def test_evaluation_scores_the_checkpoint_in_an_empty_workdir(nyu, checkpoint, tmp_path, predictor, capsys):
  scores = evaluate.run(config(nyu, checkpoint), str(tmp_path / "empty"))
  assert scores["eval/nyu/images"] == 3
  text = capsys.readouterr().out
  assert "released:vpd_depth" in text and "rmse" in text
  made = config(nyu, checkpoint)
  from vpd_jax.data.datasets.nyu import Nyu

  data = Nyu(root=str(nyu), crop=made.data.crop, resize=made.data.resize)
  examples = [data.eval_transform(data.source("eval")[i]) for i in range(3)]
  predicted = predictor.predict([e["image"] for e in examples], [int(e["class_id"]) for e in examples])
  rmse = []
  for example, result in zip(examples, predicted, strict=True):
    truth, depth = (x[9:94, 8:120] for x in (example["depth"], result["depth"]))
    valid = (truth > 1e-3) & (truth < 10)
    rmse.append(np.sqrt(np.mean((truth - depth)[valid] ** 2)))
  np.testing.assert_allclose(scores["eval/nyu/rmse"], np.mean(rmse), rtol=1e-4)


def test_prediction_of_a_folder_writes_pictures_meters_and_facts(checkpoint, nyu, tmp_path, capsys, predictor):
  from PIL import Image

  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  rng = np.random.default_rng(3)
  color = rng.integers(0, 256, (96, 128, 3), np.uint8)
  Image.fromarray(color).save(folder / "color.png")
  Image.fromarray(color[..., 0]).save(folder / "gray.png")
  Image.fromarray(np.dstack([color, color[..., :1]])).save(folder / "rgba.png")
  Image.fromarray(color[..., 0].astype(np.uint16) * 257).save(folder / "gray16.png")
  Image.fromarray(color[:1, :1]).save(folder / "pixel.png")
  turned = Image.fromarray(color)
  exif = turned.getexif()
  exif[274] = 6
  turned.save(folder / "turned.jpg", exif=exif)
  (folder / "notes.txt").write_text("not an image")
  (folder / "broken.png").write_bytes((folder / "color.png").read_bytes()[:200])
  with pytest.raises(ValueError, match=r"1 of 7 images .* cannot be read: broken.png .*The other 6 are done"):
    predict_folder.run(
      config(nyu, checkpoint), str(tmp_path / "none"), source=str(folder), output=str(out), class_name="kitchen"
    )
  text = capsys.readouterr().out
  assert "6 images written" in text and "1 files skipped, 1 images damaged" in text
  assert "skipped: notes.txt" in text and "skipped: broken.png" in text
  assert {p.name for p in out.iterdir()} == {
    f"{stem}{suffix}"
    for stem in ("color", "gray", "rgba", "gray16", "pixel", "turned")
    for suffix in (".color.png", ".depth.png", ".npy", ".json")
  }
  facts = json.loads((out / "color.json").read_text())
  meters = np.load(out / "color.npy")
  stored = cv2.imread(str(out / "color.depth.png"), cv2.IMREAD_UNCHANGED)
  assert facts["unit"] == "meter" and facts["png_units_per_meter"] == 1000 and facts["class"] == "kitchen"
  assert stored.dtype == np.uint16
  np.testing.assert_allclose(stored / 1000, meters, atol=0.5001e-3)
  np.testing.assert_allclose(meters, predictor.predict([color], class_id=6)[0]["depth"], rtol=1e-6)
  assert np.load(out / "turned.npy").shape == (128, 96)


def test_prediction_without_a_picture_is_refused(checkpoint, nyu, tmp_path):
  (tmp_path / "in").mkdir()
  with pytest.raises(ValueError, match="contains no image"):
    predict_folder.run(
      config(nyu, checkpoint), str(tmp_path / "w"), source=str(tmp_path / "in"), output=str(tmp_path / "out")
    )


def test_our_converted_directory_gives_the_same_arrays(checkpoint, tmp_path, predictor):
  shapes = predictor.experiment.spec.shapes
  named, report = load.load_pretrained(checkpoint, shapes)
  load.save(tmp_path / "converted", named, report, load.source_files(checkpoint))
  again = vpd_jax.Predictor.load("configs/nyu_depth.py:tiny", weights=tmp_path / "converted")
  for name, value in predictor.weights[0].items():
    np.testing.assert_array_equal(value, again.weights[0][name])
