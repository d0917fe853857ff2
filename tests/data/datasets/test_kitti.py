"""KITTI as users have it: lists, layouts, the crop of the benchmark, the depth of LiDAR, and what may be wrong."""

import pickle
import shutil

import cv2
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.fixed_numbers import Fixed
from tests.helpers.messages import check_message
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.data import pipeline
from vpd_jax.data.datasets import kitti
from vpd_jax.data.transforms import depth as depth_transforms

TRAIN = ["2011_09_26_drive_0057_sync/116", "2011_10_03_drive_0034_sync/978", "2011_09_30_drive_0034_sync/340"]
TEST = ["2011_09_26_drive_0002_sync/69", "2011_09_26_drive_0002_sync/54"]
SIZES = [(40, 130), (37, 125), (39, 127)]  # frames differ by a few pixels, as in KITTI
SMALL = {"kb_crop": (36, 122), "crop": (32, 32)}


def names(frame):
  """(image, depth) of a frame, as lists of BTS name them."""
  drive, number = frame.split("/")
  image = f"{drive[:10]}/{drive}/image_02/data/{int(number):010}.png"
  return image, f"{drive}/proj_depth/groundtruth/image_02/{int(number):010}.png"


def write_frames(root, frames, raw="raw_data/", annotated="data_depth_annotated/train/"):
  """PNG frames in KITTI's layout, with depth in 1/256 meter at one pixel of twenty; returns the lines of their list."""
  rng, lines = np.random.default_rng(0), []
  for frame, size in zip(frames, SIZES, strict=False):
    image, depth = (folder + name for folder, name in zip((raw, annotated), names(frame), strict=True))
    for name in (image, depth):
      (root / name).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(root / image), rng.integers(0, 256, (*size, 3), np.uint8))
    points = rng.random(size) < 0.05
    cv2.imwrite(str(root / depth), np.where(points, rng.integers(512, 80 * 256, size), 0).astype(np.uint16))
    lines.append(f"/{image} /{depth}")
  return lines


@pytest.fixture
def root(tmp_path):
  root = tmp_path / "kitti"
  root.mkdir()
  (root / "train_list.txt").write_text("\n".join(write_frames(root, TRAIN)) + "\n")
  lines = write_frames(root, TEST, annotated="data_depth_annotated/val/")
  (root / "test_list.txt").write_text("\n".join(lines))  # no last newline, as in the official lists
  return root


def stored(root, frame):
  """Image and depth file of a training frame as they are."""
  image, depth = names(frame)
  return (
    cv2.imread(str(root / "raw_data" / image))[..., ::-1],
    cv2.imread(str(root / "data_depth_annotated/train" / depth), cv2.IMREAD_UNCHANGED),
  )


def test_examples_hold_rgb_meters_the_one_class_and_index(root):
  data = kitti.Kitti(root=str(root), **SMALL)
  example = data.source("train")[1]
  image, depth = stored(root, TRAIN[1])
  np.testing.assert_array_equal(example["image"], image)
  np.testing.assert_array_equal(example["depth"], depth / np.float32(256))
  assert example["depth"].dtype == np.float32 and example["class_id"].dtype == example["index"].dtype == np.int32
  assert example["class_id"] == 0 and example["index"] == 1
  assert set(example) == data.provides and data.classes == ("street",)


def test_the_benchmarks_crop_is_the_lowest_rows_and_middle_columns(root):
  """375 x 1242 as KITTI's frames are, and an odd number of columns too many."""
  for height, width, top, left in ((375, 1242, 23, 13), (370, 1227, 18, 5), (352, 1216, 0, 0)):
    image = np.arange(height * width, dtype=np.int32).reshape(height, width)
    cropped = depth_transforms.kb_crop({"image": np.stack([image] * 3, -1), "depth": image, "index": np.int32(1)})
    assert cropped["image"].shape == (352, 1216, 3) and cropped["index"] == 1
    np.testing.assert_array_equal(cropped["depth"], image[top:, left : left + 1216])
    np.testing.assert_array_equal(cropped["image"][..., 2], cropped["depth"])
  check_message(
    "does not fit into an image of 36x1216", lambda: depth_transforms.kb_crop({"image": np.zeros((36, 1216, 3))})
  )
  data = kitti.Kitti(root=str(root), **SMALL)
  example = data.eval_transform(data.source("train")[0])
  image, depth = stored(root, TRAIN[0])
  np.testing.assert_array_equal(example["image"], image[4:, 4:126])
  np.testing.assert_array_equal(example["depth"], depth[4:, 4:126] / np.float32(256))


