"""Boxes to crops, warps, half bodies and the augmentation, against plain numpy restatements over random cases."""

import math

import cv2
import numpy as np
import pytest

from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.data.transforms.top_down import COCO, Augmentation

CROP = (256, 192)
COCO_SIGMAS = [0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89]


def random_box(rng):
  return np.array([*rng.uniform(-50, 400, 2), *rng.uniform(5, 300, 2)])


def person(seed=0, size=(120, 160), index=3):
  """An Example as sources give it: 17 points inside the box, three of them without label."""
  rng = np.random.default_rng(seed)
  points = np.concatenate([rng.uniform((40, 20), (110, 100), (17, 2)), np.full((17, 1), 2)], axis=1)
  points[[3, 9, 16]] = 0
  return {
    "image": rng.integers(0, 255, (*size, 3), dtype=np.uint8),
    "keypoints": points.astype(np.float32),
    "box": np.array([35, 15, 80, 90], np.float32),
    "box_score": np.float32(0.7),
    "image_index": np.int32(5),
    "index": np.int32(index),
  }


def test_cocos_facts():
  np.testing.assert_allclose(COCO.sigmas, np.array(COCO_SIGMAS) / 10)
  assert COCO.pairs == ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))
  for left, right in COCO.pairs:
    assert COCO.names[right] == COCO.names[left].replace("left", "right")
  # As in the files' categories, which count from 1.
  assert [(a + 1, b + 1) for a, b in COCO.skeleton][:4] == [(16, 14), (14, 12), (17, 15), (15, 13)]
  assert len(COCO.skeleton) == 19 and COCO.upper == tuple(range(11))
  assert top_down_transforms.keypoints_from_names(COCO.names).pairs == COCO.pairs
  assert top_down_transforms.keypoints_from_names(COCO.names).sigmas == COCO.sigmas
  np.testing.assert_allclose(top_down_transforms.UPPER_SHARE, 0.6915, atol=1e-4)


def test_center_and_extent_are_the_written_formula():
  rng = np.random.default_rng(0)
  for _ in range(100):
    x, y, w, h = box = random_box(rng)
    u = rng.random(2)
    expected = np.array([x + w / 2, y + h / 2]) + 0.4 * (u - 0.5) * (w, h)
    aspect = 192 / 256
    if w > aspect * h:
      h = w / aspect
    elif w < aspect * h:
      w = aspect * h
    center, extent = top_down_transforms.box_to_center_scale(box, CROP, jitter=u)
    np.testing.assert_allclose(center, expected)
    np.testing.assert_allclose(extent, 200 * (1.25 * np.array([w, h]) / 200))
    np.testing.assert_allclose(top_down_transforms.box_to_center_scale(box, CROP)[0], [x + box[2] / 2, y + box[3] / 2])


def test_the_udp_matrix_is_the_written_formula():
  rng = np.random.default_rng(1)
  for _ in range(100):
    (cx, cy), (sx, sy) = center, extent = top_down_transforms.box_to_center_scale(random_box(rng), CROP)
    angle = rng.uniform(-80, 80)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    kx, ky = 191 / sx, 255 / sy
    expected = [
      [kx * cos, -kx * sin, kx * (-cx * cos + cy * sin + sx / 2)],
      [ky * sin, ky * cos, ky * (-cx * sin - cy * cos + sy / 2)],
    ]
    np.testing.assert_allclose(
      top_down_transforms.warp_matrix(center, extent, angle, CROP), expected, rtol=1e-9, atol=1e-9
    )


def test_the_classic_matrix_is_the_one_through_three_points():
  rng = np.random.default_rng(2)

  def third(a, b):
    return b + np.array([-(a - b)[1], (a - b)[0]])

  for _ in range(100):
    center, extent = top_down_transforms.box_to_center_scale(random_box(rng), CROP)
    angle = rng.uniform(-80, 80)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    up = np.array([[cos, -sin], [sin, cos]]) @ [0, -extent[0] / 2]
    source, target = [center, center + up], [np.array([96.0, 128.0]), np.array([96.0, 128.0 - 96.0])]
    source.append(third(*source))
    target.append(third(*target))
    expected = cv2.getAffineTransform(np.float32(source), np.float32(target))
    found = top_down_transforms.warp_matrix(center, extent, angle, CROP, udp=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())  # its inputs are float32


