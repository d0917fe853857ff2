"""Names of the results of a folder of pictures: no result is written over another."""

import contextlib
import json
import types

import numpy as np
import pytest
from PIL import Image

import vpd_jax
from tests.helpers import one_convolution
from vpd_jax.config import loader
from vpd_jax.prediction import predict_folder
from vpd_jax.tasks.depth import point_cloud
from vpd_jax.tasks.pose.task import Pose
from vpd_jax.tasks.segmentation.task import Segmentation

FOLDERS = {
  "all different": ([("a.jpg", 1), ("b.PNG", 1)], [["a"], ["b"]]),
  "one stem": ([("a.jpg", 1), ("a.png", 1)], [["a_jpg"], ["a_png"]]),
  "a name like the longer one": (
    [("a.jpg", 1), ("a.png", 1), ("a_jpg.bmp", 1)],
    [["a.jpg"], ["a_png"], ["a_jpg_bmp"]],
  ),
  "sentences": ([("car.jpg", 2), ("car_1.jpg", 1)], [["car_jpg_0", "car_jpg_1"], ["car_1_jpg"]]),
  "sentences, no collision": ([("car.jpg", 2), ("car_2.jpg", 1)], [["car_0", "car_1"], ["car_2"]]),
  "a picture without any": ([("a.jpg", 0), ("a.png", 2)], [[], ["a_0", "a_1"]]),
  "upper and lower case": ([("A.jpg", 1), ("a.png", 1)], [["A_jpg"], ["a_png"]]),
  "nothing but case": ([("A.jpg", 1), ("a.jpg", 1)], [["A.jpg_0"], ["a.jpg_1"]]),
  "two ways of writing one letter": ([("\u00e9.jpg", 1), ("e\u0301.png", 1)], [["\u00e9_jpg"], ["e\u0301_png"]]),
  "even the numbered name is taken": (
    [("A.jpg", 1), ("a.jpg", 1), ("A.jpg_0.png", 1)],
    [["A.jpg_0_"], ["a.jpg_1"], ["A_jpg_0_png"]],
  ),
  "a suffix inside": ([("a.jpg", 1), ("a.jpg.png", 1), ("a.png", 1)], [["a_jpg"], ["a.jpg"], ["a_png"]]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_no_two_results_have_one_name(case):
  pictures, expected = FOLDERS[case]
  names = predict_folder.result_names(pictures)
  assert names == expected
  flat = [name.casefold() for each in names for name in each]
  assert len(set(flat)) == len(flat) == sum(count for _, count in pictures)


class Labels:
  """Stands for a network: the number of each picture's gray is its label."""

  origin, takes_class, takes_sentence, takes_boxes = (), False, True, False
  measures_depth = False

  def __init__(self):
    self.experiment = types.SimpleNamespace(method=None, task=self)
    self.result = "label"

  def predict_each(self, images, class_id, sentences):
    return [{"label": (image, sentence)} for image, sentence in zip(images, sentences, strict=True)]

  def save(self, stem, label, facts, image):
    path = stem.with_name(f"{stem.name}.json")
    assert not path.exists(), "written over"
    path.write_text(f"{facts['source']}: {label[1]}")
    return [path]


def test_as_many_results_are_written_as_are_told(tmp_path, monkeypatch, capsys):
  source, output = tmp_path / "in", tmp_path / "out"
  source.mkdir()
  for name in ("a.jpg", "a.png", "a_jpg.bmp", "car.jpg", "car_1.jpg"):
    Image.new("RGB", (8, 8)).save(source / name)
  said = [{"image": name.name, "sentence": "it"} for name in source.iterdir()] + [{"image": "car.jpg", "sentence": "b"}]
  (tmp_path / "said.json").write_text(json.dumps(said))
  monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: Labels())
  config = loader.load("configs/my_refer.py").unlock()
  config.init.pretrained = "made-up"
  options = {"source": str(source), "output": str(output), "sentences": str(tmp_path / "said.json")}
  assert predict_folder.run(config, "", **options) == 5
  assert sorted(p.read_text() for p in output.iterdir()) == [
    "a.jpg: it", "a.png: it", "a_jpg.bmp: it", "car.jpg: b", "car.jpg: it", "car_1.jpg: it",
  ]  # fmt: skip
  assert "5 images written" in capsys.readouterr().out


def test_a_single_image_may_be_given(tmp_path, monkeypatch, capsys):
  for name in ("a.png", "b.png"):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
  monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: Labels())
  config = loader.load("configs/my_refer.py").unlock()
  config.init.pretrained = "made-up"
  options = {"source": str(tmp_path / "b.png"), "output": str(tmp_path / "out"), "sentence": "it"}
  assert predict_folder.run(config, "", **options) == 1
  assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["b.png: it"]
  assert "1 images written" in capsys.readouterr().out


