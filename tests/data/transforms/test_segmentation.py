import math

import cv2
import numpy as np
import pytest

from tests.helpers.messages import check_message
from vpd_jax.data import pipeline
from vpd_jax.data.datasets import rooms
from vpd_jax.data.shards import writer
from vpd_jax.data.transforms import segmentation as st

IGNORE = 255


def picture(size=(60, 90), seed=0, classes=6):
  """Smooth colors, blocks of labels, and a stripe of no class."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
  image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
  label = cv2.resize(
    rng.integers(0, classes, (4, 6), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT
  )
  label[:3] = IGNORE
  return {"image": image, "label": label, "index": np.int32(7)}


class Released:
  """The chain as mmsegmentation 0.30 has it, pixel by pixel on BGR; the draws come from the same generator as ours."""

  def __init__(self, rng):
    self.rng = rng

  def __call__(self, image, label, crop, scale):
    image = image[..., ::-1]
    ratio = self.rng.random() * (2.0 - 0.5) + 0.5
    target = int(scale[0] * ratio), int(scale[1] * ratio)
    h, w = image.shape[:2]
    factor = min(max(target) / max(h, w), min(target) / min(h, w))
    size = int(w * float(factor) + 0.5), int(h * float(factor) + 0.5)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    y, x = self.corner(label.shape, crop)
    for _ in range(10):
      values, counts = np.unique(label[y : y + crop[0], x : x + crop[1]], return_counts=True)
      counts = counts[values != 255]
      if len(counts) > 1 and np.max(counts) / np.sum(counts) < 0.75:
        break
      y, x = self.corner(label.shape, crop)
    image, label = image[y : y + crop[0], x : x + crop[1]], label[y : y + crop[0], x : x + crop[1]]
    if self.rng.random() < 0.5:
      image, label = image[:, ::-1], label[:, ::-1]
    image = self.color(np.ascontiguousarray(image))[..., ::-1]
    normalized = (image.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    below, right = crop[0] - label.shape[0], crop[1] - label.shape[1]
    return (
      np.pad(normalized, ((0, below), (0, right), (0, 0))),
      np.pad(label, ((0, below), (0, right)), constant_values=255),
    )

  def corner(self, shape, crop):
    return tuple(self.rng.integers(0, max(have - want, 0) + 1) for have, want in zip(shape, crop, strict=True))

  def convert(self, image, alpha=1, beta=0):
    return np.clip(image.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

  def contrast(self, image):
    return self.convert(image, alpha=self.rng.uniform(0.5, 1.5)) if self.rng.integers(2) else image

  def color(self, image):
    if self.rng.integers(2):
      image = self.convert(image, beta=self.rng.uniform(-32, 32))
    mode = self.rng.integers(2)
    if mode == 1:
      image = self.contrast(image)
    if self.rng.integers(2):
      hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
      hsv[:, :, 1] = self.convert(hsv[:, :, 1], alpha=self.rng.uniform(0.5, 1.5))
      image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if self.rng.integers(2):
      hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
      hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + self.rng.integers(-18, 18)) % 180
      image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    return self.contrast(image) if mode == 0 else image


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (40, 200)])
def test_the_chain_is_the_released_one_bit_for_bit(size):
  augmentation = st.Augmentation(crop=(48, 56), scale=(240, 64))
  example, padded = picture(size), 0
  for seed in range(60):
    ours = augmentation.training(example, np.random.default_rng(seed))
    image, label = Released(np.random.default_rng(seed))(example["image"], example["label"], (48, 56), (240, 64))
    np.testing.assert_array_equal(ours["label"], label)
    h, w = ours["valid_size"]
    signed = (ours["image"].astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
    signed[h:], signed[:, w:] = 0, 0  # what the device does
    np.testing.assert_array_equal(signed, image)
    assert ours["index"] == 7
    padded += (h, w) != (48, 56)
  assert 5 < padded < 60


@pytest.mark.parametrize(
  "size, scale, expected",
  [
    ((512, 683), (2048, 512), (512, 683)),  # as it is
    ((425, 640), (2048, 512), (512, 771)),  # short side 512
    ((200, 1600), (2048, 512), (256, 2048)),  # long side 2048
    ((640, 425), (2048, 512), (771, 512)),  # tall: the numbers bound long and short, not width and height
    ((1024, 2048), (2048, 1024), (1024, 2048)),
    ((3, 7), (7, 2), (2, 5)),  # 4.67 + 0.5
    ((1, 5000), (100, 100), (1, 100)),  # never nothing
  ],
)
def test_rescaled_sizes(size, scale, expected):
  assert st.rescaled_size(size, scale) == expected


def test_rescaling_takes_the_nearest_label_and_mixes_colors_only():
  example = picture((60, 90))
  out = st.random_rescale(example, np.random.default_rng(0), scale=(180, 120), ratio_range=(0.5, 0.5))
  np.testing.assert_array_equal(out["label"], example["label"])
  out = st.random_rescale(example, np.random.default_rng(0), scale=(180, 120), ratio_range=(1.0, 1.0))
  np.testing.assert_array_equal(out["label"], example["label"].repeat(2, 0).repeat(2, 1))
  assert set(np.unique(out["label"])) <= set(np.unique(example["label"])) and out["image"].shape == (120, 180, 3)


def test_ratios_are_uniform_over_the_range():
  example = {"image": np.zeros((100, 100, 3), np.uint8), "label": np.zeros((100, 100), np.uint8)}
  rng = np.random.default_rng(0)
  sides = [
    st.random_rescale(example, rng, scale=(100, 100), ratio_range=(0.5, 2.0))["label"].shape[0] for _ in range(400)
  ]
  assert min(sides) < 55 and max(sides) > 195 and abs(np.mean(sides) - 125) < 8


def test_windows_reach_every_corner_and_small_pictures_stay_whole():
  rng, rows = np.random.default_rng(0), np.arange(8, dtype=np.uint8)
  example = {"image": np.zeros((8, 8, 3), np.uint8), "label": rows[:, None] * 8 + rows}
  corners = {int(st.random_crop(example, rng, size=(6, 6))["label"][0, 0]) for _ in range(200)}
  assert corners == {8 * y + x for y in range(3) for x in range(3)}
  out = st.random_crop(example, rng, size=(20, 5))
  assert out["label"].shape == (8, 5) and out["image"].shape == (8, 5, 3)


def test_monotonous_windows_are_refused_ten_times():
  label = np.zeros((10, 100), np.uint8)
  label[:, 90:] = 1
  example, seen = {"image": np.zeros((10, 100, 3), np.uint8), "label": label}, []
  for seed in range(300):
    out = st.random_crop(example, np.random.default_rng(seed), size=(10, 20), cat_max_ratio=0.75)
    seen.append(st.is_varied(out["label"], 0.75))
  # 6 of 81 places are varied: those with 6 to 10 columns of ones, the one with ten at the edge included.
  good = np.mean([st.is_varied(label[:, x : x + 20], 0.75) for x in range(81)])
  assert abs(np.mean(seen) - (1 - (1 - good) ** 11)) < 0.08 and good > 0
  plain = [
    st.is_varied(st.random_crop(example, np.random.default_rng(seed), size=(10, 20))["label"], 0.75)
    for seed in range(300)
  ]
  assert abs(np.mean(plain) - good) < 0.05


class Counting:
  """Random integers that are counted."""

  def __init__(self):
    self.drawn, self.rng = 0, np.random.default_rng(0)

  def integers(self, *bounds):
    self.drawn += 1
    return self.rng.integers(*bounds)


@pytest.mark.parametrize("ratio, windows", [(0.75, 11), (1.0, 1)])
def test_the_eleventh_window_is_taken_in_any_case(ratio, windows):
  example, rng = {"image": np.zeros((9, 9, 3), np.uint8), "label": np.zeros((9, 9), np.uint8)}, Counting()
  st.random_crop(example, rng, size=(4, 4), cat_max_ratio=ratio)
  assert rng.drawn == 2 * windows


@pytest.mark.parametrize(
  "counts, varied",
  [
    ({0: 74, 1: 26}, True),
    ({0: 75, 1: 25}, False),
    ({0: 100}, False),
    ({0: 7, 1: 3, 255: 90}, True),
    ({255: 9}, False),
  ],
)
def test_variety_counts_labeled_pixels_only(counts, varied):
  label = np.repeat(np.array(list(counts), np.uint8), list(counts.values()))[None]
  assert st.is_varied(label, 0.75) == varied


def test_levels_are_clipped_and_truncated():
  ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2)
  for factor, shift in ((1.0, 31.7), (1.0, -31.7), (1.37, 0.0), (0.5, 0.0)):
    expected = [int(min(max(math.floor(i * factor + shift), 0), 255)) for i in range(256)]
    np.testing.assert_array_equal(st.change_levels(ramp, factor=factor, shift=shift)[0, :, 0], expected)


def test_hue_turns_and_saturation_fades():
  red = np.array([[[200, 0, 0]]], np.uint8)
  assert st.change_hue(red, shift=60).tolist() == [[[0, 200, 0]]]  # 60 steps of two degrees: green
  assert st.change_hue(red, shift=-60).tolist() == [[[0, 0, 200]]]
  assert st.change_hue(red, shift=0).tolist() == red.tolist()
  half = st.change_saturation(red, factor=0.5)[0, 0]
  assert half[0] == 200 and half[1] == half[2] and abs(int(half[1]) - 100) <= 1
  assert st.change_saturation(red, factor=1.5).tolist() == red.tolist()
  gray = np.full((2, 2, 3), 90, np.uint8)
  np.testing.assert_array_equal(st.change_saturation(gray, factor=1.5), gray)


def test_padding_is_gray_of_no_class_and_its_border_is_known():
  example = dict(picture((4, 6)), weight=np.ones((4, 6), np.float32))
  out = st.pad(example, size=(8, 8))
  assert out["valid_size"].tolist() == [4, 6] and out["valid_size"].dtype == np.int32
  np.testing.assert_array_equal(out["image"][:4, :6], example["image"])
  np.testing.assert_array_equal(out["label"][:4, :6], example["label"])
  outside = np.ones((8, 8), bool)
  outside[:4, :6] = False
  assert (out["image"][outside] == st.PAD_GRAY).all() and (out["label"][outside] == IGNORE).all()
  assert (out["weight"][outside] == 0).all() and out["image"].dtype == np.uint8
  same = st.pad(example, size=(4, 6))
  assert same["image"] is example["image"] and same["valid_size"].tolist() == [4, 6]
  check_message("a picture of 4x6 cannot be padded to 4x4", lambda: st.pad(example, size=(4, 4)))


def test_evaluation_leaves_the_picture_to_the_test_time_procedure():
  augmentation, example = st.Augmentation(crop=(32, 32), scale=(240, 64)), picture((60, 90))
  out = augmentation.evaluation(example)
  assert out["image"] is example["image"] and out["label"] is example["label"]
  assert out["valid_size"].tolist() == [60, 90]


def test_nothing_is_written_into_the_arrays_of_the_example():
  example = picture()
  before = {name: np.copy(array) for name, array in example.items()}
  for seed in range(20):
    st.Augmentation(crop=(80, 80), scale=(90, 60)).training(example, np.random.default_rng(seed))
  for name, array in example.items():
    np.testing.assert_array_equal(array, before[name])


def test_wrong_options_are_reported_together():
  message = check_message(
    "scale=(2048,) must be (long side, short side)",
    lambda: st.Augmentation(scale=(2048,), ratio_range=(2.0, 0.5), cat_max_ratio=0.0),
  )
  assert "ratio_range=(2.0, 0.5) must be (lowest, highest)" in message and "cat_max_ratio=0.0 must lie" in message
  check_message("crop=(0, 5) must be (height, width)", lambda: st.Augmentation(crop=(0, 5)))


def test_rooms_have_labels_of_their_nineteen_classes(tmp_path):
  options = dict(task="segmentation", size=(48, 64), crop=(40, 40), train_count=6, eval_count=2, ratio_range=(0.5, 2.0))
  data = rooms.Rooms(**options)
  source = data.source("train")
  assert data.classes == rooms.CLASSES and len(rooms.CLASSES) == 19
  assert rooms.Rooms.info({"task": "segmentation"}).classes == rooms.CLASSES
  drawn = [rooms.draw(0, "train", index, (48, 64)) for index in range(6)]
  for index, room in enumerate(drawn):
    np.testing.assert_array_equal(source[index]["label"], room.labels)
  room, people = drawn[3], max(room.labels.max() for room in drawn)
  assert rooms.CLASSES[people] == "person"
  assert set(source[3]) == {"image", "label", "index"} and source[3]["label"].dtype == np.uint8
  example = data.eval_transform(source[3])
  np.testing.assert_array_equal(example["image"], room.image)
  assert set(example) == data.provides
  batches = pipeline.train_batches(data, batch_size=4, seed=0, keys=data.provides)
  batch = next(batches)
  batches.close()
  assert batch["image"].shape == (4, 40, 40, 3) and batch["label"].shape == (4, 40, 40)
  assert (batch["label"] == IGNORE).any() == (batch["valid_size"] < 40).any()
  writer.prepare(data, tmp_path / "out", name="rooms")
  stored = rooms.Rooms(**options, format="tfds", root=str(tmp_path / "out")).source("train")
  np.testing.assert_array_equal(stored[3]["label"], room.labels)
  depth = rooms.Rooms(**dict(options, task="depth", ratio_range=()), format="tfds", root=str(tmp_path / "out"))
  check_message("task='segmentation' (here 'depth')", lambda: depth.source("train"))
  check_message("task='pose' is unknown to the rooms", lambda: rooms.Rooms(task="pose"))
  check_message("data.ratio_range=(0.5, 2.0) has no effect", lambda: rooms.Rooms(ratio_range=(0.5, 2.0)))
  check_message(
    "data.cut_depth='released' has no effect", lambda: rooms.Rooms(task="segmentation", cut_depth="released")
  )
