"""Depth data of the user's own: formats, units, sizes, held-out pictures, errors, and a run on generated files."""

import json
import pickle

import cv2
import numpy as np
import pytest

from tests.helpers import one_convolution
from tests.helpers.messages import check_message
from vpd_jax.data.datasets import depth_list
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.training import train

FACTOR, MAX_DEPTH = 1000.0, 10.0
SIZES = [(72, 100), (90, 96), (150, 240), (64, 96), (100, 100), (80, 130), (66, 99), (72, 100)]


def write_pfm(path, meters):
  """Portable float map: rows from the lowest to the highest, little endian."""
  header = f"Pf\n{meters.shape[1]} {meters.shape[0]}\n-1.0\n"
  path.write_bytes(header.encode() + meters[::-1].astype("<f4").tobytes())


WRITERS = {
  "depth.png": lambda path, meters: cv2.imwrite(str(path), np.rint(meters * FACTOR).astype(np.uint16)),
  "units.tif": lambda path, meters: cv2.imwrite(str(path), np.rint(meters * FACTOR).astype(np.uint16)),
  "floats.tiff": lambda path, meters: cv2.imwrite(str(path), (meters * FACTOR).astype(np.float32)),
  "floats.pfm": lambda path, meters: write_pfm(path, meters * FACTOR),
  "floats.npy": lambda path, meters: np.save(path, meters * FACTOR),
  "units.npy": lambda path, meters: np.save(path, np.rint(meters * FACTOR).astype(np.int32)),
}


def write_pictures(root, sizes=SIZES):
  """Pictures of many sizes whose depth follows from their color; returns the lines of their list."""
  rng, lines = np.random.default_rng(0), []
  for number, size in enumerate(sizes):
    image = cv2.resize(rng.integers(0, 256, (4, 6, 3), np.uint8), size[::-1])
    cv2.imwrite(str(root / f"{number} a.png"), image)
    meters = 0.5 + image.mean(-1) / 30
    meters[:3] = 0
    cv2.imwrite(str(root / f"{number}.depth.png"), np.rint(meters * FACTOR).astype(np.uint16))
    lines.append(f"{number} a.png\t{number}.depth.png")
  return lines


@pytest.fixture
def root(tmp_path):
  (tmp_path / "train_list.txt").write_text("\n".join(write_pictures(tmp_path)))
  return tmp_path


def data(root, **changes):
  return depth_list.DepthList(
    **{"root": str(root), "factor": FACTOR, "max_depth": MAX_DEPTH, "resize": (64, 96), "crop": (64, 64), **changes}
  )


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_meters_and_0_where_nothing_valid_is(tmp_path, name):
  meters = np.random.default_rng(0).uniform(0.5, 9.5, (5, 7)).round(3)
  meters[1, 2:5] = 0, 10.001, 12
  path, floats = tmp_path / name, name.startswith("floats")
  WRITERS[name](path, np.where(meters == 12, np.nan, meters) if floats else meters)
  expected = np.where((meters > 0) & (meters <= 10), meters, 0)
  read = depth_list.read_depth(path, factor=FACTOR, max_depth=MAX_DEPTH)
  assert read.dtype == np.float32
  np.testing.assert_allclose(read, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "header",
  [
    "Pf\n7 5\n-0.003922\n",
    "Pf\n# by a camera\n7 5\n# and more\n-1\n",
    "Pf 7 5 -250.0 ",
    "Pf 7 5 -1 # a word\n",
    "Pf\r\n7 5\r\n-1.0\r\n",
  ],
)
def test_a_pfm_is_read_as_stored_whatever_its_header_says(tmp_path, header):
  meters = np.random.default_rng(0).uniform(1, 9, (5, 7)).astype(np.float32)
  meters[-1, 0] = np.frombuffer(b"\n\r\n@", "<f4")[0]  # bytes that look like the end of a header
  (tmp_path / "a.pfm").write_bytes(header.encode() + meters[::-1].astype("<f4").tobytes())
  np.testing.assert_array_equal(depth_list.read_depth(tmp_path / "a.pfm", factor=1.0, max_depth=10.0), meters)
  big = header.replace("-", "").encode() + meters[::-1].astype(">f4").tobytes()
  (tmp_path / "b.pfm").write_bytes(big)
  np.testing.assert_array_equal(depth_list.read_depth(tmp_path / "b.pfm", factor=1.0, max_depth=10.0), meters)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"Pf\n2 2\n-1\n" + bytes(15), "15 bytes behind its header"),
    (b"Pf\n2 2\n-1\n" + bytes(16) + b"more", "20 bytes behind its header"),
    (b"Pf\n2 2\n0\n" + bytes(16), "does not begin as a PFM"),
    (b"Pf\n2\n" + bytes(16), "does not begin as a PFM"),
    (b"PF\n1 1\n-1\n" + bytes(12), "holds float32 [1, 1, 3]"),
    (b"", "does not begin as a PFM"),
  ],
)
def test_a_pfm_that_cannot_be_is_named(tmp_path, content, message):
  (tmp_path / "a.pfm").write_bytes(content)
  check_message(message, lambda: depth_list.read_depth(tmp_path / "a.pfm", factor=1.0, max_depth=10.0))


