import cv2
import numpy as np
import pytest

from tests.helpers.fixed_numbers import Fixed
from vpd_jax.data.transforms import depth as depth_transforms


def example(height=48, width=64, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
    "depth": (rng.integers(0, 10000, (height, width)) / 1000).astype(np.float32),
    "labels": rng.integers(0, 5, (height, width)).astype(np.int32),
    "class_id": np.int32(3),
  }


@pytest.mark.parametrize(
  ("millimeters", "level"), [(1000, 232), (3517, 189), (9999, 15), (300, 44), (5000, 136), (0, 0)]
)
def test_released_cut_depth_wraps_millimeters_modulo_256(millimeters, level):
  depth = np.full((2, 2), millimeters, np.float32) / np.float32(1000)
  assert (depth_transforms.depth_as_color(depth, "released", 1000.0, 10.0) == level).all()


def test_every_depth_a_16_bit_file_can_hold_wraps_exactly():
  values = np.arange(65536).astype(np.float32)
  for scale in (1000.0, 256.0):
    wrapped = depth_transforms.depth_as_color(values / np.float32(scale), "released", scale, 10.0)
    np.testing.assert_array_equal(wrapped, np.arange(65536) % 256)


def test_fractions_of_a_file_unit_are_truncated():
  depth = np.array([[80.7, 80.2, 337.9]], np.float32)
  np.testing.assert_array_equal(depth_transforms.depth_as_color(depth, "released", 1.0, 1000.0), [[80, 80, 81]])


def test_scaled_cut_depth_is_proportional_and_clipped():
  depth = np.array([[0.0, 5.0, 10.0, 20.0]], np.float32)
  np.testing.assert_array_equal(depth_transforms.depth_as_color(depth, "scaled", 1000.0, 10.0), [[0, 127, 255, 255]])


def test_the_band_of_cut_depth_has_the_released_columns_and_full_height():
  before = example(width=640)
  after = depth_transforms.vertical_cut_depth(
    before, Fixed(0.25, 0.5), mode="released", depth_scale=1000.0, max_depth=10.0
  )
  expected = before["image"].copy()
  # l = int(0.25 * 640), w = int((640 - 160) * 0.5 * 0.75)
  expected[:, 160:340] = (np.rint(before["depth"] * 1000).astype(int) % 256)[:, 160:340, None]
  np.testing.assert_array_equal(after["image"], expected)
  assert (before["image"] != expected).any()  # the input was not written to


def test_the_band_of_cut_depth_is_one_column_at_least():
  before = example()
  after = depth_transforms.vertical_cut_depth(
    before, Fixed(0.5, 0.0), mode="scaled", depth_scale=1000.0, max_depth=10.0
  )
  changed = np.flatnonzero((after["image"] != before["image"]).any((0, 2)))
  np.testing.assert_array_equal(changed, [32])


def test_cut_depth_off_changes_nothing_and_an_unknown_word_fails():
  before = example()
  assert depth_transforms.vertical_cut_depth(before, Fixed(), mode="off", depth_scale=1.0, max_depth=1.0) is before
  with pytest.raises(ValueError, match=r"cut_depth='wrap' is unknown; choose one of"):
    depth_transforms.vertical_cut_depth(before, Fixed(), mode="wrap", depth_scale=1.0, max_depth=1.0)


def test_mirror_and_crop_move_all_maps_alike():
  before = example()
  mirrored = depth_transforms.random_mirror(before, Fixed(0.49))
  assert depth_transforms.random_mirror(before, Fixed(0.5)) is before
  cropped = depth_transforms.random_crop(mirrored, Fixed(0.5, 0.999), size=(32, 40))
  for name in ("image", "depth", "labels"):
    np.testing.assert_array_equal(mirrored[name], before[name][:, ::-1])
    np.testing.assert_array_equal(cropped[name], before[name][8:40, ::-1][:, 23:63])  # int(24 * 0.999) is 23
  assert cropped["class_id"] == 3


def test_a_crop_larger_than_the_image_fails():
  with pytest.raises(ValueError, match="crop=49x10 does not fit into an image of 48x64"):
    depth_transforms.random_crop(example(), Fixed(), size=(49, 10))


