import pickle

import cv2
import numpy as np
import pytest

from tests.helpers.label_files import add_companions, write_pairs
from tests.helpers.loaded_scripts import load
from tests.helpers.messages import check_message
from vpd_jax.data import pipeline
from vpd_jax.data.datasets import ade20k
from vpd_jax.data.readers import label_maps
from vpd_jax.data.shards import writer


@pytest.fixture
def root(tmp_path):
  root = tmp_path / "ADEChallengeData2016"
  for split, kind, count in (("training", "train", 4), ("validation", "val", 2)):
    names = [f"ADE_{kind}_{index:08}" for index in range(1, count + 1)]
    write_pairs(root / "images" / split, root / "annotations" / split, range(151), names, gray=split == "validation")
  return root


@pytest.fixture
def small(monkeypatch):
  """The published numbers of the pictures in `root`."""
  monkeypatch.setattr(ade20k, "COUNTS", {"train": 4, "eval": 2})


def test_examples_hold_classes_from_zero_and_255_for_none(root, small):
  data = ade20k.Ade20k(root=str(root))
  source = data.source("train")
  example = source[2]
  stored = cv2.imread(str(root / "annotations/training/ADE_train_00000003.png"), cv2.IMREAD_UNCHANGED)
  expected = stored.astype(int) - 1
  expected[stored == 0] = 255
  np.testing.assert_array_equal(example["label"], expected)
  np.testing.assert_array_equal(source.label(2), expected)
  np.testing.assert_array_equal(
    example["image"], cv2.imread(str(root / "images/training/ADE_train_00000003.jpg"))[..., ::-1]
  )
  assert example["label"].dtype == np.uint8 and example["index"] == 2 and len(source) == 4
  assert data.source("eval")[0]["image"].shape == (40, 60, 3)  # a gray JPEG
  assert len(data.classes) == len(data.palette) == 150 and data.classes[7] == "bed"
  ends = np.array([[0, 1, 150, 255]], np.uint8)
  raw = cv2.imencode(".png", ends)[1].tobytes()
  assert label_maps.decode_labels(raw, "x", ade20k.LABEL_MAPPINGS[""]).tolist() == [[255, 0, 149, 255]]


def test_companions_of_macos_are_no_pictures(root, small):
  before = [ade20k.Ade20k(root=str(root)).source(split).pairs for split in ("train", "eval")]
  add_companions(root)
  assert [ade20k.Ade20k(root=str(root)).source(split).pairs for split in ("train", "eval")] == before


def test_published_numbers_are_checked_unless_told_otherwise(root):
  assert ade20k.COUNTS == {"train": 20_210, "eval": 2_000}
  message = check_message("train of ADE20K has 4 records", lambda: ade20k.Ade20k(root=str(root)).source("train"))
  assert "20210" in message and "data.complete=False" in message
  assert len(ade20k.Ade20k(root=str(root), complete=False).source("train")) == 4


def test_batches_and_evaluation_have_the_provided_keys(root, small):
  data = ade20k.Ade20k(root=str(root), crop=(32, 32), scale=(128, 32))
  batches = pipeline.train_batches(pickle.loads(pickle.dumps(data)), batch_size=2, seed=0, keys=data.provides)
  batch = next(batches)
  batches.close()
  assert batch["image"].shape == (2, 32, 32, 3) and batch["image"].dtype == np.uint8
  assert batch["label"].shape == (2, 32, 32) and set(batch) == data.provides
  example = data.eval_transform(data.source("eval")[0])
  assert example["image"].shape == (40, 60, 3) and example["label"].shape == (40, 60) and set(example) == data.provides


def test_shards_hold_the_same_examples(root, small, tmp_path):
  data = ade20k.Ade20k(root=str(root))
  writer.prepare(data, tmp_path / "out", name="ade20k")
  shards = ade20k.Ade20k(root=str(tmp_path / "out"), format="tfds")
  for split in ("train", "eval"):
    drawn, read = data.source(split), shards.source(split)
    assert len(drawn) == len(read)
    for index in range(len(read)):
      for key, value in drawn[index].items():
        np.testing.assert_array_equal(read[index][key], value)
        assert read[index][key].dtype == value.dtype
  assert label_maps.histogram(shards.source("train"), data.classes) == label_maps.histogram(
    data.source("train"), data.classes
  )


def test_prepare_data_reports_all_faults(root, small, tmp_path):
  script = load("scripts/prepare_data.py")
  annotation = root / "annotations/training/ADE_train_00000001.png"
  cv2.imwrite(str(annotation), np.full((40, 60), 151, np.uint8))
  (root / "annotations/validation/ADE_val_00000002.png").unlink()
  arguments = script.parse(["ade20k", f"--root={root}", "--check_only"])
  message = check_message("2 faults: ", lambda: script.run(arguments, lambda line: None))
  assert "annotations/validation/ADE_val_00000002.png; it comes from ADEChallengeData2016.zip" in message
  assert f"label file {annotation} holds 151 (2400 pixels); allowed are 0 to 150, 255, of which 0, 255 mean" in message
  arguments = script.parse(["ade20k", f"--root={root}", f"--output={tmp_path}/out", "--splits", "eval"])
  check_message("1 files are missing", lambda: script.run(arguments, lambda line: None))
  assert not (tmp_path / "out").exists()


def test_errors_are_one_line_and_name_files(root, small):
  source = ade20k.Ade20k(root=str(root)).source("train")
  annotation = root / "annotations/training/ADE_train_00000001.png"
  cv2.imwrite(str(annotation), np.zeros((60, 40), np.uint8))
  message = check_message(f"label file {annotation} is 60x40, but its image", lambda: source[0])
  assert message.endswith("is 40x60; bring both to one size; EXIF data may turn the image.")
  cv2.imwrite(str(annotation), np.zeros((40, 60, 3), np.uint8))
  check_message("has three channels (RGB)", lambda: source[0])
  source[1]  # the others are read as before
  check_message("split='test' is unknown", lambda: ade20k.Ade20k(root=str(root)).source("test"))
  check_message("format='zip' is unknown", lambda: ade20k.Ade20k(root=str(root), format="zip"))
  check_message("set data.root to the folder ADEChallengeData2016", lambda: ade20k.Ade20k(root=str(root / "no")))
  check_message(
    "images/training is not a folder; it comes from", lambda: ade20k.Ade20k(root=str(root / "images")).source("train")
  )
  check_message("crop=512 must be (height, width)", lambda: ade20k.Ade20k(root=str(root), crop=512))