def test_damaged_images_are_counted_and_may_be_allowed(tmp_path, monkeypatch, capsys):
  source, options = tmp_path / "in", {"source": str(tmp_path / "in"), "output": str(tmp_path / "out")}
  source.mkdir()
  for name in ("a", "b"):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(source / f"{name}.png")
  (source / "b.png").write_bytes((source / "b.png").read_bytes()[:60])
  (source / "notes.txt").write_text("no image")
  with one_convolution.known():
    config = one_convolution.rooms(**{"init.pretrained": "weights.pth"})
    predictor = vpd_jax.Predictor.load(one_convolution.rooms(), random_init=True)
    monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: predictor)
    with pytest.raises(ValueError, match=r"^1 of 2 images in .* cannot be read: b\.png.* or give --allow_damaged\.$"):
      predict_folder.run(config, str(tmp_path / "none"), **options)
    counts = f"1 images written to {tmp_path / 'out'}, 1 files skipped, 1 images damaged"
    assert capsys.readouterr().out.splitlines()[-1] == counts
    assert predict_folder.run(config, str(tmp_path / "none"), **options, allow_damaged=True) == 1
    assert capsys.readouterr().out.splitlines()[-1] == counts
    (source / "a.png").unlink()
    with pytest.raises(ValueError, match="1 of 1 images"):
      predict_folder.run(config, str(tmp_path / "none"), **options, allow_damaged=True)


@pytest.mark.parametrize(
  "source, output, message",
  [
    ("", "out", "^--mode=predict needs the images: give --input=FOLDER, or a single image"),
    ("in", "", "^--mode=predict needs a place for the results: give --output=FOLDER"),
    ("texts/notes.txt", "out", "notes.txt' is not an image in a supported format; give one, or a folder of images"),
    ("in/a.png", "in", "in' is the folder of the images; give another; otherwise results would be read"),
    ("none", "out", "none' does not exist; give an image, or a folder that contains images"),
    ("empty", "out", "contains no image, it is empty; give a folder that does"),
    ("nested", "out", "contains no image, only folders, like 2024, which are not searched; give a folder that does"),
    ("texts", "out", "contains no image, only 1 other files, like notes.txt; give a folder that does"),
  ],
)
def test_folders_that_will_not_do_are_one_line(tmp_path, source, output, message):
  for name in ("in", "empty", "texts"):
    (tmp_path / name).mkdir()
  (tmp_path / "nested" / "2024").mkdir(parents=True)
  Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
  (tmp_path / "texts" / "notes.txt").write_text("no image")
  config = loader.changed(loader.load("configs/my_depth.py"), {"init.pretrained": "made-up"})
  options = {name: value and str(tmp_path / value) for name, value in (("source", source), ("output", output))}
  with pytest.raises(ValueError, match=message) as caught:
    predict_folder.run(config, "", **options)
  assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


class People(Labels):
  """Stands for a network that takes boxes of people."""

  takes_sentence, takes_boxes = False, True

  def predict_each(self, images, class_id, boxes=None):
    facts = {"label": (None, "text"), "boxes": np.zeros((0, 4)), "scores": np.zeros(0)}
    return [facts for _ in images]


@pytest.mark.parametrize(
  "boxes, said",
  [(None, "no --boxes given: every image is taken as one person"), ({"a.png": [[0, 0, 4, 4]]}, "1 images without an")],
)
def test_images_without_boxes_are_told(tmp_path, monkeypatch, capsys, boxes, said):
  (tmp_path / "in").mkdir()
  for name in ("a.png", "b.png"):
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
  (tmp_path / "boxes.json").write_text(json.dumps(boxes))
  monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: People())
  config = loader.changed(loader.load("configs/my_pose.py"), {"init.pretrained": "made-up"})
  options = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out")}
  predict_folder.run(config, "", **options, boxes=str(tmp_path / "boxes.json") if boxes else "")
  assert said in capsys.readouterr().out