@pytest.mark.parametrize("layout", ["BTS", "unzipped", "two folders", "whole depth folder beside"])
def test_frames_are_found_in_every_layout(tmp_path, layout):
  """Lists of BTS, with the focal length and without folders, on the layouts that unpacking and moving gives."""
  raw, annotated = {
    "BTS": ("", "data_depth_annotated/"),
    "unzipped": ("", "train/"),
    "two folders": ("raw_data/", "depth/val/"),
    "whole depth folder beside": ("raw_data/", "depth/data_depth_annotated/val/"),
  }[layout]
  write_frames(tmp_path, TEST, raw, annotated)
  (tmp_path / "eigen_test_files_with_gt.txt").write_text("".join(" ".join(names(f)) + " 721.5377\n" for f in TEST))
  depth_root = str(tmp_path / "depth") if "folder" in layout else ""
  source = kitti.Kitti(root=str(tmp_path), depth_root=depth_root, **SMALL).source("eval")
  assert [source[i]["depth"].shape for i in range(2)] == SIZES[:2]


def test_frames_without_annotated_depth_are_left_out(root):
  """The lists of BTS hold all 697 test frames of Eigen; 45 of them have no annotated depth, which leaves 652."""
  (root / "test_list.txt").write_text(f"{names(TEST[0])[0]} None 721.5377\n{' '.join(names(TEST[1]))} 721.5377\n")
  source = kitti.Kitti(root=str(root), **SMALL).source("eval")
  assert len(source) == 1 and names(TEST[1])[0] in source.pairs[0][0]
  assert kitti.Kitti.published.counts == {"train": 23158, "eval": 697 - 45}
  (root / "test_list.txt").write_text(f"{names(TEST[0])[0]} None 721.5377\n")
  check_message("names no frame with depth", lambda: kitti.Kitti(root=str(root), **SMALL).source("eval"))


def test_a_stored_record_gives_the_same_example(root):
  data = pickle.loads(pickle.dumps(kitti.Kitti(root=str(root), **SMALL)))
  source = pickle.loads(pickle.dumps(data.source("train")))
  record = source.record(2)
  assert set(record) == set(data.stored)
  again = kitti.decode(record, provides=data.provides, least=data.kb_crop)
  assert again.keys() == source[2].keys()
  for name, value in source[2].items():
    np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize("cut_depth", ["released", "scaled", "off"])
def test_cut_depth_wraps_at_every_meter_or_scales_to_80_meters(root, cut_depth):
  data = kitti.Kitti(root=str(root), kb_crop=(36, 122), crop=(36, 122), cut_depth=cut_depth, color_jitter=False)
  numbers = () if cut_depth == "off" else (0.25, 0.5)
  example = data.train_transform(data.source("train")[0], Fixed(*numbers, 0.9, 0, 0), 0)
  image, depth = (array[4:, 4:126].copy() for array in stored(root, TRAIN[0]))
  band = np.s_[:, 30:64]  # l = int(0.25 * 122), w = int((122 - 30.5) * 0.5 * 0.75)
  if cut_depth == "released":
    image[band] = (depth % 256)[band][..., None]
  elif cut_depth == "scaled":
    image[band] = (depth / 256 / 80 * 255).astype(np.uint8)[band][..., None]
  np.testing.assert_array_equal(example["image"], image)
  np.testing.assert_array_equal(example["depth"] * 256, depth)


def test_batches_have_one_shape_although_frames_have_not(root):
  data = kitti.Kitti(root=str(root), **SMALL)
  keys = ("image", "depth", "class_id")
  for batches, rows, size in (
    (pipeline.train_batches(data, batch_size=3, seed=0, keys=keys), 3, (32, 32)),
    (pipeline.eval_batches(data, batch_size=2, keys=keys), 2, (36, 122)),
  ):
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (rows, *size, 3) and batch["depth"].shape == (rows, *size)
    assert (batch["depth"] > 0).any()
    np.testing.assert_array_equal(batch["class_id"], np.zeros(rows))


def test_resize_comes_after_the_benchmarks_crop(root):
  data = kitti.Kitti(root=str(root), kb_crop=(36, 122), resize=(18, 61), crop=(16, 16))
  whole, small = data.source("train")[0], data.eval_transform(data.source("train")[0])
  expected = cv2.resize(whole["image"][4:, 4:126], (61, 18))
  np.testing.assert_array_equal(small["image"], expected)
  assert data.train_transform(whole, np.random.default_rng(0), 1)["depth"].shape == (16, 16)


