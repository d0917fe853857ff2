"""Pictures that EXIF data turn, in all data sets of one's own: stored or turned, what belongs to them as it is."""

import numpy as np
import pytest

from tests.helpers.turned_pictures import COUNT, MADE, SIZE, TURNED, picture, write
from vpd_jax.data.datasets import keypoint_list, mask_folder, refer_list
from vpd_jax.data.shards import writer


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
  size = {"sentences": "train: 5 sentences in 5 pictures", "keypoints": "train: 5 people"}.get(name, "train: 5 images")
  assert size in told and "WARNING: 2 of 5 images have an EXIF orientation. They are not rotated" in told
  assert "If they do not line up, set data.exif='turned'." in told
  assert "They are rotated (data.exif='turned')" in "\n".join(make(root, "turned").describe())
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
