import errno
import functools
import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.depth_frames import TEST, TRAIN, write_frames
from tests.helpers.killed_writing import Killed
from tests.helpers.messages import check_message
from vpd_jax.data import pipeline
from vpd_jax.data.datasets import nyu, rooms
from vpd_jax.data.shards import reader, writer
from vpd_jax.types import Dataset, Source


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("data") / "nyu_depth_v2"
  names = [f"kitchen_0028b/{{}}_{i:05}" for i in range(5)]
  train, test = write_frames(root / "sync", TRAIN + names), write_frames(root / "official_splits/test", TEST)
  (root / "train_list.txt").write_text("\n".join(train) + "\n")
  (root / "test_list.txt").write_text("\n".join(test))
  return root


@pytest.fixture(scope="module")
def shards(root, tmp_path_factory):
  folder = tmp_path_factory.mktemp("shards") / "nyu"
  writer.prepare(nyu.Nyu(root=str(root)), folder, name="nyu", shard_bytes=20_000)
  return folder


def snapshot(folder):
  return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def assert_same(examples, others):
  assert len(examples) == len(others)
  for example, other in zip(examples, others, strict=True):
    assert example.keys() == other.keys()
    for key in example:
      assert example[key].dtype == other[key].dtype and example[key].shape == other[key].shape
      np.testing.assert_array_equal(example[key], other[key])


@pytest.mark.parametrize("split", ["train", "eval"])
def test_shards_hold_the_examples_of_the_files_in_their_order(root, shards, split):
  source = nyu.Nyu(root=str(shards), format="tfds").source(split)
  assert_same(list(nyu.Nyu(root=str(root)).source(split)), [source[i] for i in range(len(source))])
  assert len(list(shards.glob("*train*"))) > 1
  assert source[1]["image"].flags.writeable and source[1]["class_id"].flags.writeable
  with pytest.raises(IndexError):
    source[len(source)]


def test_shards_know_the_names_of_their_pictures(root, shards):
  stored, files = nyu.Nyu(root=str(shards), format="tfds").source("train"), nyu.Nyu(root=str(root)).source("train")
  assert [stored.picture(i) for i in range(len(stored))] == [files.picture(i) for i in range(len(files))]
  assert files.picture(1) == "study_room_0004/rgb_00001.jpg"


def test_shards_keep_the_notes_on_their_files(root, tmp_path, monkeypatch):
  data = nyu.Nyu(root=str(root))
  data.source("eval").notes = ["1 of 2 images has an EXIF orientation"]
  writer.prepare(data, tmp_path / "out", name="nyu", splits=("eval",))
  assert nyu.Nyu(root=str(tmp_path / "out"), format="tfds").source("eval").notes == [
    "when the shards were written: 1 of 2 images has an EXIF orientation"
  ]


def test_a_shard_holds_the_bytes_of_the_files(root, shards):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(shards)
  skip = dict.fromkeys(("image", "depth"), tfds.decode.SkipDecoding())
  stored = builder.as_data_source("train", decoders=skip)[1]
  assert stored["image"] == (root / "sync" / "study_room_0004/rgb_00001.jpg").read_bytes()
  assert stored["depth"] == (root / "sync" / "study_room_0004/sync_depth_00001.png").read_bytes()


def test_batches_from_shards_equal_those_from_files(root, shards):
  options = dict(batch_size=3, keys=("image", "depth", "class_id", "index"))
  datasets = [nyu.Nyu(root=str(root), crop=(32, 48)), nyu.Nyu(root=str(shards), crop=(32, 48), format="tfds")]
  training = [pipeline.train_batches(data, seed=1, start_step=2, **options) for data in datasets]
  assert_same(*[[next(batches) for _ in range(6)] for batches in training])
  with_worker = pipeline.train_batches(datasets[1], seed=1, start_step=2, workers=1, **options)
  assert_same([next(with_worker)], [next(pipeline.train_batches(datasets[0], seed=1, start_step=2, **options))])
  with_worker.close()
  assert_same(*[list(pipeline.eval_batches(data, **options)) for data in datasets])


def test_writing_leaves_the_files_alone_and_needs_no_tensorflow(root, tmp_path):
  before = snapshot(root)
  code = f"""
import sys
from vpd_jax.data.datasets import nyu
from vpd_jax.data.shards import writer
writer.prepare(nyu.Nyu(root={str(root)!r}), {str(tmp_path / "out")!r}, name="nyu")
nyu.Nyu(root={str(tmp_path / "out")!r}, format="tfds").source("eval")[0]
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, timeout=100)
  assert snapshot(root) == before
  assert os.listdir(tmp_path) == ["out"]


def test_a_killed_run_leaves_nothing_that_looks_whole_and_is_continued(root, tmp_path):
  output = tmp_path / "out"
  code = f"""
