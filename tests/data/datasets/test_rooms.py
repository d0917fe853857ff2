import pickle

import numpy as np
import pytest

from vpd_jax.data.datasets import nyu, rooms
from vpd_jax.data.rooms import figure, render
from vpd_jax.data.rooms import scene as room_scene
from vpd_jax.data.shards import writer
from vpd_jax.tasks.depth import baselines

SIZE = (48, 64)


@pytest.fixture(scope="module")
def examples() -> dict[str, list[dict]]:
  data = rooms.Rooms(size=SIZE, crop=(48, 48), train_count=300, eval_count=80)
  return {split: list(data.source(split)) for split in rooms.SPLITS}


@pytest.fixture(scope="module")
def drawn() -> list[rooms.Room]:
  return [rooms.draw(0, "train", index, (96, 128)) for index in range(40)]


def test_an_example_has_the_stated_keys_types_and_ranges(examples):
  for index, example in enumerate(examples["eval"]):
    assert set(example) == rooms.Rooms.provides
    assert example["image"].shape == (*SIZE, 3) and example["image"].dtype == np.uint8
    assert example["depth"].shape == SIZE and example["depth"].dtype == np.float32
    assert example["class_id"].dtype == np.int32 and example["index"] == index and example["index"].dtype == np.int32
    measured = example["depth"][example["depth"] > 0]
    assert measured.min() > 0.1 and measured.max() < rooms.MAX_DEPTH


def test_some_depth_is_missing_but_not_much(examples):
  missing = np.mean([example["depth"] == 0 for example in examples["train"]])
  assert 0.005 < missing < 0.08


def test_scene_classes_are_nyus_and_all_five_occur(examples):
  names = {nyu.CLASSES[int(example["class_id"])] for example in examples["train"]}
  assert names == set(room_scene.SCENES) and rooms.Rooms.classes == nyu.CLASSES


def test_a_room_depends_on_seed_split_and_index_only(examples):
  source = pickle.loads(pickle.dumps(rooms.Rooms(size=SIZE, crop=SIZE, train_count=7).source("train")))
  again = source[5]
  for name, value in examples["train"][5].items():
    np.testing.assert_array_equal(again[name], value)
  others = [rooms.draw(1, "train", 5, SIZE), rooms.draw(0, "eval", 5, SIZE), rooms.draw(0, "train", 6, SIZE)]
  assert all(np.mean(other.image != again["image"]) > 0.5 for other in others)


def test_rooms_from_shards_equal_drawn_ones(tmp_path):
  options = dict(size=SIZE, crop=(32, 32), train_count=3, eval_count=2)
  writer.prepare(rooms.Rooms(**options), tmp_path / "rooms", name="rooms")
  stored = rooms.Rooms(**options, format="tfds", root=str(tmp_path / "rooms"))
  for split, count in (("train", 3), ("eval", 2)):
    drawn, read = rooms.Rooms(**options).source(split), stored.source(split)
    assert len(read) == count
    for index in range(count):
      assert drawn[index].keys() == read[index].keys()
      for name, value in drawn[index].items():
        np.testing.assert_array_equal(read[index][name], value)
        assert read[index][name].dtype == value.dtype


def test_no_evaluation_room_is_a_training_room(examples):
  pictures = [{example["depth"].tobytes() for example in examples[split]} for split in rooms.SPLITS]
  assert not pictures[0] & pictures[1] and len(pictures[0]) == 300 and len(pictures[1]) == 80


def test_a_room_at_twice_the_size_is_the_same_room():
  small, large = (rooms.draw(0, "eval", 3, size) for size in ((48, 64), (96, 128)))
  assert np.mean(np.abs(large.surface[::2, ::2] - small.surface) < 0.2) > 0.9


def test_the_rooms_are_not_solved_by_pixel_position_or_color(examples):
  scores = baselines.depth_baselines(examples["train"], examples["eval"])
  assert scores["constant"] > 0.8
  assert scores["position_mean"] > 0.7 * scores["constant"]
  assert scores["linear_rgb_position"] > 0.7 * scores["constant"]


def test_training_examples_are_crops_of_their_own_size():
  data = rooms.Rooms(size=SIZE, crop=(32, 48), train_count=2)
  example = data.source("train")[1]
  once, again = (data.train_transform(example, np.random.default_rng(3), 0) for _ in range(2))
  assert once["image"].shape == (32, 48, 3) and once["depth"].shape == (32, 48)
  np.testing.assert_array_equal(once["image"], again["image"])
  assert data.eval_transform(example)["image"].shape == (*SIZE, 3)