@pytest.mark.parametrize("ending", [".PNG", ".TIF", ".Tiff", ".PFM", ".NPY"])
def test_endings_of_depth_in_capitals_are_known(root, ending):
  meters = np.ones((72, 100), np.float32)
  name = next(name for name in WRITERS if name.endswith(ending.lower()))
  WRITERS[name](root / name, meters)
  (root / name).rename(root / f"1{ending}")
  (root / "train_list.txt").write_text(f"0 a.png\t1{ending}\n" * 2)
  np.testing.assert_allclose(data(root).source("train")[0]["depth"], 1, rtol=1e-6)


def test_what_is_infinite_or_negative_is_no_measurement(tmp_path):
  np.save(tmp_path / "a.npy", np.array([[np.inf, -np.inf, np.nan], [-1, 0, 2]], np.float32))
  read = depth_list.read_depth(tmp_path / "a.npy", factor=1.0, max_depth=10.0)
  np.testing.assert_array_equal(read, [[0, 0, 0], [0, 0, 2]])


def test_the_last_pictures_are_held_out_where_there_is_no_list_for_evaluation(root):
  train_source, eval_source = data(root, holdout=0.25).source("train"), data(root, holdout=0.25).source("eval")
  assert (len(train_source), len(eval_source)) == (6, 2)
  assert [source.records[-1][0].name for source in (train_source, eval_source)] == ["5 a.png", "7 a.png"]
  assert len(data(root, holdout=0.01).source("eval")) == 1
  (root / "mine.txt").write_text("0 a.png\t0.depth.png\n")
  listed = data(root, eval_list="mine.txt")
  assert (len(listed.source("train")), len(listed.source("eval"))) == (8, 1)


def test_examples_hold_rgb_meters_the_scene_and_index(root):
  made = pickle.loads(pickle.dumps(data(root, scene="hall_way")))
  source = pickle.loads(pickle.dumps(made.source("train")))
  example = source[2]
  np.testing.assert_array_equal(example["image"], cv2.imread(str(root / "2 a.png"))[..., ::-1])
  stored = cv2.imread(str(root / "2.depth.png"), cv2.IMREAD_UNCHANGED)
  np.testing.assert_array_equal(np.rint(example["depth"] * 1000), stored)
  assert (example["depth"][:3] == 0).all() and example["class_id"] == 0 and example["index"] == 2
  assert set(example) == made.provides and made.classes == ("hall_way",)
  nameless = data(root, scene="")
  assert nameless.classes == () and "class_id" not in nameless.source("train")[0].keys() | nameless.provides


def test_pictures_of_any_size_get_one_size_with_their_aspect_kept(root):
  made = data(root)
  for example in map(made.source("train").__getitem__, range(7)):
    small = made.eval_transform(example)
    assert small["image"].shape == (64, 96, 3) and small["depth"].shape == (64, 96)
    assert set(np.unique(small["depth"])) <= set(np.unique(example["depth"]))
    assert made.train_transform(example, np.random.default_rng(0), 1)["depth"].shape == (64, 64)
  y, x = np.mgrid[:120, :402].astype(np.float32)
  image = np.stack([y, x / 2, 0 * x], -1).astype(np.uint8)
  covered = depth_transforms.resize_to_cover({"image": image, "depth": x + 1000 * y}, size=(40, 60))
  columns, rows = covered["depth"][0] % 1000, covered["depth"][:, 0] // 1000
  np.testing.assert_array_equal(np.diff(columns), 3)  # both by 3
  np.testing.assert_array_equal(rows, 1 + 3 * np.arange(40))
  assert columns[0] + columns[-1] == 402 - 1  # the middle is kept
  np.testing.assert_allclose(covered["image"][..., 0], rows[:, None] + 0 * columns[None], atol=1)


def test_pictures_of_the_asked_size_and_no_size_at_all_stay_as_they_are(root):
  example = data(root).source("train")[3]
  np.testing.assert_array_equal(data(root).eval_transform(example)["image"], example["image"])
  assert data(root, resize=()).eval_transform(example) is example


