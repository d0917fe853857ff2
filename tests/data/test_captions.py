"""Captions joined to the examples of any data set: by which name, through which transforms, and what is refused."""

import json
import pickle

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.depth_frames import TEST, TRAIN, write_frames
from tests.helpers.label_files import write_pairs
from tests.helpers.messages import check_message
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.data import captions, pipeline
from vpd_jax.data.datasets import mask_folder, nyu, room_figures, rooms

SAID = {name.format("rgb"): f"a picture of {name.split('/')[0]}" for name in (*TRAIN, *TEST)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("captions") / "nyu_depth_v2"
  train, test = write_frames(root / "sync", TRAIN), write_frames(root / "official_splits/test", TEST)
  (root / "train_list.txt").write_text("\n".join(train))
  (root / "test_list.txt").write_text("\n".join(test))
  return root


def written(folder, content):
  path = folder / "captions.json"
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return str(path)


def of_nyu(root, folder, content):
  return captions.Captioned(nyu.Nyu(root=str(root), crop=(32, 32)), written(folder, content))


@pytest.mark.parametrize("slash", ["/", ""])
@pytest.mark.parametrize("entry", [lambda text: text, lambda text: {"captions": [text]}])
def test_every_example_has_the_caption_of_its_picture_whatever_is_cut_of_it(root, tmp_path, slash, entry):
  data = of_nyu(root, tmp_path, {f"{slash}{name}.jpg": entry(text) for name, text in SAID.items()})
  bare = nyu.Nyu(root=str(root), crop=(32, 32))
  assert data.provides == bare.provides | {"sentence"} and data.classes == bare.classes
  for split, names in (("train", TRAIN), ("eval", TEST)):
    source = pickle.loads(pickle.dumps(data)).source(split)
    expected = [SAID[name.format("rgb")] for name in names]
    assert source.sentences() == expected == [source[i]["sentence"] for i in range(len(source))]
  seen = data.train_transform(source[0], np.random.default_rng(0), 1)
  same = bare.train_transform(bare.source("eval")[0], np.random.default_rng(0), 1)
  assert seen.pop("sentence") == expected[0] == data.eval_transform(source[0])["sentence"]
  assert seen.keys() == same.keys() and all((seen[key] == same[key]).all() for key in same)


def test_a_picture_may_go_by_its_file_alone(tmp_path):
  """As ADE20K's do; labels are read as without captions."""
  write_pairs(tmp_path / "images", tmp_path / "masks", (0, 1), ("a", "b", "c"))
  folder = mask_folder.MaskFolder(root=str(tmp_path), classes=("wall", "floor"))
  data = captions.Captioned(folder, written(tmp_path, {"a.jpg": "one", "images/b.jpg": "two", "c.jpg": "three"}))
  assert data.source("train").sentences() == ["one", "two"] and data.source("eval").sentences() == ["three"]
  assert data.describe() == folder.describe()


def test_batches_hold_the_tokens_of_the_captions_and_a_run_begins_with_how_many_are_cut(root, tmp_path):
  content = {f"{name}.jpg": "a bed" for name in SAID} | {f"{TRAIN[1].format('rgb')}.jpg": "a bed beside a wide window"}
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tadp,tiny")).unlock()
  config.data.update(root=str(root), captions=written(tmp_path, content), batch_size=3)
  config.optim.norm_group = config.optim.loss_group = 3
  config.method.tokenizer = "characters"
  exp = experiment.assemble(config.lock())
  dataset = experiment.dataset(config, exp)
  train, evaluation = experiment.sentence_lines(exp, dataset)
  assert train.startswith(
    "train: 3 sentences, 1 of them truncated to 8 tokens (method.token_length), such as 'a bed beside"
  )
  assert evaluation.startswith("eval: 2 sentences, 0 of them truncated")
  keys = experiment.batch_keys(exp, dataset)
  batches = pipeline.train_batches(dataset, batch_size=3, seed=0, keys=keys, prepare=exp.method.prepare)
  batch = next(batches)
  batches.close()
  assert batch.keys() == {"image", "depth", "tokens"} and batch["tokens"].shape == (3, 8)
  assert len(np.unique(batch["tokens"], axis=0)) == 2


@pytest.mark.parametrize("content, message", [
  ("{", "' cannot be read: it is not valid JSON"),
  ([], "' must hold an object like"),
  ({"a": "x", "b": " ", "c": {"captions": ["x", "y"]}}, ": 2 of 3 entries are not one caption, the first is 'b'; "),
  ({"a": {"caption": "x"}}, ": 1 of 1 entries are not one caption, the first is 'a'; "),
])  # fmt: skip
def test_files_in_another_form_are_refused(tmp_path, content, message):
  check_message(message, lambda: captions.read(written(tmp_path, content)))


def test_pictures_without_a_caption_are_counted_and_the_first_is_named(root, tmp_path):
  data = of_nyu(root, tmp_path, {f"{TRAIN[1].format('rgb')}.jpg": "a study"})
  message = "has no caption of 2 of 3 pictures of the train split, the first is 'kitchen_0028b/rgb_00045.jpg'"
  check_message(message, lambda: data.source("train"))


def test_two_pictures_do_not_share_a_caption_by_their_files_name(root, tmp_path):
  """Frames of two rooms are called alike."""
  content = {f"{name}.jpg": "text" for name in SAID} | {"rgb_00045.jpg": "whose?"}
  del content[f"{TRAIN[0].format('rgb')}.jpg"]
  assert of_nyu(root, tmp_path, content).source("train").sentences()[0] == "whose?"  # one in this split
  source = nyu.Nyu(root=str(root)).source("train")
  source.pairs[1] = ("other_0001/rgb_00045.jpg", source.pairs[1][1])
  dataset = nyu.Nyu(root=str(root))
  dataset.source = lambda split: source
  data = captions.Captioned(dataset, written(tmp_path, content))
  shared = "one caption, 'rgb_00045.jpg', for 'kitchen_0028b/rgb_00045.jpg' and 'other_0001/rgb_00045.jpg' of the train"
  check_message(shared, lambda: data.source("train"))


def test_data_without_names_or_with_sentences_is_refused(tmp_path):
  path = written(tmp_path, {"a": "b"})
  drawn = {"train_count": 2, "eval_count": 1, "size": (32, 32), "crop": (32, 32)}
  figures = captions.Captioned(room_figures.RoomFigures(**drawn), path)
  check_message("images of this data set have no file names", lambda: figures.source("train"))
  speaking = rooms.Rooms(task="referring", **drawn)
  check_message("no effect on a data set with sentences", lambda: captions.Captioned(speaking, path))


@pytest.mark.parametrize("method, captions_of, message", [
  ("tadp", "", "Set config.data.captions to a file of them."),
  ("vpd", "FILE", "config.data.captions='FILE': nothing of method 'vpd' reads this"),
])  # fmt: skip
def test_methods_that_read_captions_need_them_and_others_refuse_them(root, method, captions_of, message):
  config = loader.load(f"configs/nyu_depth.py:{method},tiny").unlock()
  config.data.update(root=str(root), captions=captions_of)
  check_message(message, lambda: experiment.dataset(config, experiment.assemble(config.lock())))