def test_point_clouds_are_written_beside_the_other_files(tmp_path, monkeypatch, capsys):
  source, target = tmp_path / "in", tmp_path / "out"
  source.mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
  photo = Image.fromarray(pixels)
  exif = photo.getexif()
  exif[0x0112] = 1  # without any such tag Pillow writes no EXIF data
  exif[0x8769] = {0xA405: 28}
  photo.save(source / "a.png", exif=exif)
  photo.save(source / "b.png")
  options = {"source": str(source), "output": str(target), "ply": True}
  with one_convolution.known():
    config = one_convolution.rooms(**{"init.pretrained": "weights.pth"})
    predictor = vpd_jax.Predictor.load(one_convolution.rooms(), random_init=True)
    monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: predictor)
    predict_folder.run(config, "", **options)
    said = [line for line in capsys.readouterr().out.splitlines() if "focal" in line]
    facts = {name: json.loads((target / f"{name}.json").read_text()) for name in "ab"}
    predict_folder.run(config, "", **options, focal=50.0)
    assert "focal" not in capsys.readouterr().out
  assert said == [
    "1 images state no focal length (assumed: 60 degrees across the longer side); give --focal=PIXELS if it is known"
  ]
  assert facts["a"]["focal_length_from"] == "EXIF FocalLengthIn35mmFilm"
  assert facts["b"]["focal_length_from"].startswith("assumed: 60 degrees")
  np.testing.assert_allclose(facts["b"]["focal_length_pixels"], 48 * 3**0.5)
  header, _, body = (target / "a.ply").read_bytes().partition(b"end_header\n")
  assert b"comment focal length 50 pixels, --focal\n" in header
  vertices = np.frombuffer(body, point_cloud.VERTEX).reshape(64, 96)
  depth = np.load(target / "a.npy")
  np.testing.assert_array_equal(vertices["z"], depth)
  np.testing.assert_allclose(vertices["x"][3, 7], (7.5 - 48) / 50 * depth[3, 7], rtol=1e-6)
  np.testing.assert_allclose(vertices["y"][3, 7], (3.5 - 32) / 50 * depth[3, 7], rtol=1e-6)
  assert [vertices[name][3, 7] for name in ("red", "green", "blue")] == pixels[3, 7].tolist()


@pytest.mark.parametrize(
  "given, message",
  [
    ({"ply": True}, "^--ply has no effect: task 'pose' predicts no depth; leave it out"),
    ({"focal": 50.0}, r"^--focal=50\.0: only valid with --ply; leave it out"),
    ({"ply": True, "focal": -1.0}, r"^--focal=-1\.0: give the focal length in pixels .*, a number above 0"),
    ({"ply": True, "focal": float("nan")}, "^--focal=nan: give the focal length"),
  ],
)
def test_point_clouds_that_cannot_be_are_one_line(tmp_path, monkeypatch, given, message):
  (tmp_path / "in").mkdir()
  Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
  monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: People())
  config = loader.changed(loader.load("configs/my_pose.py"), {"init.pretrained": "made-up"})
  with pytest.raises(ValueError, match=message) as caught:
    predict_folder.run(config, "", source=str(tmp_path / "in"), output=str(tmp_path / "out"), **given)
  assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


class Captioned(People):
  """Stands for a network that takes boxes of people and a caption."""

  takes_sentence = True

  def __init__(self):
    super().__init__()
    self.given = []

  def predict_each(self, images, class_id, sentences=None, boxes=None):
    self.given += zip(sentences, boxes, strict=True)
    return super().predict_each(images, class_id)


def test_boxes_go_with_each_sentence(tmp_path, monkeypatch):
  (tmp_path / "in").mkdir()
  Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
  (tmp_path / "boxes.json").write_text(json.dumps({"a.png": [[0, 0, 4, 4]]}))
  (tmp_path / "said.json").write_text(json.dumps([{"image": "a.png", "sentences": ["one", "two"]}]))
  predictor = Captioned()
  monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: predictor)
  config = loader.changed(loader.load("configs/my_pose.py"), {"init.pretrained": "made-up"})
  options = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), "boxes": str(tmp_path / "boxes.json")}
  predict_folder.run(config, "", **options, sentences=str(tmp_path / "said.json"))
  assert predictor.given == [("one", [[0, 0, 4, 4]]), ("two", [[0, 0, 4, 4]])]


@pytest.mark.parametrize("task, draws", [(Pose, False), (Segmentation, True)])
def test_attention_is_for_tasks_that_draw_it(task, draws):
  predictor = object.__new__(vpd_jax.Predictor)
  method = types.SimpleNamespace(attends_to_classes=True, needs=frozenset(), prepare_inputs=frozenset())
  predictor.experiment, predictor._classify = types.SimpleNamespace(method=method, task=task), None
  config = loader.load("configs/coco_pose.py:vpd,tiny")
  with (
    contextlib.nullcontext() if draws else pytest.raises(ValueError, match=r"^--attention has no effect: method 'vpd'")
  ):
    predict_folder.check_flags(config, predictor, {}, True, False)
