"""Pictures that EXIF data turn, in all data sets of one's own: stored or turned, what belongs to them as it is."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from vpd_jax.data.datasets import depth_list, keypoint_list, mask_folder, refer_list
from vpd_jax.data.shards import writer

SIZE, COUNT, TURNED = (24, 40), 6, (1, 4)  # pictures of which two are turned


def picture(number):
  return cv2.resize(np.random.default_rng(number).integers(0, 256, (3, 5, 3), np.uint8), SIZE[::-1])


def write(root, orientation):
  """The same pictures for every data set; number 0, 1 .. as .png, which loses nothing."""
  for folder in ("images", "masks", "depth"):
    (root / folder).mkdir(parents=True)
  for number in range(COUNT):
    exif = Image.Exif()
    exif[0x0112] = orientation if number in TURNED else 1
    Image.fromarray(picture(number)).save(root / f"images/{number}.png", exif=exif)
    mask = np.zeros(SIZE, np.uint8)
    mask[2:8, 3:9] = 1
    cv2.imwrite(str(root / f"masks/{number}.png"), mask)
    cv2.imwrite(str(root / f"depth/{number}.png"), mask.astype(np.uint16) * 2000 + 1000)
  names = [f"{number}.png" for number in range(COUNT)]
  (root / "train_list.txt").write_text("\n".join(f"images/{name} depth/{name}" for name in names))
  entries = [{"image": f"images/{name}", "mask": f"masks/{name}", "sentences": ["it"]} for name in names]
  (root / "sentences.json").write_text(json.dumps(entries))
  images = [{"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in enumerate(names)]
  person = {"category_id": 1, "bbox": [3, 2, 6, 6], "keypoints": [4, 3, 2, 7, 6, 2]}
  people = [person | {"id": i + 1, "image_id": i} for i in range(COUNT)]
  categories = [{"id": 1, "name": "it", "keypoints": ["a", "b"]}]
  (root / "train.json").write_text(json.dumps({"images": images, "annotations": people, "categories": categories}))
  return root


MADE = {  # each with the key of what belongs to the picture
  "masks": (lambda root, exif: mask_folder.MaskFolder(root=root, classes=("no", "yes"), exif=exif), "label"),
  "depth": (
    lambda root, exif: depth_list.DepthList(root=root, factor=1e3, max_depth=9.0, crop=(8, 8), exif=exif),
    "depth",
  ),
  "sentences": (lambda root, exif: refer_list.ReferList(root=root, crop=(8, 8), exif=exif), "mask"),
  "keypoints": (lambda root, exif: keypoint_list.KeypointList(root=root, crop=(64, 64), exif=exif), "keypoints"),
}
MADE = {name: ((lambda root, exif, make=make: make(str(root), exif)), key) for name, (make, key) in MADE.items()}


@pytest.mark.parametrize("name", MADE)
def test_a_picture_upside_down_is_read_as_stored_or_turned_and_told(tmp_path, name):
  make, key = MADE[name]
  root = write(tmp_path / "data", 3)
  stored, turned = (make(root, exif).source("train") for exif in ("stored", "turned"))
  for number in range(COUNT - 1):
    np.testing.assert_array_equal(stored[number]["image"], picture(number))
    expected = picture(number)[::-1, ::-1] if number in TURNED else picture(number)
    np.testing.assert_array_equal(turned[number]["image"], expected)
    np.testing.assert_array_equal(stored[number][key], turned[number][key])
  told = "\n".join(make(root, "stored").describe())
  assert (
    "train: " in told and "WARNING: 2 of 5 pictures are turned by their EXIF data. They are read as they are" in told
  )
  assert "set data.exif='turned' where they do not lie" in told
  assert "They are turned (data.exif='turned')" in "\n".join(make(root, "turned").describe())
  assert not make(write(tmp_path / "upright", 1), "stored").source("train").notes


@pytest.mark.parametrize("name", MADE)
def test_a_picture_on_its_side_that_does_not_fit_is_an_error_with_the_option(tmp_path, name):
  make, _ = MADE[name]
  root = write(tmp_path / "data", 6)
  assert make(root, "stored").source("train")[1]["image"].shape == (*SIZE, 3)
  with pytest.raises(ValueError, match=r"EXIF data may turn the image: try data\.exif='stored'") as caught:
    make(root, "turned").source("train")[1]
  assert "\n" not in str(caught.value)
  with pytest.raises(ValueError, match=r"data\.exif='x' is unknown; choose one of \('stored', 'turned'\)"):
    make(root, "x")


@pytest.mark.parametrize("name", ["masks", "sentences", "keypoints"])
def test_shards_are_read_by_the_same_rule(tmp_path, name):
  root = write(tmp_path / "data", 3)
  kind = {"masks": "mask_folder", "sentences": "refer_list", "keypoints": "keypoint_list"}[name]
  writer.prepare(MADE[name][0](root, "stored"), tmp_path / "shards", name=kind, say=lambda line: None)
  options = {"masks": {"classes": ("no", "yes")}, "sentences": {"crop": (8, 8)}}
  options |= {"keypoints": {"crop": (64, 64), "json_root": str(root)}}
  make = {"masks": mask_folder.MaskFolder, "sentences": refer_list.ReferList, "keypoints": keypoint_list.KeypointList}
  for exif, expected in (("stored", picture(1)), ("turned", picture(1)[::-1, ::-1])):
    shards = make[name](root=str(tmp_path / "shards"), format="tfds", exif=exif, **options[name]).source("train")
    np.testing.assert_array_equal(shards[1]["image"], expected)