def test_udp_to_the_heatmap_and_back_is_exact_without_rotation():
  """The first acceptance test of the recipe: what the heatmap's pixels mean in the picture."""
  rng = np.random.default_rng(3)
  for _ in range(100):
    box = random_box(rng)
    center, extent = top_down_transforms.box_to_center_scale(box, CROP)
    points = rng.uniform(box[:2], box[:2] + box[2:], (17, 2))
    crop = top_down_transforms.warp_points(points, top_down_transforms.warp_matrix(center, extent, 0.0, CROP))
    on_map = crop / (np.array([191, 255]) / np.array([47, 63]))
    back = on_map * extent / np.array([47, 63]) + center - extent / 2
    np.testing.assert_allclose(back, points, rtol=0, atol=1e-9)


@pytest.mark.parametrize("udp", [True, False])
def test_the_warped_picture_shows_the_points_where_the_matrix_puts_them(udp):
  image = np.zeros((120, 160, 3), np.uint8)
  points = np.array([[60.0, 40.0], [90.0, 70.0], [50.0, 90.0]])
  for x, y in points.astype(int):
    image[y - 1 : y + 2, x - 1 : x + 2] = 255
  matrix = top_down_transforms.warp_matrix(np.array([70.0, 60.0]), np.array([90.0, 120.0]), 25.0, CROP, udp=udp)
  crop = top_down_transforms.warp_image(image, matrix, CROP)
  count, _, _, middles = cv2.connectedComponentsWithStats((crop[..., 0] > 100).astype(np.uint8))
  assert crop.shape == (256, 192, 3) and count == 4
  found = sorted(middles[1:].tolist())
  np.testing.assert_allclose(found, sorted(top_down_transforms.warp_points(points, matrix).tolist()), atol=0.6)
  assert not crop[:20, :20].any()  # beyond the picture


def written_warp(image, matrix, size):
  """Bilinear by plain numpy: each pixel of the crop looks back into the picture, which is black outside."""
  linear = np.linalg.inv(matrix[:, :2])
  y, x = np.mgrid[: size[0], : size[1]]
  place = (np.stack([x, y], -1) - matrix[:, 2]) @ linear.T  # x, y in the picture
  low = np.floor(place).astype(int)
  part, total = place - low, np.zeros((*size, 3))
  for i in (0, 1):
    for j in (0, 1):
      column, row = low[..., 0] + i, low[..., 1] + j
      inside = (column >= 0) & (column < image.shape[1]) & (row >= 0) & (row < image.shape[0])
      weight = np.abs(1 - i - part[..., 0]) * np.abs(1 - j - part[..., 1]) * inside
      total += weight[..., None] * image[row * inside, column * inside]
  return total