def test_every_wrong_option_has_its_message():
  with pytest.raises(ValueError, match="task='pose'"):
    rooms.Rooms(task="pose")
  with pytest.raises(ValueError, match="crop="):
    rooms.Rooms(size=(48, 64), crop=(64, 64))
  with pytest.raises(ValueError, match="cut_depth="):
    rooms.Rooms(cut_depth="sometimes")
  with pytest.raises(ValueError, match="train_count=0"):
    rooms.Rooms(train_count=0)
  with pytest.raises(ValueError, match="seed=-1"):
    rooms.Rooms(seed=-1)
  with pytest.raises(ValueError, match=r"data.captioned=True has no effect where data.task='referring'"):
    rooms.Rooms(task="referring", captioned=True)
  with pytest.raises(ValueError, match="split='test'"):
    rooms.Rooms().source("test")
  with pytest.raises(IndexError, match="index=64"):
    rooms.Rooms().source("eval")[64]


def test_a_sphere_and_a_box_lie_at_their_planar_depth():
  camera = render.look(np.zeros(3), yaw=0.0, pitch=0.0, roll=0.0)
  parts = render.Parts(
    shapes=np.array([render.BOX, render.ELLIPSOID, render.CYLINDER]),
    centers=np.array([[5, 0, 0], [3, 0, 0], [3, 1.0, 0]], np.float32),
    halves=np.array([[1, 9, 9], [0.5, 0.5, 0.5], [0.2, 0.2, 9]], np.float32),
    frames=np.stack([np.eye(3, dtype=np.float32)] * 3),
    colors=np.ones((3, 2, 3), np.float32),
    textures=np.zeros(3, int),
    pitches=np.ones(3, np.float32),
    labels=np.zeros(3, np.uint8),
    instances=np.zeros(3, int),
  )
  depth, seen = render.draw(parts, camera, render.cast_rays(camera, (65, 65)))
  np.testing.assert_allclose(depth[32, 32], 2.5, atol=1e-3)
  np.testing.assert_allclose(depth[seen == 0], 4.0, atol=1e-4)  # planar: the same all over a wall seen from the front
  (x, y), _ = render.project(np.array([3, 1.0, 0], np.float32), camera, (65, 65))
  assert x < 32 and seen[int(y), int(x)] == 2  # y of the world is on the left


def test_every_pixel_sees_something_and_labels_match_the_instances(drawn):
  shell = [room_scene.CLASSES.index(name) for name in ("wall", "floor", "ceiling")]
  for room in drawn:
    assert np.isfinite(room.surface).all() and room.labels.max() < len(room_scene.CLASSES)
    np.testing.assert_array_equal(room.instances == 0, np.isin(room.labels, shell))
    for number, (_, name) in enumerate(room.names, start=1):
      assert set(np.unique(room.labels[room.instances == number])) <= {room_scene.CLASSES.index(name)}


def test_a_sentence_names_one_visible_object(drawn):
  texts = [rooms.sentences(room) for room in drawn]
  assert sum(map(len, texts)) > 3 * len(drawn)
  assert any(text.endswith("on the left") for row in texts for text, _ in row)
  for room, row in zip(drawn, texts, strict=True):
    assert len({text for text, _ in row}) == len(row)
    for text, number in row:
      assert " ".join(room.names[number - 1]) in text and (room.instances == number).any()
      alike = [i for i, name in enumerate(room.names, start=1) if name == room.names[number - 1]]
      columns = {i: np.nonzero(room.instances == i)[1].mean() for i in alike if (room.instances == i).any()}
      if text.endswith("left"):
        assert number == min(columns, key=columns.get)
      elif text.endswith("right"):
        assert number == max(columns, key=columns.get)
      else:
        assert len(columns) == 1


def test_a_caption_names_the_scene_and_what_is_visible_the_largest_first(drawn):
  for room in drawn:
    text, areas = rooms.caption(room), np.bincount(room.instances.ravel(), minlength=len(room.names) + 1)[1:]
    scene, _, listed = text.partition(" with ")
    assert scene.split(" ")[1] == room.scene and scene.split(" ")[0] == ("an" if room.scene == "office" else "a")
    named = [phrase.split(" ", 1) for phrase in listed.replace(" and ", ", ").split(", ") if phrase]
    largest = [max(areas[i] for i, name in enumerate(room.names) if " ".join(name) == phrase) for _, phrase in named]
    assert largest == sorted(largest, reverse=True) and len(named) <= rooms.MOST_OBJECTS
    assert all(area >= rooms.MENTIONED * room.labels.size for area in largest)
    assert all(article == ("an" if phrase[0] in "aeiou" else "a") for article, phrase in named)
    small = areas < rooms.MENTIONED * room.labels.size
    unnamed = [i for i, name in enumerate(room.names) if " ".join(name) not in {phrase for _, phrase in named}]
    assert len(named) == rooms.MOST_OBJECTS or small[unnamed].all()
  assert max(rooms.caption(room).count(",") for room in drawn) == rooms.MOST_OBJECTS - 2


