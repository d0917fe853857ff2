"""The figures of the rooms: what an example holds, and that the picture shows it."""

import pickle

import numpy as np
import pytest

from vpd_jax.data.datasets import room_figures, rooms
from vpd_jax.data.datasets.room_figures import RoomFigures
from vpd_jax.data.shards import writer
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.types import DatasetInfo

SIZE = (96, 128)


@pytest.fixture(scope="module")
def data():
  return RoomFigures(size=SIZE, crop=(64, 48), train_count=40, eval_count=8)


@pytest.fixture(scope="module")
def examples(data):
  source = data.source("train")
  return [source[i] for i in range(len(source))]


def test_every_record_is_a_figure_in_view(examples):
  for index, example in enumerate(examples):
    points, (x, y, w, h) = example["keypoints"], example["box"]
    seen = points[points[:, 2] > 0]
    assert len(seen) >= room_figures.MINIMUM and example["index"] == example["image_index"] == index
    assert example["image"].shape == (*SIZE, 3)
    # Joints lie inside the body, and so inside the box of what is seen, unless furniture hides them.
    plain = points[points[:, 2] == 2]
    inside = (plain[:, 0] >= x - 2) & (plain[:, 0] <= x + w + 2) & (plain[:, 1] >= y - 2) & (plain[:, 1] <= y + h + 2)
    assert inside.mean() > 0.7
    # From the front: the left shoulder is on the right, up to what hides one of them.
    assert not points[5, 2] or not points[6, 2] or points[5, 0] > points[6, 0]
  heights = [example["box"][3] for example in examples]
  assert min(heights) >= 12 and np.ptp(heights) > 20


def test_no_room_is_taken_twice_and_all_follow_from_the_seed(data, examples):
  assert len({example["image"].tobytes() for example in examples}) == len(examples)
  again = pickle.loads(pickle.dumps(data)).source("train")[5]
  for name, value in examples[5].items():
    np.testing.assert_array_equal(again[name], value)
  other = RoomFigures(size=SIZE, seed=1, train_count=40).source("train")[5]
  assert (other["image"] != again["image"]).any()
  assert (data.source("eval")[5]["image"] != again["image"]).any()


def test_the_truth_is_of_the_records(data):
  truth, source = data.truth("eval"), data.source("eval")
  assert [image["id"] for image in truth["images"]] == list(range(8))
  for index, entry in enumerate(truth["annotations"]):
    np.testing.assert_array_equal(np.reshape(entry["keypoints"], (17, 3)), source[index]["keypoints"])
    assert entry["image_id"] == index and entry["id"] == index + 1
    assert 0 < entry["area"] <= entry["bbox"][2] * entry["bbox"][3]
    assert entry["area"] == np.sum(source._draw(index)[0].labels == rooms.CLASSES.index("person"))


def test_figures_from_shards_equal_drawn_ones(tmp_path):
  options = {"size": SIZE, "crop": (64, 48), "train_count": 3, "eval_count": 2}
  writer.prepare(RoomFigures(**options), tmp_path / "figures", name="room_figures")
  stored = RoomFigures(**options, format="tfds", root=str(tmp_path / "figures"))
  for split, count in (("train", 3), ("eval", 2)):
    drawn, read = RoomFigures(**options).source(split), stored.source(split)
    assert len(read) == count
    for index in range(count):
      for name, value in drawn[index].items():
        np.testing.assert_array_equal(read[index][name], value)
        assert read[index][name].dtype == value.dtype
  assert stored.truth("eval") == RoomFigures(**options).truth("eval")


def test_transforms_give_crops(data, examples):
  for example in (data.train_transform(examples[0], np.random.default_rng(0), 0), data.eval_transform(examples[0])):
    assert set(example) == data.provides and example["image"].shape == (64, 48, 3)
  assert data.info({}) == DatasetInfo(data.classes, keypoints=top_down_transforms.COCO)


def test_captioned_figures_are_the_others_with_the_caption_of_their_room(tmp_path):
  options = {"size": SIZE, "crop": (64, 48), "train_count": 3, "eval_count": 1}
  plain, captioned = RoomFigures(**options), pickle.loads(pickle.dumps(RoomFigures(**options, captioned=True)))
  assert captioned.provides == plain.provides | {"sentence"} and "sentence" not in RoomFigures.provides
  writer.prepare(captioned, tmp_path / "figures", name="room_figures")
  stored = RoomFigures(**options, captioned=True, format="tfds", root=str(tmp_path / "figures"))
  expected = rooms.caption(plain.source("train")._draw(2)[0])
  assert "a standing person" in expected
  for data in (captioned, stored):
    example, same = data.source("train")[2], plain.source("train")[2]
    pairs = [
      (
        data.train_transform(example, np.random.default_rng(1), 0),
        plain.train_transform(same, np.random.default_rng(1), 0),
      ),
      (data.eval_transform(example), plain.eval_transform(same)),
    ]
    for found, other in pairs:
      assert found.pop("sentence") == expected
      assert found.keys() == other.keys() and all((found[key] == other[key]).all() for key in other)


@pytest.mark.parametrize("call, message", [
  (lambda: RoomFigures(root="x"), r"^root='x' has no effect: rooms are drawn"),
  (lambda: RoomFigures(train_count=0), r"^train_count=0 must be a whole number of at least 1"),
  (lambda: RoomFigures(crop=(63, 48)), r"^data: crop=\(63, 48\) must have sides of multiples of 4"),
  (lambda: RoomFigures().source("test"), r"^split='test' is unknown"),
  (lambda: RoomFigures(size=(120, 8)).source("train")[0], r"^none of 64 rooms of 120x8 pixels shows a figure"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
