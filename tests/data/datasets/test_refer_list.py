"""A user's own sentences: entries, masks, what is held out, and everything that can be wrong with the file."""

import json

import cv2
import numpy as np
import pytest

from tests.helpers.messages import check_sentences
from vpd_jax.data.datasets import refer_list
from vpd_jax.data.shards import writer


def entry(number, *sentences, **more):
  return {"image": f"{number}.jpg", "mask": f"{number}.png", "sentences": list(sentences) or ["a thing"], **more}


def write(root, entries, masks=None):
  """Pictures 0 to 4 and their masks: two squares, numbers 1 and 2, in picture 1; one of 255 in the others."""
  for number in range(5):
    size = (20 + number, 30)
    cv2.imwrite(str(root / f"{number}.jpg"), np.full((*size, 3), 40 * number, np.uint8))
    mask = np.zeros(size, np.uint8)
    mask[2:6, 3:9] = 1 if number == 1 else 255
    if number == 1:
      mask[8:12, 10:20] = 2
    cv2.imwrite(str(root / f"{number}.png"), mask if masks is None else masks)
  (root / "sentences.json").write_text(json.dumps(entries))
  return refer_list.ReferList(root=str(root), crop=(16, 16), canvas=(32, 32))


FINE = [entry(0, "one", "two\n three"), entry(1, "left", value=1), entry(1, "right", value=2), entry(2), entry(3)]


def test_the_last_pictures_are_held_out(tmp_path):
  data = write(tmp_path, [*FINE, entry(4, "x", "y")])
  assert data.source("train").sentences() == ["one", "two three", "left", "right", "a thing", "a thing"]
  assert data.source("eval").sentences() == ["x", "y"]
  assert [int(data.source("train")[i]["image_id"]) for i in range(5)] == [0, 1, 1, 2, 3]


def test_all_objects_of_a_picture_are_on_one_side(tmp_path):
  data = write(tmp_path, [entry(0), entry(1, value=1), entry(2), entry(1, value=2)])
  data.holdout = 0.6
  assert [item.image for item in data.source("eval").items] == ["1.jpg", "1.jpg", "2.jpg"]
  assert [item.image for item in data.source("train").items] == ["0.jpg"]


def test_a_split_can_be_said(tmp_path):
  data = write(tmp_path, [entry(0, split="eval"), entry(1, value=1), entry(2, split="train")])
  assert len(data.source("train")) == 2 and len(data.source("eval")) == 1


def test_masks_are_where_the_number_is(tmp_path):
  source = write(tmp_path, [*FINE, entry(4)]).source("train")
  first, second = source[1]["mask"], source[2]["mask"]
  assert first.sum() == 24 and second.sum() == 40 and not (first & second).any() and source[0]["mask"].sum() == 24
  assert all(set(np.unique(source[i]["mask"])) == {0, 1} for i in range(3))


def test_shards_give_the_same_examples(tmp_path):
  data = write(tmp_path, [*FINE, entry(4)])
  writer.prepare(data, tmp_path / "out", name="refer_list", say=lambda line: None)
  stored = refer_list.ReferList(root=str(tmp_path / "out"), format="tfds")
  for split in ("train", "eval"):
    files, shards = data.source(split), stored.source(split)
    for index in range(len(files)):
      for key, value in files[index].items():
        np.testing.assert_array_equal(shards[index][key], value, err_msg=key)


@pytest.mark.parametrize("entries, what", [
  ([], r"must hold a list of entries like"),
  ({"a": 1}, r"must hold a list of entries like"),
  ([entry(0), entry(1, " ")], r"1 of 2 entries are wrong: number 2 has an empty sentence\. One is like"),
  ([entry(0) | {"sentences": []}], r"number 1 has no list of sentences"),
  ([entry(0) | {"sentences": "the box"}], r"number 1 has no list of sentences"),
  ([{"mask": "a", "sentences": ["x"]}, 5], r"number 1 names no image; number 2 is not an object"),
  ([entry(0, sentence="x")], r"number 1 has \['sentence'\], known are"),
  ([entry(0, value=0)], r"number 1 has the value 0, not a number from 1 to 253, or 255"),
  ([entry(0, split="test")], r"number 1 has the split 'test', not one of"),
  ([entry(0)], r"has nothing for 'train'; add pictures"),
  ([entry(0), entry(7), entry(8), entry(1)], r"^4 files are missing in .*7\.jpg"),
])  # fmt: skip
def test_wrong_files_are_told_in_one_line(tmp_path, entries, what):
  with pytest.raises(ValueError, match=what) as caught:
    write(tmp_path, entries).source("train")
  check_sentences(caught.value)


@pytest.mark.parametrize("masks, more, what", [
  (np.zeros((20, 30), np.uint8), {}, r"^mask .*0\.png is empty\. It is about 'a thing' in "),
  (np.ones((21, 30), np.uint8), {}, r"0\.png is 21x30, its picture 20x30"),
  (np.ones((20, 30), np.uint8), {"value": 4}, r"0\.png has no pixel of the number 4"),
  (np.repeat(np.arange(30, dtype=np.uint8)[None], 20, 0), {}, r"holds the numbers 1, 2, 3.*; say which one in"),
  (np.zeros((20, 30, 3), np.uint8), {}, r"has three channels"),
])  # fmt: skip
def test_wrong_masks_are_told_when_they_are_read(tmp_path, masks, more, what):
  data = write(tmp_path, [entry(0, **more), entry(1)], masks)
  with pytest.raises(ValueError, match=what) as caught:
    data.source("train")[0]
  check_sentences(caught.value)


def test_the_file_must_be_there_and_json(tmp_path):
  data = write(tmp_path, FINE)
  (tmp_path / "sentences.json").write_text("[{]")
  with pytest.raises(ValueError, match=r"it is not valid JSON or truncated"):
    data.source("train")
  (tmp_path / "sentences.json").unlink()
  with pytest.raises(ValueError, match=r"data\.file"):
    data.source("train")
  with pytest.raises(ValueError, match=r"^data\.holdout=1 must lie between"):
    refer_list.ReferList(root=str(tmp_path), holdout=1)