from tests.helpers import killed_writing
from vpd_jax.data.shards import writer
writer.prepare(killed_writing.Killed(root={str(root)!r}), {str(output)!r}, name="nyu", shard_bytes=1)
"""
  environment = {**os.environ, "VPD_TEST_KILL": "1"}
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=100, env=environment)
  assert ended.returncode == -signal.SIGKILL
  assert not output.exists()
  shards = tmp_path / "out.partial/shards"
  finished = {path.name: path.stat().st_mtime_ns for path in shards.glob("*array_record*") if path.suffix != ".part"}
  assert len(finished) == 4 and len(list(shards.glob("*.part"))) == 1
  said = []
  writer.prepare(Killed(root=str(root)), output, name="nyu", shard_bytes=1, say=said.append)
  assert said == ["continuing: 4 shards are finished, any other is written again"]
  assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished  # taken over, not written again
  assert os.listdir(tmp_path) == ["out"]
  assert_same(
    list(nyu.Nyu(root=str(root)).source("train")),
    [*map(nyu.Nyu(root=str(output), format="tfds").source("train").__getitem__, range(8))],
  )


def test_a_changed_data_set_starts_again(root, tmp_path):
  staging = tmp_path / "out.partial/shards"
  staging.mkdir(parents=True)
  (staging / "state.json").write_text(json.dumps({"name": "nyu"}))
  (staging / "vpd_jax-train.array_record-00000-of-00001").write_bytes(b"of another list")
  said = []
  writer.prepare(nyu.Nyu(root=str(root)), tmp_path / "out", name="nyu", say=said.append)
  assert said == ["starting again: 1 shards were written, since when the data set or its options have changed"]
  assert len(nyu.Nyu(root=str(tmp_path / "out"), format="tfds").source("train")) == 8
  writer.prepare(nyu.Nyu(root=str(root)), tmp_path / "out", name="nyu", say=said.append)
  assert said[1] == f"{tmp_path}/out is prepared already; remove it to write it again"


@pytest.mark.parametrize("state", [None, "", "{"])
def test_shards_whose_state_was_lost_are_written_again(root, tmp_path, state):
  staging = tmp_path / "out.partial/shards"
  staging.mkdir(parents=True)
  (staging / "vpd_jax-train.array_record-00000-of-00001").write_bytes(b"")
  if state is not None:
    (staging / "state.json").write_text(state)
  said = []
  writer.prepare(nyu.Nyu(root=str(root)), tmp_path / "out", name="nyu", say=said.append)
  assert said == ["starting again: 1 shards were written, of what is not known any more"]
  assert len(nyu.Nyu(root=str(tmp_path / "out"), format="tfds").source("train")) == 8


def test_a_finished_shard_is_on_the_disk_before_it_has_its_name(root, tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(writer.atomic, "sync", lambda path: synced.append((path.name, path.exists())))
  writer.prepare(nyu.Nyu(root=str(root)), tmp_path / "out", name="nyu", splits=("eval",))
  assert synced == [("vpd_jax-eval.array_record-00000-of-00001.part", True), ("shards", True)]


def test_where_nothing_can_be_written(root, tmp_path):
  data = nyu.Nyu(root=str(root))
  (tmp_path / "file").write_text("")
  (tmp_path / "full").mkdir()
  (tmp_path / "full/notes.txt").write_text("")
  for output, message in (
    (tmp_path / "file", "exists and is not an empty folder; give another one"),
    (tmp_path / "full", "exists and is not an empty folder"),
    (tmp_path / "file/below", "cannot be written: Not a directory"),
    ("gs://bucket/nyu", "must be a local folder; copy it to the bucket"),
  ):
    check_message(message, lambda output=output: writer.prepare(data, output, name="nyu"))
  assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_a_disk_that_is_too_small_is_found_before_writing(root, tmp_path, monkeypatch):
  monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
  check_message(
    "0.0 GB free, but 0.0 GB are needed",
    lambda: writer.prepare(nyu.Nyu(root=str(root)), tmp_path / "out", name="nyu"),
  )
  assert not (tmp_path / "out").exists()


def test_without_hard_links_shards_are_copied_and_twice_the_space_is_needed(root, tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.EPERM, "no links")

  free = []
  usage = lambda path: type("Usage", (), {"free": free[0]})
  monkeypatch.setattr(writer.shutil, "disk_usage", usage)
  data, size = nyu.Nyu(root=str(root)), 0
  for folder, links, enough in (("a", True, 1), ("b", False, 1), ("b", False, 2)):
    if not links:
      monkeypatch.setattr(writer.os, "link", refuse)
    size = size or sum(map(len, _records(root, "eval")))
    free[:] = [int(enough * size * 1.1)]
    prepare = functools.partial(writer.prepare, data, tmp_path / folder, name="nyu", splits=("eval",))
    if links or enough == 2:
      prepare()
      assert len(nyu.Nyu(root=str(tmp_path / folder), format="tfds").source("eval")) == 2
    else:
      check_message("GB free, but", prepare)


def _records(root, split):
  """The serialized records of a split."""
  data = nyu.Nyu(root=str(root))
  source = data.source(split)
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(writer.describe(data, source))
  return [features.serialize_example(source.record(index)) for index in range(len(source))]


def test_a_damaged_record_is_named_and_the_others_are_read(shards, tmp_path):
  bad = tmp_path / "bad"
  bad.mkdir()
  for path in shards.iterdir():
    (bad / path.name).write_bytes(path.read_bytes())
  shard = sorted(bad.glob("*train*"))[0]
  raw = bytearray(shard.read_bytes())
  raw[2000:2010] = bytes(10)
  shard.write_bytes(raw)
  source = nyu.Nyu(root=str(bad), format="tfds").source("train")
  check_message(f"record 0 of split 'train' in {bad} cannot be read", lambda: source[0])
  source[1]
  assert reader.SkipUnreadable(source)[0]["index"] == 1
  shard.write_bytes(raw[:-100])
  check_message("copy them again", lambda: nyu.Nyu(root=str(bad), format="tfds").source("train"))
  shard.unlink()
  check_message(
    f"1 of {len(list(shards.glob('*train*')))} shards are missing in {bad}: {shard.name}",
    lambda: nyu.Nyu(root=str(bad), format="tfds").source("train"),
  )


def test_a_lack_of_memory_is_not_taken_for_a_damaged_record(shards):
  def decode(record):
    raise MemoryError("a.png: no memory")

  with pytest.raises(MemoryError, match=r"a\.png: no memory"):
    reader.SkipUnreadable(reader.Shards(str(shards), "nyu", "train", decode=decode))[0]


def test_shards_are_those_that_were_asked_for(root, shards, tmp_path):
  drawn = tmp_path / "drawn"
  options = dict(size=(24, 32), crop=(24, 24), train_count=3, eval_count=2)
  writer.prepare(rooms.Rooms(**options), drawn, name="rooms", splits=("eval",))
  read = dict(options, root=str(drawn), format="tfds")
  for message, function in (
    ("made with seed=0 (here 1); prepare", lambda: rooms.Rooms(**dict(read, seed=1)).source("eval")),
    ("made with size=[24, 32] (here [32, 32])", lambda: rooms.Rooms(**dict(read, size=(32, 32))).source("eval")),
    ("holds the splits ['eval'] only", lambda: rooms.Rooms(**read).source("train")),
    ("holds shards of 'rooms', but data.name='nyu'", lambda: nyu.Nyu(root=str(drawn), format="tfds").source("eval")),
    ("holds no prepared shards", lambda: nyu.Nyu(root=str(root), format="tfds").source("eval")),
    ("data.root is empty; with data.format='tfds'", lambda: nyu.Nyu(root="", format="tfds").source("eval")),
    ("holds prepared shards; set data.format='tfds'", lambda: nyu.Nyu(root=str(shards))),
    ("format='zip' is unknown; choose one of ('files', 'tfds')", lambda: nyu.Nyu(root=str(root), format="zip")),
    (
      "data.train_list has no effect with data.format='tfds'",
      lambda: nyu.Nyu(root=str(shards), format="tfds", train_list="a"),
    ),
    ("root='x' has no effect: rooms are drawn", lambda: rooms.Rooms(root="x")),
  ):
    check_message(message, function)


class Odd(Dataset):
  """Examples of every kind that can be stored, and one that cannot."""

  made_with = {"widths": (1, 2)}  # noqa: RUF012

  def __init__(self, key="text"):
    self.key = key

  def source(self, split):
    rng = np.random.default_rng(0)
    kinds = {
      "text": "the rëd box",
      "flag": np.asarray(True),
      "double": np.asarray(1 / 3),
      "large": np.asarray(2**63 + 1, np.uint64),
      "mask": rng.random((3, 4)) < 0.5,
      "depth": rng.random((5, 2), np.float32),
      "boxes": np.zeros((0, 4), np.float64),
      "raw": np.asarray([None]),
    }
    keys = [self.key] if self.key == "raw" else [key for key in kinds if key != "raw"]
    return Twice({key: kinds[key] for key in keys})


class Twice(Source):
  def __init__(self, example):
    self.example = example

  def __len__(self):
    return 2

  def __getitem__(self, index):
    return self.example


def test_whole_examples_are_stored_exactly_where_a_data_set_states_no_records(tmp_path):
  writer.prepare(Odd(), tmp_path / "odd", name="odd")
  source = reader.Shards(str(tmp_path / "odd"), "odd", "train", made_with={"widths": (1, 2)})
  read, written = pickle.loads(pickle.dumps(source))[1], Odd().source("train")[1]
  assert read.pop("text") == written.pop("text")
  assert_same([read], [written])
  check_message(
    "'raw' is of object, which shards cannot hold", lambda: writer.prepare(Odd("raw"), tmp_path / "r", name="odd")
  )


def test_a_data_set_may_only_name_known_kinds():
  data = type("Data", (), {"stored": {"image": "picture", "sound": "wave"}})()
  check_message("names ['wave']; choose among", lambda: writer.describe(data, Odd().source("train")))
