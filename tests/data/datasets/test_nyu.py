import gzip
import pickle

import cv2
import numpy as np
import pytest

from tests.helpers.depth_frames import TEST, TRAIN, write_frames
from tests.helpers.messages import check_message
from vpd_jax.data.datasets import nyu


@pytest.fixture
def root(tmp_path):
  root = tmp_path / "nyu_depth_v2"
  train, test = write_frames(root / "sync", TRAIN), write_frames(root / "official_splits/test", TEST)
  (root / "train_list.txt").write_text("\n".join(train) + "\n")
  (root / "test_list.txt").write_text("\n".join(test))  # no last newline, as in one of the official files
  return root


def test_examples_hold_rgb_meters_class_and_index(root):
  source = nyu.Nyu(root=str(root)).source("train")
  assert len(source) == 3
  example = source[1]
  image = cv2.imread(str(root / "sync/study_room_0004/rgb_00001.jpg"))[..., ::-1]
  depth = cv2.imread(str(root / "sync/study_room_0004/sync_depth_00001.png"), cv2.IMREAD_UNCHANGED)
  np.testing.assert_array_equal(example["image"], image)
  np.testing.assert_array_equal(np.rint(example["depth"] * 1000), depth)
  assert example["depth"].dtype == np.float32
  assert (example["depth"][:4] == 0).all()
  assert example["index"] == 1
  assert example["index"].dtype == example["class_id"].dtype == np.int32
  assert set(example) == nyu.Nyu.provides


def test_a_source_and_its_data_set_survive_pickling(root):
  data = nyu.Nyu(root=str(root), crop=(32, 32))
  copy, source = pickle.loads(pickle.dumps((data, data.source("eval"))))
  np.testing.assert_array_equal(source[1]["image"], data.source("eval")[1]["image"])
  example = copy.train_transform(source[1], np.random.default_rng(0), 0)
  assert example["image"].shape == (32, 32, 3)


def test_scene_class_is_the_lowest_index_that_is_a_substring(root):
  data = nyu.Nyu(root=str(root))
  names = [
    [nyu.CLASSES[data.source(split)[i]["class_id"]] for i in range(n)] for split, n in (("train", 3), ("eval", 2))
  ]
  assert names == [["kitchen", "study", "office"], ["bathroom", "kitchen"]]
  assert len(set(nyu.CLASSES)) == 27
  assert [nyu.CLASSES.index(name) for name in ("printer_room", "study_room", "office_kitchen", "bookstore")] == [
    0,
    5,
    19,
    26,
  ]
  assert nyu.scene_classes(["home_office_0001/rgb_1.jpg", "home_storage_0001/rgb_1.jpg"]) == [7, 16]
  with pytest.raises(ValueError, match="2 frames lie in folders of no scene class: garage_1/a"):
    nyu.scene_classes(["garage_1/a.jpg", "cafe_0001/a.jpg", "attic/b.jpg"])


@pytest.mark.parametrize("place", ["root", "beside", "gz", "given", "given below root"])
def test_list_files_are_found_where_users_have_them(root, place):
  listed = root / "train_list.txt"
  text = listed.read_text()
  listed.unlink()
  option = None
  if place == "gz":
    (root / "nyudepthv2_train_list.txt.gz").write_bytes(gzip.compress(text.encode()))
  elif place.startswith("given"):
    (root / "mine.txt").write_text(text)
    option = "mine.txt" if place == "given below root" else str(root / "mine.txt")
  else:
    ((root if place == "root" else root.parent) / "nyudepthv2_train_list.txt").write_text(text)
  assert len(nyu.Nyu(root=str(root), train_list=option).source("train")) == 3


def test_the_list_below_root_is_read_before_one_of_the_same_name_in_the_working_directory(root, tmp_path, monkeypatch):
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere/train_list.txt").write_text("of another data set")
  monkeypatch.chdir(tmp_path / "elsewhere")
  assert len(nyu.Nyu(root=str(root), train_list="train_list.txt").source("train")) == 3


def test_another_number_of_frames_than_published_is_told(root, monkeypatch):
  warning = "WARNING: the published split has {}; scores are not comparable"
  data = nyu.Nyu(root=str(root))
  assert data.describe() == [f"train: 3 images; {warning.format(24_231)}", f"eval: 2 images; {warning.format(654)}"]
  monkeypatch.setattr(nyu.Nyu, "published", nyu.Nyu.published._replace(counts={"train": 3, "eval": 2}))
  assert data.describe() == ["train: 3 images", "eval: 2 images"]


@pytest.mark.parametrize("change", ["\r\n", "no slash", "focal length", "blank lines", "byte order mark"])
def test_list_files_are_read_in_all_their_spellings(root, change):
  text = (root / "train_list.txt").read_text()
  changed = {
    "\r\n": text.replace("\n", "\r\n"),
    "no slash": "\n".join(line[1:].replace(" /", " ") for line in text.splitlines()),
    "focal length": text.replace("\n", " 518.8579\n"),
    "blank lines": "\n" + text.replace("\n", "\n\n"),
    "byte order mark": "\ufeff" + text,
  }[change]
  (root / "train_list.txt").write_bytes(changed.encode())
  assert len(nyu.Nyu(root=str(root)).source("train")) == 3


