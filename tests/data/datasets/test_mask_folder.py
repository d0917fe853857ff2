from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers.label_files import add_companions, write_pairs
from tests.helpers.messages import check_message
from vpd_jax.data import pipeline
from vpd_jax.data.datasets import mask_folder
from vpd_jax.data.readers import label_maps
from vpd_jax.data.shards import writer

CLASSES = ("road", "car", "tree")


@pytest.fixture
def root(tmp_path):
  root = tmp_path / "mine"
  write_pairs(root / "images", root / "masks", [0, 1, 2, 255], [f"{index:02}" for index in range(10)])
  return root


def made(root, classes=CLASSES, **options):
  return mask_folder.MaskFolder(root=str(root), classes=classes, **options)


def test_a_folder_of_pictures_and_masks_trains(root):
  data = made(root, crop=(32, 32), scale=(60, 40))
  train, evaluation = data.source("train"), data.source("eval")
  assert (len(train), len(evaluation)) == (9, 1)  # the last one is held out
  assert evaluation.pairs == [("images/09.jpg", "masks/09.png")]
  stored = cv2.imread(str(root / "masks/03.png"), cv2.IMREAD_UNCHANGED)
  np.testing.assert_array_equal(train[3]["label"], stored)
  batches = pipeline.train_batches(data, batch_size=3, seed=0, keys=data.provides)
  batch = next(batches)
  batches.close()
  assert batch["image"].shape == (3, 32, 32, 3) and set(np.unique(batch["label"])) <= {0, 1, 2, 255}
  assert data.eval_transform(evaluation[0])["image"].shape == (40, 60, 3)
  assert label_maps.histogram(train, data.classes)[0].startswith("labels of 9 of 9 images: ")


def test_folders_endings_and_inner_folders_may_be_named(root):
  write_pairs(root / "val/pictures/day", root / "val/truth/day", [0, 1], ["b", "a"])
  for name in "ab":
    (root / f"val/truth/day/{name}.png").rename(root / f"val/truth/day/{name}_mask.png")
  (root / "val/pictures/day/notes.txt").write_text("no picture")
  for path in (root / "masks").iterdir():
    path.rename(path.with_name(f"{path.stem}_mask.png"))
  data = made(root, eval_images="val/pictures", eval_masks="val/truth", mask_ending="_mask.png")
  assert len(data.source("train")) == 10  # nothing is held out
  assert data.source("eval").pairs[0] == ("val/pictures/day/a.jpg", "val/truth/day/a_mask.png")


def test_linked_folders_are_searched_like_others(root):
  for folder in ("images", "masks"):
    (root.parent / folder).mkdir()
    (root / folder).rename(root.parent / folder / "elsewhere")
    (root / folder).mkdir()
    (root / folder / "day").symlink_to(root.parent / folder / "elsewhere")
  assert made(root).source("eval").pairs == [("images/day/09.jpg", "masks/day/09.png")]


@pytest.mark.parametrize("ending", [".png", ".PNG", "_mask.PNG", "_mask.png"])
def test_endings_in_capitals_are_found(root, ending):
  for index, path in enumerate(sorted((root / "masks").iterdir())):
    path.rename(path.with_name(f"{path.stem}{ending[:-4]}{('.png', '.PNG')[index % 2]}"))
  for path in sorted((root / "images").iterdir())[::3]:
    path.rename(path.with_suffix(".JPG"))
  source = made(root, mask_ending=ending).source("train")
  assert len(source) == 9 and {Path(mask).suffix for _, mask in source.pairs} == {".png", ".PNG"}
  assert all(source[index]["label"].shape == (40, 60) for index in range(9))


def test_companions_of_macos_and_hidden_folders_are_no_data(root):
  add_companions(root)
  found = made(root).source("train"), made(root).source("eval")
  assert [pair for source in found for pair in source.pairs] == [
    (f"images/{index:02}.jpg", f"masks/{index:02}.png") for index in range(10)
  ]