def test_the_config_has_the_authors_schedule_and_groups():
  config = loader.load("configs/kitti_depth.py")
  counts = kitti.Kitti.published.counts
  assert config.num_steps == 25 * -(-counts["train"] // 24) and config.optim.schedule.half == 12 * 965
  assert (config.task.max_depth, config.task.eval_crop, config.task.png_scale) == (80.0, "garg", 256)
  assert (config.data.batch_size, config.optim.norm_group, config.optim.loss_group) == (24, 3, 3)
  assert config.data.kb_crop == (352, 1216) and config.data.crop == (352, 352)


def test_a_method_that_is_told_a_class_gets_the_scene_or_is_refused(root):
  config = tiny.shrunk(loader.load("configs/kitti_depth.py:tiny")).unlock()
  config.data.update(root=str(root), kb_crop=(36, 122))
  exp = experiment.assemble(config)
  assert experiment.dataset(config, exp).classes == ("street",)
  config.data.scene = ""
  check_message("need ['class_id'], but data set 'kitti' provides", lambda: experiment.dataset(config, exp))


def test_errors_of_options_are_one_line(tmp_path, root):
  for options, message in (
    ({"root": ""}, "data.root is empty; set it to the folder that holds raw_data/"),
    ({"root": str(tmp_path / "none")}, "is not a folder"),
    ({"depth_root": str(tmp_path / "none")}, "is not a folder; images come from the raw data"),
    ({"cut_depth": "wrap"}, "cut_depth='wrap' is unknown"),
    ({"kb_crop": (352,)}, "kb_crop=(352,) must be (height, width)"),
    ({"kb_crop": (32, 122), "crop": (36, 36)}, "crop=(36, 36) does not fit into kb_crop=(32, 122)"),
    ({"resize": (24, 80), "crop": (32, 32)}, "crop=(32, 32) does not fit into resize=(24, 80)"),
    ({"scene": "A Street"}, "data.scene='A Street' must be lower-case words joined by '_'"),
    ({"format": "zip"}, "format='zip' is unknown"),
    ({"format": "tfds", "train_list": "a"}, "data.train_list has no effect with data.format='tfds'"),
  ):
    check_message(message, lambda options=options: kitti.Kitti(**{"root": str(root), **options}))


def test_errors_of_lists_are_one_line(root):
  check_message("split='test' is unknown", lambda: kitti.Kitti(root=str(root)).source("test"))
  (root / "train_list.txt").write_text("a.png b.png 721.5\nc.png\n\nd.png e.png 721.5 f\n")
  message = check_message("2 lines do not have 2 or 3 columns", lambda: kitti.Kitti(root=str(root)).source("train"))
  assert "2 (1), 4 (4)" in message
  (root / "train_list.txt").unlink()
  message = check_message("eigen_train_files_with_gt.txt", lambda: kitti.Kitti(root=str(root)).source("train"))
  assert "eigen_benchmark of github.com/wl-zhao/VPD" in message


def test_all_missing_files_are_counted_and_ten_are_named(root):
  shutil.rmtree(root / "raw_data/2011_10_03")
  (root / "data_depth_annotated/train" / names(TRAIN[0])[1]).unlink()
  message = check_message("2 files are missing", lambda: kitti.Kitti(root=str(root)).source("train"))
  assert names(TRAIN[1])[0] in message and names(TRAIN[0])[1] in message and "data.depth_root" in message
  assert len(kitti.Kitti(root=str(root)).source("eval")) == 2  # evaluation needs only its own files


@pytest.mark.parametrize("fault", ["small", "narrow", "8 bits", "empty", "size"])
def test_a_bad_frame_is_named(root, fault):
  image, depth = (
    root / folder / name
    for folder, name in zip(("raw_data", "data_depth_annotated/train"), names(TRAIN[0]), strict=True)
  )
  bad, message = depth, ""
  if fault in ("small", "narrow"):
    size = (30, 130) if fault == "small" else (40, 100)
    bad, message = image, "is {}x{}, smaller than kb_crop=36x122; take frames as KITTI has them".format(*size)
    cv2.imwrite(str(image), np.zeros((*size, 3), np.uint8))
    cv2.imwrite(str(depth), np.full(size, 256, np.uint16))
  elif fault == "8 bits":
    message = "has 1 channel(s) of 8 bits; one of 16 bits is needed, 256 per meter"
    cv2.imwrite(str(depth), np.ones((40, 130), np.uint8))
  elif fault == "empty":
    message = "is empty, all of it 0"
    cv2.imwrite(str(depth), np.zeros((40, 130), np.uint16))
  else:
    message = "is 40x129, but its image"
    cv2.imwrite(str(depth), np.ones((40, 129), np.uint16))
  source = kitti.Kitti(root=str(root), **SMALL).source("train")
  assert str(bad) in check_message(message, lambda: source[0])
  source[1]  # the others are read as before
