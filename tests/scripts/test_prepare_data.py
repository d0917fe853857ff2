"""The script that checks a data set and writes its shards."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from tests.helpers.depth_frames import TEST, TRAIN, write_frames
from tests.helpers.loaded_scripts import load
from tests.helpers.messages import check_message
from tests.helpers.paths import ROOT
from vpd_jax.data.datasets import nyu, rooms

SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def script():
  return load("scripts/prepare_data.py")


@pytest.fixture
def root(tmp_path, monkeypatch):
  """NYU in small, with published numbers to match."""
  root = tmp_path / "nyu_depth_v2"
  train, test = write_frames(root / "sync", TRAIN), write_frames(root / "official_splits/test", TEST)
  (root / "train_list.txt").write_text("\n".join(train) + "\n")
  (root / "test_list.txt").write_text("\n".join(test))
  monkeypatch.setattr(nyu.Nyu, "published", nyu.Nyu.published._replace(counts={"train": 3, "eval": 2}, size=(48, 64)))
  return root


def run(script, *arguments):
  """What the script says."""
  said = []
  script.run(script.parse(["nyu", *map(str, arguments)]), said.append)
  return said


def sync_depth(root, number):
  return root / "sync" / (TRAIN[number].format("sync_depth") + ".png")


def test_published_numbers_of_nyu():
  assert nyu.Nyu.published.counts == {"train": 24_231, "eval": 654}
  assert nyu.Nyu.published.size == (480, 640)


def test_a_data_set_without_shards_is_only_checked(script, tmp_path):
  arguments = ["depth_list", f"--root={tmp_path}"]
  arguments += [f"--set={option}" for option in ("factor=1000", "max_depth=10", "crop=(8,8)")]
  with pytest.raises(ValueError, match=r"^depth_list is read from its files only, .*; give --check_only\.$"):
    script.run(script.parse([*arguments, f"--output={tmp_path}/out"]))
  assert not (tmp_path / "out").exists()
  with pytest.raises(ValueError, match=r"train: list file 'train_list\.txt'"):
    script.run(script.parse([*arguments, "--check_only"]))


def test_a_good_data_set_is_described_and_written(script, root, tmp_path):
  arguments = (f"--root={root}", f"--output={tmp_path}/out")
  said = run(script, *arguments, "--check_only")
  assert said[0].startswith("train: 3 records (published are 3); sizes 48x64 (3); depth 0.5")
  assert said[0].endswith("8.3 % missing") and said[2:] == ["no faults"]
  assert not (tmp_path / "out").exists()
  assert run(script, *arguments)[-1].endswith(f"train with --config.data.format=tfds --config.data.root={tmp_path}/out")
  assert len(nyu.Nyu(root=f"{tmp_path}/out", format="tfds").source("train")) == 3
  assert run(script, *arguments) == [f"{tmp_path}/out is prepared already; remove it to write it again"]


def test_all_faults_are_reported_together_and_nothing_is_written(script, root, tmp_path):
  raw = sync_depth(root, 0).read_bytes()
  sync_depth(root, 0).write_bytes(raw[: len(raw) // 2])
  cv2.imwrite(str(sync_depth(root, 1)), np.full((48, 64), 20_000, np.uint16))
  image = root / "sync" / (TRAIN[2].format("rgb") + ".jpg")
  cv2.imwrite(str(image), np.zeros((24, 32, 3), np.uint8))
  cv2.imwrite(str(sync_depth(root, 2)), np.zeros((24, 32), np.uint16))
  (root / "official_splits/test" / (TEST[0].format("rgb") + ".jpg")).unlink()
  arguments = (f"--root={root}", f"--output={tmp_path}/out")
  message = check_message("faults: ", lambda: run(script, *arguments))
  for part in (
    "4 faults: eval: 1 files are missing in",
    "bathroom/rgb_00045.jpg; they are cut out of nyu_depth_v2_labeled.mat",
    f"train: 1 records cannot be read: {sync_depth(root, 0)} is truncated",
    "train: 1 images are not 48x64: nyu_office_0/rgb_00000.jpg (24x32) (--accept sizes continues)",
    "train: depth of 2 records is not within 0 to 10: study_room_0004/rgb_00001.jpg (20.000 to 20.000), "
    "nyu_office_0/rgb_00000.jpg (nothing) (--accept values continues)",
  ):
    assert part in message
  assert [path.name for path in tmp_path.iterdir()] == ["nyu_depth_v2"]
  accepted = check_message("2 faults: ", lambda: run(script, *arguments, "--accept", "sizes", "values"))
  assert "is truncated" in accepted and "missing" in accepted


def test_another_count_than_the_published_one_must_be_accepted(script, root, tmp_path):
  lines = (root / "train_list.txt").read_text().splitlines()
  (tmp_path / "subset.txt").write_text("\n".join(lines[:2]))
  arguments = (f"--root={root}", "--splits", "train", "--set", f"train_list={tmp_path}/subset.txt")
  check_message(
    "train has 2 records, published are 3 (--accept counts continues)", lambda: run(script, *arguments, "--check_only")
  )
  run(script, *arguments, f"--output={tmp_path}/out", "--accept", "counts")
  assert len(nyu.Nyu(root=f"{tmp_path}/out", format="tfds").source("train")) == 2


def test_an_incomplete_copy_is_accepted_by_data_sets_that_count_themselves(script, tmp_path):
  folder = tmp_path / "ADEChallengeData2016"
  for split in ("training", "validation"):
    for kind, name in (("images", "a.jpg"), ("annotations", "a.png")):
      (folder / kind / split).mkdir(parents=True)
      cv2.imwrite(str(folder / kind / split / name), np.full((8, 8), 1, np.uint8))
  said = []
  arguments = ["ade20k", f"--root={folder}", "--check_only"]
  check_message(
    "train of ADE20K has 1 records in place of the published 20210",
    lambda: script.run(script.parse(arguments), said.append),
  )
  script.run(script.parse([*arguments, "--accept", "counts"]), said.append)
  assert said[0].startswith("train: 1 records (not compared with a published number)") and said[-1] == "no faults"
  script.run(script.parse([*arguments[:-1], f"--output={tmp_path}/out", "--accept", "counts"]), said.append)
  assert said[-1].endswith(f"--config.data.root={tmp_path}/out --config.data.complete=False")


def test_notes_on_the_files_are_printed(script, root):
  data = script.make("nyu", str(root), [], check_only=True)
  data.source("eval").notes = ["1 of 2 images has an EXIF orientation"]
  said = []
  assert script.check(data, ("train", "eval"), (), said.append) == []
  assert said[2] == "eval: 1 of 2 images has an EXIF orientation" and len(said) == 3


def test_the_output_may_not_lie_among_the_files(script, root):
  check_message(
    "lies in --root, whose files are only read", lambda: run(script, f"--root={root}", f"--output={root}/out")
  )
  check_message(
    "no option of 'nyu'; it has crop,", lambda: run(script, f"--root={root}", "--set", "size=3", "--check_only")
  )


def test_messages_name_the_flags_of_the_script(script):
  check_message(
    "mask_folder needs classes; give --set classes=...", lambda: script.make("mask_folder", "", [], check_only=True)
  )
  said = script.in_flags("set data.root to the folder, set data.complete=False or name it in data.train_list.")
  assert said == "set --root to the folder, give --set complete=False or name it in --set train_list."


@pytest.mark.parametrize(
  "words, message", [(["nyu2"], "invalid choice: 'nyu2'"), (["nyu", "--rooot=x", "--check_only"], "--rooot=x")]
)
def test_a_wrong_argument_is_one_line(script, capsys, words, message):
  with pytest.raises(SystemExit) as caught:
    script.parse(words)
  printed = capsys.readouterr().err
  assert caught.value.code == 2 and message in printed and printed.endswith("; see --help\n")
  assert printed.count("\n") == 1


def test_rooms_by_the_command_line(tmp_path):
  command = [sys.executable, str(SCRIPT), "rooms", f"--output={tmp_path}/rooms"]
  sizes = ["size=(24,32)", "crop=(24,24)", "train_count=2", "eval_count=1"]
  ended = subprocess.run(
    command + [word for size in sizes for word in ("--set", size)], capture_output=True, text=True, timeout=100
  )
  assert ended.returncode == 0, ended.stderr
  assert "checking train: 2 records in" in ended.stdout and "not compared with a published number" in ended.stdout
  data = rooms.Rooms(size=(24, 32), crop=(24, 24), train_count=2, eval_count=1, format="tfds", root=f"{tmp_path}/rooms")
  assert len(data.source("train")) == 2
  refused = subprocess.run([*command, "--set", "size=0"], capture_output=True, text=True, timeout=100)
  assert (refused.returncode, len(refused.stdout.splitlines())) == (1, 1), "its arguments"
  assert refused.stderr == "prepare_data: size=0 must be (height, width), two positive whole numbers.\n"