def test_resize_and_crop_give_the_sizes_asked_for(root):
  data = nyu.Nyu(root=str(root), resize=(24, 32), crop=(16, 24))
  source = data.source("train")
  assert data.eval_transform(source[0])["depth"].shape == (24, 32)
  assert data.train_transform(source[0], np.random.default_rng(0), 1)["image"].shape == (16, 24, 3)
  plain = nyu.Nyu(root=str(root), crop=(48, 64), cut_depth="off", color_jitter=False)
  example = plain.train_transform(source[0], np.random.default_rng(0), 0)
  assert any((example["image"] == source[0]["image"][:, ::step]).all() for step in (1, -1))


def test_errors_of_options_are_one_line(tmp_path, root):
  for options, message in (
    (dict(root=str(tmp_path / "none")), "is not a folder; set data.root to the folder that holds sync/"),
    (dict(root=str(root), cut_depth="wrap"), "cut_depth='wrap' is unknown"),
    (dict(root=str(root), crop=(480,)), "crop=(480,) must be (height, width)"),
    (dict(root=str(root), crop=480), "crop=480 must be (height, width)"),
    (dict(root=str(root), resize=(24.5, 32)), "resize=(24.5, 32) must be (height, width)"),
    (dict(root=str(root), resize=(24, 32), crop=(32, 24)), "crop=(32, 24) does not fit into resize=(24, 32)"),
  ):
    check_message(message, lambda options=options: nyu.Nyu(**options))


def test_errors_of_lists_are_one_line(root):
  check_message("split='test' is unknown", lambda: nyu.Nyu(root=str(root)).source("test"))
  check_message(
    "list file 'no.txt' is neither here nor in", lambda: nyu.Nyu(root=str(root), train_list="no.txt").source("train")
  )
  (root / "train_list.txt").write_text("a.jpg b.png\nc.jpg\n")
  check_message("lines 2 do not hold the image and the ground truth", lambda: nyu.Nyu(root=str(root)).source("train"))
  (root / "train_list.txt").write_text("\n")
  check_message("is empty", lambda: nyu.Nyu(root=str(root)).source("train"))
  (root / "train_list.txt").write_bytes(b"\x1f\x8b\x08 not gzip")
  check_message("train_list.txt cannot be read", lambda: nyu.Nyu(root=str(root)).source("train"))
  (root / "train_list.txt").unlink()
  check_message(
    "list file train_list.txt or nyudepthv2_train_list.txt", lambda: nyu.Nyu(root=str(root)).source("train")
  )


def test_all_missing_files_are_counted_and_ten_are_named(root):
  lines = (root / "train_list.txt").read_text() + "".join(
    f"/cafe_0001a/rgb_{i:05}.jpg /cafe_0001a/sync_depth_{i:05}.png\n" for i in range(20)
  )
  (root / "train_list.txt").write_text(lines)
  (root / "sync" / (TRAIN[0].format("sync_depth") + ".png")).unlink()
  message = check_message("41 files are missing in", lambda: nyu.Nyu(root=str(root)).source("train"))
  assert "kitchen_0028b/sync_depth_00045.png, cafe_0001a/rgb_00000.jpg" in message
  assert message.count("cafe_0001a") == 9
  assert "sync.zip" in message
  assert len(nyu.Nyu(root=str(root)).source("eval")) == 2  # evaluation needs only its own files


@pytest.mark.parametrize(
  "fault", ["half png", "half jpg", "short jpg", "empty", "text", "gone", "8 bits", "colors", "size"]
)
def test_a_bad_file_is_named(root, fault):
  image, depth = (
    root / "sync" / (TRAIN[0].format(kind) + end) for kind, end in (("rgb", ".jpg"), ("sync_depth", ".png"))
  )
  source = nyu.Nyu(root=str(root)).source("train")
  bad, message = depth, "is truncated"
  if fault == "half png":
    depth.write_bytes(depth.read_bytes()[: depth.stat().st_size // 2])
  elif fault in ("half jpg", "short jpg"):
    bad = image
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2 if fault == "half jpg" else -2])
  elif fault == "empty":
    depth.write_bytes(b"")
  elif fault == "text":
    depth.write_text("this is no picture")
    message = "is not a picture"
  elif fault == "gone":
    depth.unlink()
    message = "cannot be read"
  elif fault == "8 bits":
    cv2.imwrite(str(depth), np.zeros((48, 64), np.uint8))
    message = "has 1 channel(s) of 8 bits; one of 16 bits is needed"
  elif fault == "colors":
    cv2.imwrite(str(depth), np.zeros((48, 64, 3), np.uint16))
    message = "has 3 channel(s) of 16 bits"
  else:
    cv2.imwrite(str(depth), np.zeros((24, 32), np.uint16))
    message = "is 24x32, but its image"
  assert str(bad) in check_message(message, lambda: source[0])
  source[1]  # the others are read as before