def test_contrast_table_is_clipped_and_truncated():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
  changed = depth_transforms.change_contrast(levels, contrast=1.2, brightness=-0.1)
  expected = np.clip(1.2 * levels - 25.5, 0, 255)
  assert (np.abs(changed - np.floor(expected)) <= (np.abs(expected - np.rint(expected)) < 1e-4)).all()
  np.testing.assert_array_equal(depth_transforms.change_contrast(levels, contrast=1.0, brightness=0.0), levels)
  assert depth_transforms.change_contrast(levels, contrast=1.2, brightness=0.2).max() == 255


def test_gamma_table_steps_by_the_rounded_255th():
  levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
  same = depth_transforms.change_gamma(levels, gamma=1.0)
  assert same[0, 0] == 0
  assert same[-1, -1] == 255
  assert np.count_nonzero(same != levels) == 24 + np.count_nonzero(
    (np.arange(256) / 255 * 255).astype(int) != np.arange(256)
  )
  darker = depth_transforms.change_gamma(levels, gamma=1.2)
  assert darker.ravel()[128] == int((128 / 255) ** 1.2 * 255)


def test_hsv_shifts_wrap_hue_and_clip_the_others():
  image = cv2.cvtColor(np.array([[[170, 200, 100], [5, 10, 250]]], np.uint8), cv2.COLOR_HSV2RGB)
  before = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)
  hue = cv2.cvtColor(depth_transforms.shift_hsv(image, hue=20, saturation=0, value=0), cv2.COLOR_RGB2HSV).astype(int)
  np.testing.assert_allclose((hue - before)[0, 0, 0] % 180, 20, atol=2)  # uint8 colors resolve hue to about this
  gray = depth_transforms.shift_hsv(image, hue=0, saturation=-255, value=255)
  np.testing.assert_array_equal(gray, np.full((1, 2, 3), 255))
  unchanged = depth_transforms.shift_hsv(image, hue=0.9, saturation=0.9, value=0.9)
  np.testing.assert_array_equal(unchanged, cv2.cvtColor(before.astype(np.uint8), cv2.COLOR_HSV2RGB))  # truncated


def test_resize_interpolates_colors_but_never_depth():
  before = example()
  after = depth_transforms.resize(before, size=(24, 40))
  assert after["image"].shape == (24, 40, 3)
  assert after["image"].dtype == np.uint8
  assert set(np.unique(after["depth"])) <= set(np.unique(before["depth"]))
  assert after["depth"].dtype == np.float32
  assert after["labels"].shape == (24, 40)
  np.testing.assert_array_equal(after["image"], cv2.resize(before["image"], (40, 24)))


def test_training_is_a_function_of_record_and_random_numbers():
  before = example()
  kept = {name: np.copy(array) for name, array in before.items()}
  first, again = (
    depth_transforms.depth_training(before, np.random.default_rng(5), 0, crop=(32, 48), depth_scale=1000.0)
    for _ in range(2)
  )
  other = depth_transforms.depth_training(before, np.random.default_rng(6), 0, crop=(32, 48))
  for name, array in kept.items():
    np.testing.assert_array_equal(before[name], array)
    np.testing.assert_array_equal(first[name], again[name])
  assert (first["image"] != other["image"]).any()
  assert first["image"].shape == (32, 48, 3)
  assert first["depth"].shape == (32, 48)
  assert first["depth"].dtype == np.float32


def test_cut_depth_is_applied_at_every_fourth_position():
  gray = {"image": np.full((48, 64, 3), 7, np.uint8), "depth": np.full((48, 64), 2.0, np.float32)}
  touched = []
  for position in range(9):
    after = depth_transforms.depth_training(gray, np.random.default_rng(1), position, crop=(48, 64), color_jitter=False)
    touched.append(bool((after["image"] == 2000 % 256).any()))
  assert touched == [True, False, False, False, True, False, False, False, True]


def test_color_changes_half_of_the_time_each_and_never_depth():
  before = example()
  changed = 0
  for seed in range(200):
    after = depth_transforms.random_color(before, np.random.default_rng(seed))
    np.testing.assert_array_equal(after["depth"], before["depth"])
    changed += bool((after["image"] != before["image"]).any())
  assert 150 < changed < 195  # 7/8 of 200, at three standard deviations