@pytest.mark.parametrize("udp", [True, False])
def test_warping_is_plain_bilinear_interpolation(udp):
  """OpenCV places samples at 32nds of a pixel: with slopes of some 20 levels a pixel that is a level or two."""
  rng, size = np.random.default_rng(12), (64, 48)
  for _ in range(20):
    coarse = rng.integers(0, 255, (8, 10, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
    image[:3] = image[-3:] = image[:, :3] = image[:, -3:] = 0  # no step at the border, which is sampled alike
    image = cv2.GaussianBlur(image, (0, 0), 2)
    center, extent = rng.uniform((20, 20), (140, 100)), rng.uniform(40, 150) * np.array([0.75, 1.0])
    matrix = top_down_transforms.warp_matrix(center, extent, rng.uniform(-80, 80), size, udp=udp)
    found = top_down_transforms.warp_image(image, matrix, size)
    np.testing.assert_allclose(found, written_warp(image, matrix, size), rtol=0, atol=2)


def test_mirroring_twice_is_nothing_and_swaps_left_and_right():
  points = person()["keypoints"]
  once = top_down_transforms.mirrored(points, 160, COCO.pairs)
  np.testing.assert_allclose(once[5, 0], 159 - points[6, 0])
  np.testing.assert_array_equal(once[5, 1:], points[6, 1:])
  assert not once[4].any() and not once[10].any() and not once[15].any()  # the partners of those without label
  np.testing.assert_allclose(top_down_transforms.mirrored(once, 160, COCO.pairs), points, atol=1e-4)


def written_half_body(points, upper, prefer_upper):
  above = [p[:2] for k, p in enumerate(points) if p[2] > 0 and k in upper]
  below = [p[:2] for k, p in enumerate(points) if p[2] > 0 and k not in upper]
  chosen = above if prefer_upper and len(above) > 2 else below if len(below) > 2 else above
  if len(chosen) < 2:
    return None
  chosen = np.array(chosen)
  w, h = chosen.max(0) - chosen.min(0)
  aspect = 192 / 256
  w, h = (w, w / aspect) if w > aspect * h else (h * aspect, h)
  return chosen.mean(0), 200 * (1.5 * np.array([w, h]) / 200)


@pytest.mark.parametrize("prefer_upper", [True, False])
def test_half_bodies_are_the_written_rule(prefer_upper):
  rng = np.random.default_rng(4)
  seen = set()
  for _ in range(200):
    points = np.concatenate([rng.uniform(0, 200, (17, 2)), rng.integers(0, 3, (17, 1))], axis=1)
    points[rng.integers(0, 17, rng.integers(0, 17))] = 0
    found = top_down_transforms.half_body(points, COCO.upper, CROP, prefer_upper=prefer_upper)
    expected = written_half_body(points, COCO.upper, prefer_upper)
    assert (found is None) == (expected is None)
    seen.add(found is None)
    if found is not None:
      for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
  assert seen == {True, False}
  same = np.zeros((17, 3))
  same[:4] = 30, 40, 2
  assert top_down_transforms.half_body(same, COCO.upper, CROP, prefer_upper=True) is None  # the release divides by 0


def test_an_example_for_evaluation_is_the_box_as_it_is():
  example = Augmentation(CROP, COCO).evaluation(person())
  assert set(example) == top_down_transforms.PROVIDES
  center, extent = top_down_transforms.box_to_center_scale(person()["box"], CROP)
  np.testing.assert_allclose(example["center"], center)
  np.testing.assert_allclose(example["extent"], extent)
  assert example["image"].shape == (*CROP, 3) and example["image"].dtype == np.uint8
  labeled = person()["keypoints"][:, 2] > 0
  np.testing.assert_array_equal(example["keypoints"][:, 2], labeled)
  assert not example["keypoints"][~labeled].any()
  matrix = top_down_transforms.warp_matrix(center, extent, 0.0, CROP)
  placed = top_down_transforms.warp_points(person()["keypoints"][labeled, :2], matrix)
  np.testing.assert_allclose(example["keypoints"][labeled, :2], placed, atol=1e-4)
  assert {str(example[k].dtype) for k in ("keypoints", "center", "extent", "box_score")} == {"float32"}


def test_training_examples_show_the_person_where_they_say():
  """A white blob at one joint in a black picture is found at that joint's place in the crop, under any augmentation."""
  made, plain = Augmentation(CROP, COCO), person()
  plain["image"][:] = 0
  x, y = plain["keypoints"][0, :2].astype(int)
  cv2.circle(plain["image"], (int(x), int(y)), 3, (255, 255, 255), -1)
  plain["keypoints"][0, :2] = x, y
  found = 0
  for seed in range(40):
    example = made.training(plain, np.random.default_rng(seed))
    total = example["image"][..., 0].astype(float)
    place = example["keypoints"][0, :2]
    if (place < 15).any() or (place > np.array([175, 240])).any():
      continue
    found += 1
    rows, columns = np.mgrid[:256, :192]
    middle = np.array([(columns * total).sum(), (rows * total).sum()]) / total.sum()
    np.testing.assert_allclose(middle, place, atol=0.7)
  assert found > 15


def test_the_augmentation_draws_what_it_says():
  """Shares of mirror images, of turned crops, of moved centers and of scales, over many draws."""
  made = Augmentation((32, 24), COCO, half_body=0.0)
  plain = person(size=(60, 80)) | {"box": np.array([20, 10, 30, 40], np.float32)}
  still = top_down_transforms.box_to_center_scale(plain["box"], (32, 24))
  turned, moved, factors = 0, 0, []
  for seed in range(600):
    example = made.training({**plain, "index": np.int32(seed)}, np.random.default_rng(seed))
    factors.append(example["extent"][1] / still[1][1])
    a, b = plain["keypoints"][5, :2] - plain["keypoints"][11, :2]
    c, d = (example["keypoints"][5] - example["keypoints"][11])[:2] / (np.array([23, 31]) / example["extent"])
    e, f = (example["keypoints"][6] - example["keypoints"][12])[:2] / (np.array([23, 31]) / example["extent"])
    turned += min(abs(c - a) + abs(d - b), abs(e + a) + abs(f - b)) > 1e-2
    moved += min(abs(example["center"][0] - still[0][0]), abs(79 - example["center"][0] - still[0][0])) > 1e-3
  assert abs(turned / 600 - 0.6) < 0.06 and abs(moved / 600 - 0.3) < 0.06
  assert min(factors) >= 0.499 and max(factors) <= 1.501
  assert 0.2 < np.mean(np.array(factors) < 0.501) + np.mean(np.array(factors) > 1.499) < 0.45  # beyond one deviation


def test_each_jitter_moves_centers_as_named():
  plain = [person(index=index) for index in range(40)]

  def centers(word, seed):
    made = Augmentation(CROP, COCO, center_jitter=word, flip=0, half_body=0)
    return np.array([made.training(example, np.random.default_rng(seed))["center"] for example in plain])

  still = centers("off", 0)
  assert (still == still[0]).all()
  np.testing.assert_array_equal(centers("once", 0), centers("once", 1))
  assert 5 <= (centers("once", 0) != still).any(1).sum() <= 20
  always = np.array([centers("always", seed)[0] for seed in range(20)])
  assert 1 <= (always != still[0]).any(1).sum() <= 14


def test_half_bodies_come_as_often_as_asked():
  """With upper_share 1 and 0 the halves differ; a body of eight visible joints is left whole."""
  options = {"flip": 0, "center_jitter": "off", "scale": 0.0, "half_body": 1.0}
  made = {share: Augmentation(CROP, COCO, upper_share=share, **options) for share in (0.0, 1.0)}
  plain = person()
  for share, points in ((1.0, plain["keypoints"][:11]), (0.0, plain["keypoints"][11:])):
    example = made[share].training(plain, np.random.default_rng(0))
    np.testing.assert_allclose(example["center"], points[points[:, 2] > 0, :2].mean(0), rtol=1e-5)
  few = plain["keypoints"].copy()
  few[8:] = 0
  few[3] = 30, 30, 2
  example = made[1.0].training(plain | {"keypoints": few}, np.random.default_rng(0))
  np.testing.assert_allclose(example["center"], top_down_transforms.box_to_center_scale(plain["box"], CROP)[0])


def test_keypoints_of_ones_own_are_described_by_names():
  found = top_down_transforms.keypoints_from_names(
    ("nose", "left_hoof", "right_hoof", "tail"), skeleton=(("nose", "tail"),), sigmas=(0.1,), upper=("nose",)
  )
  assert found.pairs == ((1, 2),) and found.skeleton == ((0, 3),) and found.sigmas == (0.1,) * 4 and found.upper == (0,)
  assert top_down_transforms.keypoints_from_names(("nose", "tail")).sigmas == (0.026, top_down_transforms.UNKNOWN_SIGMA)
  assert top_down_transforms.keypoints_from_names(("a", "b", "c"), pairs=(("a", "c"),)).pairs == ((0, 2),)


@pytest.mark.parametrize("options, message", [
  ({"names": ()}, r"^data\.keypoints=\(\) must be different names"),
  ({"names": ("a", "a")}, r"must be different names"),
  ({"names": ("a", "b"), "pairs": (("a", "c"),)}, r"^data: pairs names c, which data\.keypoints does not\.$"),
  ({"names": ("a", "b"), "pairs": (("a",),)}, r"pairs has \('a',\), not two names"),
  ({"names": ("a", "b", "c"), "pairs": (("a", "b"), ("b", "c"))}, r"pairs names b more than once"),
  ({"names": ("a", "b"), "sigmas": (0.1, 0.1, 0.1), "skeleton": (("a", "z"),)},
   r"^data: skeleton names z, which data\.keypoints does not; sigmas=\(0\.1, 0\.1, 0\.1\) must be 1 or 2 numbers"),
])  # fmt: skip
def test_names_that_do_not_fit_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    top_down_transforms.keypoints_from_names(options.pop("names"), **options)


@pytest.mark.parametrize("options, message", [
  ({"crop": (250, 192)}, r"^data: crop=\(250, 192\) must have sides of multiples of 4"),
  ({"flip": 2.0, "scale": 1.0}, r"^data: flip=2\.0 must lie between 0 and 1; scale=1\.0 must be at least 0"),
  ({"center_jitter": "never"}, r"center_jitter='never' is unknown; choose one of \('once', 'always', 'off'\)"),
  ({"padding": 0.0}, r"padding=0\.0 must be above 0"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Augmentation(**{"crop": CROP, "keypoints": COCO} | options)
