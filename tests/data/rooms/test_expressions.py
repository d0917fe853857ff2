"""Sentences about rooms: masks of the right objects, every sentence once, objects as many sentences can tell apart."""

import pickle

import numpy as np
import pytest

from tests.helpers.messages import check_sentences
from vpd_jax.data import pipeline
from vpd_jax.data.datasets import rooms
from vpd_jax.data.rooms import expressions
from vpd_jax.data.shards import writer


def dataset(**options):
  sizes = {"size": (48, 64), "crop": (64, 64), "train_count": 6, "eval_count": 4}
  return rooms.Rooms(task="referring", **sizes | options)


def test_evaluation_has_every_sentence_of_every_room_once():
  source = dataset().source("eval")
  expected = [(i, *said) for i in range(4) for said in rooms.sentences(rooms.draw(0, "eval", i, (48, 64)))]
  assert len(source) == len(expected) > 8 and source.sentences() == [text for _, text, _ in expected]
  for index in (0, len(source) - 1):
    example = source[index]
    assert (int(example["image_id"]), example["sentences"], int(example["numbers"][0])) == expected[index]
    assert int(example["index"]) == index


def test_rooms_are_drawn_once_to_find_their_sentences(monkeypatch):
  drawn, draw = [], rooms.draw
  monkeypatch.setattr(rooms, "draw", lambda *given, **options: drawn.append(given) or draw(*given, **options))
  data = dataset()
  assert data.source("eval") is data.source("eval") and len(drawn) == 4


def test_the_mask_is_that_of_the_object_the_sentence_is_about():
  data = dataset(crop=(48, 64))
  example = data.source("train")[2]
  room = rooms.draw(0, "train", 2, (48, 64))
  said = dict(rooms.sentences(room))
  assert len(said) > 1
  seen = set()
  for seed in range(30):
    found = data.train_transform(example, np.random.default_rng(seed), 0)
    np.testing.assert_array_equal(found["mask"], room.instances == said[found["sentence"]])
    seen.add(found["sentence"])
  assert seen == set(said)


def test_examples_are_resized_and_hold_what_is_promised():
  data = dataset()
  found = data.eval_transform(data.source("eval")[1])
  assert found["image"].shape == (64, 64, 3) and found["mask"].shape == (64, 64) and found["mask"].any()
  assert found["full_mask"].shape == (48, 64) and found["full_size"].tolist() == [48, 64]
  assert data.provides <= found.keys() and data.classes == ()
  both = data.eval_transform(data.source("train")[1])  # what baselines are fitted on
  assert both["mask"].any() and both["sentence"] in data.source("train")[1]["sentences"].split("\n")


def test_batches_and_workers_get_the_same():
  data = pickle.loads(pickle.dumps(dataset()))
  batch = next(pipeline.train_batches(data, batch_size=4, seed=0, keys=("image", "mask", "image_id")))
  again = next(pipeline.train_batches(dataset(), batch_size=4, seed=0, keys=("image", "mask", "image_id")))
  for key, value in batch.items():
    np.testing.assert_array_equal(value, again[key])
  assert batch["mask"].shape == (4, 64, 64)


def test_a_room_with_nothing_to_speak_of_is_replaced_by_one_of_its_own():
  drawn = []
  draw = lambda index: drawn.append(index) or rooms.draw(0, "train", index, (24, 32))
  say = lambda room: [] if len(drawn) == 1 else [("a thing", 1)]
  example = expressions.RoomExpressions(draw, say, 10, single=False)[3]
  assert drawn == [3, 13] and int(example["image_id"]) == 13 and int(example["index"]) == 3
  nothing = expressions.RoomExpressions(draw, lambda room: [], 2, single=True)
  assert len(nothing) == 0
  with pytest.raises(IndexError, match="index=0 is outside the 0 records"):
    nothing[0]


def test_shards_give_the_same_examples(tmp_path):
  data = dataset(train_count=2, eval_count=1)
  writer.prepare(data, tmp_path / "out", name="rooms", say=lambda line: None)
  stored = dataset(train_count=2, eval_count=1, format="tfds", root=str(tmp_path / "out"))
  for split in ("train", "eval"):
    drawn, shards = data.source(split), stored.source(split)
    assert len(drawn) == len(shards)
    for key, value in drawn[1].items():
      np.testing.assert_array_equal(shards[1][key], value, err_msg=key)


@pytest.mark.parametrize("options, what", [
  ({"cut_depth": "scaled"}, r"^data\.cut_depth='scaled' has no effect where data\.task='referring'"),
  ({"ratio_range": (0.5, 2.0)}, r"^data\.ratio_range=\(0\.5, 2\.0\) has no effect where data\.task='referring'"),
])  # fmt: skip
def test_options_without_effect_are_refused(options, what):
  with pytest.raises(ValueError, match=what) as caught:
    dataset(**options)
  check_sentences(caught.value)