def test_numbers_of_the_masks_may_be_others(root):
  for path in (root / "masks").iterdir():
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), np.where(mask == 1, 255, 0).astype(np.uint8))
  black_white = made(root, classes=("nothing", "car"), values=(0, 255)).source("train")
  assert set(np.unique(black_white[0]["label"])) == {0, 1}
  # Without `values` the car would be silently ignored: the histogram tells.
  silent = made(root, classes=("nothing", "car")).source("train")
  assert label_maps.histogram(silent, ("nothing", "car"))[-1].startswith("  WARNING: at most one class occurs")
  shifted = made(root, classes=("car",), values=(255,), ignored=(0,)).source("train")
  assert set(np.unique(shifted[0]["label"])) == {0, 255}


def test_a_mask_beyond_the_classes_is_named(root):
  source = made(root, classes=("road", "car")).source("train")
  bad = next(index for index in range(9) if (cv2.imread(str(root / f"masks/0{index}.png"), -1) == 2).any())
  message = check_message("allowed are 0 to 1, 255, of which 255 mean no class", lambda: source[bad])
  assert f"label file {root}/masks/0{bad}.png holds 2 (" in message and "correct data.classes" in message
  check_message("allowed are 0 to 1, 255", lambda: label_maps.histogram(source, ("road", "car")))


def test_other_faults_of_masks_are_named(root):
  source = made(root).source("train")
  cv2.imwrite(str(root / "masks/00.png"), np.zeros((20, 30), np.uint8))
  check_message(f"{root}/masks/00.png is 20x30, but its image {root}/images/00.jpg is 40x60", lambda: source[0])
  cv2.imwrite(str(root / "masks/01.png"), np.zeros((40, 60, 3), np.uint8))
  check_message(f"{root}/masks/01.png has three channels (RGB)", lambda: source[1])
  for name in ("02", "03"):
    (root / f"masks/{name}.png").unlink()
  message = check_message("2 files are missing", lambda: made(root).source("train"))
  assert "masks/02.png, masks/03.png; the options data.images and data.masks name" in message


def test_options_are_checked_together(root):
  message = check_message(
    "values=(0, 255) must be 3 different numbers",
    lambda: made(root, values=(0, 255), holdout=0, eval_images="a", mask_ending=".jpg"),
  )
  for part in ("holdout=0 must lie", "eval_images and eval_masks must be given together", "must end in '.png'"):
    assert part in message
  check_message("values=(1, 1, 2) must be 3 different", lambda: made(root, values=(1, 1, 2)))
  check_message("data.classes=() must be names", lambda: made(root, classes=()))
  check_message("data.classes=() must be names", lambda: mask_folder.MaskFolder.info({"root": "x"}))
  check_message("data.classes='road' must be names", lambda: made(root, classes="road"))
  check_message("data.classes names car twice", lambda: made(root, classes=("car", "car")))
  check_message("data.classes has 255 names", lambda: made(root, classes=tuple(map(str, range(255)))))
  check_message("[300] lie outside 0 to 255", lambda: made(root, values=(0, 1, 300)))
  check_message(
    "images2 is not a folder; the options data.images", lambda: made(root, images="images2").source("train")
  )
  check_message("masks holds no pictures", lambda: _only_text(root))
  check_message("data.root is empty", lambda: made(""))


def _only_text(root):
  (root / "empty" / "masks").mkdir(parents=True)
  return made(root, images="empty/masks").source("train")


def test_two_pictures_of_one_mask_are_refused(root):
  cv2.imwrite(str(root / "images/03.png"), np.zeros((40, 60, 3), np.uint8))
  check_message("1 label files belong to two images each: masks/03.png", lambda: made(root).source("train"))


def test_a_single_picture_is_not_enough(root):
  for index in range(1, 10):
    (root / f"images/{index:02}.jpg").unlink()
  check_message("has 1 picture and one is held out", lambda: made(root).source("train"))


def test_shards_hold_the_same_examples(root, tmp_path):
  data = made(root, holdout=0.3)
  writer.prepare(data, tmp_path / "out", name="mask_folder")
  stored = made(tmp_path / "out", holdout=0.3, format="tfds")
  for split, count in (("train", 7), ("eval", 3)):
    drawn, read = data.source(split), stored.source(split)
    assert len(read) == count
    for index in range(count):
      for key, value in drawn[index].items():
        np.testing.assert_array_equal(read[index][key], value)
  check_message("holdout=0.3 (here 0.1)", lambda: made(tmp_path / "out", format="tfds").source("train"))