def test_errors_of_options_are_collected_in_one_line(root):
  message = check_message("data: factor=0 must be above 0", lambda: data("", factor=0, max_depth=-1.0, holdout=1))
  assert "max_depth=-1.0 must be above 0" in message and "root='' is not a folder" in message
  assert "holdout=1 must lie between 0 and 1" in message
  for changes, expected in (
    ({"cut_depth": "wrap"}, "cut_depth='wrap' is unknown"),
    ({"crop": 64}, "crop=64 must be (height, width)"),
    ({"crop": (80, 64)}, "crop=(80, 64) does not fit into resize=(64, 96)"),
    ({"scene": "living room"}, "data.scene='living room' must be lower-case words joined by '_'"),
  ):
    check_message(expected, lambda changes=changes: data(root, **changes))


@pytest.mark.parametrize("text, message", [
  ("a.png b.png\nc.png d.png 5\n\ne.png\n", "2 lines do not have 2 columns: 2 (3), 4 (1)"),
  ("a.png\t\n", "1 lines do not have 2 columns: 1 (2); put the image and its depth in a line, with a tab"),
  ("\n", "is empty"),
  ("0 a.png\t0.depth.png\n", "has 1 picture and one is held out; add more, or an eval_list"),
  ("0 a.png\tno.png\n/no/1.png\t1.depth.png\n1 a.png\t1.depth.png", "2 files are missing"),
  ("0 a.png\t0.exr\n1 a.png\t1.depth.png", "names depth files ending in .exr; known are ('.png', '.tif'"),
])  # fmt: skip
def test_errors_of_lists_are_one_line(root, text, message):
  (root / "0.exr").write_bytes(b"")
  (root / "train_list.txt").write_text(text)
  check_message(message, lambda: data(root).source("train"))


def test_a_missing_list_is_named(root):
  check_message("list file 'no.txt' is neither here nor in", lambda: data(root, eval_list="no.txt").source("eval"))
  check_message("split='test' is unknown", lambda: data(root).source("test"))


@pytest.mark.parametrize("name, content, message", [
  ("a.png", np.ones((4, 5), np.uint8), "has 1 channel(s) of 8 bits; one of 16 bits is needed"),
  ("a.png", np.ones((4, 5, 3), np.uint16), "has 3 channel(s) of 16 bits"),
  ("a.tif", np.ones((4, 5), np.uint8), "holds uint8 [4, 5]; [height, width] of at least 16 bits is needed"),
  ("a.npy", np.ones((4, 5, 1), np.float32), "holds float32 [4, 5, 1]"),
  ("a.npy", np.ones((4, 5), bool), "holds bool [4, 5]"),
  ("a.png", np.zeros((4, 5), np.uint16), "its values are from 0 to 0 m"),
  ("a.npy", np.full((4, 5), 50_000.0), "no value in (0, 10] meters: at 1000 units per meter its values are from 50"),
  ("a.npy", np.full((4, 5), np.nan), "its values are not finite; check data.factor and data.max_depth"),
])  # fmt: skip
def test_a_depth_file_of_the_wrong_kind_or_unit_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  np.save(path, content) if path.suffix == ".npy" else cv2.imwrite(str(path), content)
  assert str(path) in check_message(message, lambda: depth_list.read_depth(path, factor=FACTOR, max_depth=MAX_DEPTH))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pfm", "a.npy"])
def test_a_damaged_or_missing_depth_file_is_named(tmp_path, name):
  path = tmp_path / name
  read = lambda: depth_list.read_depth(path, factor=FACTOR, max_depth=MAX_DEPTH)
  assert str(path) in check_message("cannot be read", read)
  for content in (b"", b"no picture"):
    path.write_bytes(content)
    assert str(path) in check_message("a.", read)


def test_an_image_of_another_size_than_its_depth_is_named(root):
  cv2.imwrite(str(root / "0.depth.png"), np.ones((72, 99), np.uint16))
  message = check_message("0.depth.png is 72x99, but its image", lambda: data(root).source("train")[0])
  assert "is 72x100" in message


def test_the_example_config_trains_and_evaluates_on_files_of_many_sizes(root, tmp_path):
  """Two steps and a score, beside those of the trivial predictors; in small."""
  config = one_convolution.depth("configs/my_depth.py:tiny").unlock()
  config.update(num_steps=2, log_every=1, eval_every=2, save_every=2)
  config.data.root = str(root)
  config.data.holdout = 0.25
  config.eval.test_time = ("flip",)
  with one_convolution.known():
    scores = train.run(config.lock(), str(tmp_path / "run"))
  assert scores["eval/depth_list/images"] == 2 and np.isfinite(scores["eval/depth_list/rmse"])
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert {line["step"] for line in lines if "train/loss" in line} == {1, 2}
  assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
  assert any("eval/trivial/constant" in line for line in lines)