def test_a_room_in_which_nothing_is_visible_has_a_caption(drawn):
  empty = drawn[0]._replace(instances=np.zeros_like(drawn[0].instances), scene="bedroom")
  assert rooms.caption(empty) == "a bedroom"


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_captioned_examples_are_the_others_with_a_sentence(task, tmp_path):
  options = dict(task=task, size=SIZE, crop=(32, 32), train_count=2, eval_count=2)
  plain, captioned = rooms.Rooms(**options), pickle.loads(pickle.dumps(rooms.Rooms(**options, captioned=True)))
  assert captioned.provides == plain.provides | {"sentence"}
  writer.prepare(captioned, tmp_path / "rooms", name="rooms")
  stored = rooms.Rooms(**options, captioned=True, format="tfds", root=str(tmp_path / "rooms"))
  for split in rooms.SPLITS:
    for data in (captioned, stored):
      example, other = data.source(split)[1], plain.source(split)[1]
      for found, same in (
        (
          data.train_transform(example, np.random.default_rng(1), 3),
          plain.train_transform(other, np.random.default_rng(1), 3),
        ),
        (data.eval_transform(example), plain.eval_transform(other)),
      ):
        assert found.pop("sentence") == rooms.caption(rooms.draw(0, split, 1, SIZE))
        assert found.keys() == same.keys() and all((found[key] == same[key]).all() for key in same)


def test_shards_without_captions_are_refused_where_they_are_needed(tmp_path):
  options = dict(size=SIZE, crop=(32, 32), train_count=1, eval_count=1)
  writer.prepare(rooms.Rooms(**options), tmp_path / "rooms", name="rooms")
  stored = rooms.Rooms(**options, captioned=True, format="tfds", root=str(tmp_path / "rooms"))
  with pytest.raises(ValueError, match=r"were made with captioned=default \(here True\); prepare them again"):
    stored.source("train")


def test_visible_keypoints_lie_on_or_beside_the_figure(drawn):
  person = room_scene.CLASSES.index("person")
  visible, beside = 0, 0
  for room in drawn:
    points, (left, top, width, height) = rooms.keypoints(room), rooms.person_box(room)
    assert points.shape == (17, 3) and set(points[:, 2]) <= {0, 1, 2}
    assert (points[points[:, 2] == 0] == 0).all()
    if room.joints is None:
      assert not points.any() and not width
    for x, y, _ in points[points[:, 2] == 2]:
      visible += 1
      around = room.labels[max(int(y) - 2, 0) : int(y) + 3, max(int(x) - 2, 0) : int(x) + 3]
      beside += (around == person).any() and left - 2 <= x <= left + width + 2 and top - 2 <= y <= top + height + 2
  assert visible > 50 and beside > 0.95 * visible


def test_a_figure_stands_on_the_floor_with_its_left_on_its_left():
  for seed in range(20):
    joints = dict(zip(figure.KEYPOINTS, figure.pose(np.random.default_rng(seed)), strict=True))
    ankles = joints["left_ankle"][2], joints["right_ankle"][2]
    assert 0.05 < min(ankles) < 0.1 and 1.2 < joints["nose"][2] < 2.0
    assert joints["left_shoulder"][0] < joints["right_shoulder"][0] and joints["left_hip"][0] < joints["right_hip"][0]


def test_a_camera_that_turns_sees_the_room_around_it():
  still, once_around, aside = (rooms.draw(0, "eval", 3, SIZE, turn=turn) for turn in (0.0, 2 * np.pi, 0.2))
  np.testing.assert_allclose(once_around.surface, still.surface, rtol=1e-4)
  assert np.median(np.abs(aside.surface - still.surface)) > 0.01
  # What is ahead after a turn to the left, towards y, was 0.2 radians left of the middle: the same ray, another axis.
  height, width = SIZE
  column = round(width / 2 - render.FOCAL * width * np.tan(0.2))
  ray = aside.surface[height // 2, width // 2] * np.cos(0.2)
  np.testing.assert_allclose(still.surface[height // 2, column], ray, rtol=0.1)
