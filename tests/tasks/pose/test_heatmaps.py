"""Targets and decoding of heatmaps against plain numpy and OpenCV restatements, over random cases."""

import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.written_heatmaps import CROP, SIZE, written_targets
from vpd_jax.tasks.pose import heatmaps

PAIRS = ((1, 2), (3, 4))


def written_decode(maps, kernel=11, dtype=np.float32):
  """The release's DARK for UDP on [K, h, w], the Hessian inverted in float64."""
  places, scores = [], []
  for one in maps.astype(dtype):
    y, x = np.unravel_index(one.argmax(), one.shape)
    scores.append(one.max())
    if one.max() <= 0:
      places.append((-1.0, -1.0))
      continue
    blurred = cv2.GaussianBlur(one, (kernel, kernel), 0)
    v = np.pad(np.log(np.clip(blurred, 0.001, 50)), 1, mode="edge").astype(np.float64)
    x, y = x + 1, y + 1
    g = np.array([v[y, x + 1] - v[y, x - 1], v[y + 1, x] - v[y - 1, x]]) / 2
    dxx, dyy = v[y, x + 1] - 2 * v[y, x] + v[y, x - 1], v[y + 1, x] - 2 * v[y, x] + v[y - 1, x]
    dxy = 0.5 * (
      v[y + 1, x + 1] - v[y, x + 1] - v[y + 1, x] + 2 * v[y, x] - v[y, x - 1] - v[y - 1, x] + v[y - 1, x - 1]
    )
    hessian = np.array([[dxx, dxy], [dxy, dyy]]) + np.finfo(np.float32).eps * np.eye(2)
    places.append(np.array([x - 1, y - 1]) - np.linalg.inv(hessian) @ g)
  return np.array(places), np.array(scores)


def written_quarter(maps):
  places = []
  for one in maps:
    h, w = one.shape
    y, x = np.unravel_index(one.argmax(), one.shape)
    place = np.array([x, y], np.float64)
    if one.max() <= 0:
      place[:] = -1
    elif 1 < x < w - 1 and 1 < y < h - 1:
      place += 0.25 * np.sign([one[y, x + 1] - one[y, x - 1], one[y + 1, x] - one[y - 1, x]])
    places.append(place)
  return np.array(places)


def channels_last(maps):
  return jnp.asarray(np.moveaxis(maps, -3, -1), jnp.float32)


@functools.cache
def target_of(sigma=2, udp=True, size=SIZE):
  return jax.jit(lambda points: heatmaps.targets(points, CROP, size, sigma=sigma, udp=udp))


@functools.cache
def decode_of(udp=True, kernel=11):
  return jax.jit(lambda maps: heatmaps.decode(maps, udp=udp, kernel=kernel))


def random_points(seed, count, margin=60.0):
  rng = np.random.default_rng(seed)
  points = np.concatenate([rng.uniform(-margin, np.array(CROP[::-1]) + margin, (count, 2)), np.ones((count, 1))], 1)
  points[rng.random(count) < 0.2] = 0
  return points.astype(np.float32)


@pytest.mark.parametrize("udp", [True, False])
@pytest.mark.parametrize("sigma", [2, 3])
def test_targets_are_the_written_loops(sigma, udp):
  """Inside, across the borders, far outside, without label."""
  points = random_points(0, 200)
  maps, weights = target_of(sigma, udp)(points[None])
  expected, expected_weights = written_targets(points.astype(np.float64), sigma=sigma, udp=udp)
  np.testing.assert_array_equal(weights[0], expected_weights)
  assert 0 < expected_weights[points[:, 2] > 0].mean() < 1
  np.testing.assert_allclose(np.moveaxis(maps[0], -1, 0), expected, atol=2e-5)  # places of 200 pixels in float32
  assert maps.dtype == weights.dtype == jnp.float32


def blobs(seed, count):
  """Heatmaps as networks give them: a few blobs, noise, some below 0."""
  rng = np.random.default_rng(seed)
  rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
  maps = []
  for _ in range(count):
    one = 0.02 * cv2.GaussianBlur(rng.standard_normal(SIZE), (5, 5), 0)
    for _ in range(rng.integers(1, 4)):
      (y, x), s, a = rng.uniform(-2, np.array(SIZE) + 2), rng.uniform(1.2, 4), rng.uniform(0.2, 1)
      one = one + a * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * s**2))
    maps.append(one)
  return np.array(maps, np.float32)


@pytest.mark.parametrize("kernel", [11, 17])
def test_decoding_is_the_written_way(kernel):
  maps = blobs(1, 300)
  maps[7] = -np.abs(maps[7])
  found, scores = decode_of(True, kernel)(channels_last(maps)[None])
  expected, expected_scores = written_decode(maps, kernel)
  np.testing.assert_array_equal(scores[0], expected_scores)
  np.testing.assert_array_equal(found[0, 7], [-1, -1])
  # A step of Newton multiplies the rounding of float32 logarithms by the inverse curvature, which is large where a map
  # is flat; there the step is large too.
  plain = np.abs(expected - written_quarter(maps)).max(1) < 2
  assert plain.mean() > 0.9
  np.testing.assert_allclose(found[0][plain], expected[plain], atol=2e-3)
  assert np.isfinite(found).all()


def test_the_blur_is_opencvs():
  maps = blobs(2, 8)
  for kernel in (11, 17, 23):
    expected = np.array([cv2.GaussianBlur(one, (kernel, kernel), 0) for one in maps])
    found = heatmaps.blurred(channels_last(maps)[None], kernel)[0]
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), expected, atol=1e-6)


def test_the_classic_decoding_is_the_written_way():
  maps = blobs(3, 300)
  found, _ = decode_of(False)(channels_last(maps)[None])
  np.testing.assert_array_equal(found[0], written_quarter(maps))


def test_targets_come_back_within_a_ten_thousandth_of_a_pixel():
  """The second acceptance test of the recipe; near the border the reflected blur pulls, by up to 1.4 pixels."""
  rng = np.random.default_rng(4)
  cells = np.array([47, 63])
  places = rng.uniform(0, cells, (400, 2))
  points = np.concatenate([places * np.array([191, 255]) / cells, np.ones((400, 1))], 1)
  maps, _ = target_of()(points[None].astype(np.float32))
  found, scores = decode_of()(maps)
  error = np.abs(found[0] - places).max(1)
  inner = (np.minimum(places, cells - places) >= 8).all(1)
  assert inner.sum() > 100
  assert error[inner].max() < 1e-4 and scores.min() > 0.9
  assert 0.3 < error.max() < 1.5  # the release's too
  expected, _ = written_decode(np.moveaxis(np.asarray(maps[0]), -1, 0))
  np.testing.assert_allclose(found[0], expected, atol=1e-3)


@pytest.mark.parametrize("udp", [True, False])
def test_the_way_back_to_the_picture_is_the_written_formula(udp):
  rng = np.random.default_rng(5)
  places, center = rng.uniform(0, 47, (6, 17, 2)).astype(np.float32), rng.uniform(0, 600, (6, 2)).astype(np.float32)
  extent = rng.uniform(20, 500, (6, 2)).astype(np.float32)
  less = 1 if udp else 0
  expected = places * (extent / (np.array([48, 64]) - less))[:, None] + (center - extent / 2)[:, None]
  found = heatmaps.to_picture(jnp.asarray(places), jnp.asarray(center), jnp.asarray(extent), SIZE, udp=udp)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_mirrored_maps_of_a_mirrored_crop_are_the_crops():
  """The third acceptance test: keypoints of a mirrored input come back exactly mirrored."""
  points = random_points(6, 5, margin=-40.0)
  points[:, 2] = 1
  order = [0, 2, 1, 4, 3]
  turned = points[order].copy()
  turned[:, 0] = CROP[1] - 1 - turned[:, 0]
  maps, _ = target_of()(points[None])
  of_mirrored, _ = target_of()(turned[None])
  back = heatmaps.mirrored(of_mirrored, PAIRS)
  np.testing.assert_allclose(back, maps, atol=1e-5)
  np.testing.assert_allclose(decode_of()((maps + back) / 2)[0], decode_of()(maps)[0], atol=1e-4)


def test_the_classic_way_moves_mirrored_maps_by_one_pixel():
  maps = blobs(7, 5)
  plain = heatmaps.mirrored(channels_last(maps)[None], PAIRS)
  moved = heatmaps.mirrored(channels_last(maps)[None], PAIRS, shift=True)
  np.testing.assert_array_equal(moved[:, :, 1:], plain[:, :, :-1])
  np.testing.assert_array_equal(moved[:, :, 0], plain[:, :, 0])
  np.testing.assert_array_equal(plain[0, ..., 1], maps[2][:, ::-1])


def test_flat_maps_give_finite_places():
  """One value everywhere has no curvature: the highest pixel stays."""
  found, scores = decode_of()(jnp.full((1, *SIZE, 2), 0.5))
  np.testing.assert_allclose(found, 0, atol=0.5)
  assert np.isfinite(found).all() and (np.asarray(scores) == 0.5).all()


@pytest.mark.x64
def test_decoding_in_float64_is_the_written_way_to_twelve_digits():
  maps = blobs(8, 100).astype(np.float64)
  found, _ = heatmaps.decode(jnp.asarray(np.moveaxis(maps, 0, -1))[None])
  assert found.dtype == jnp.float64
  expected, _ = written_decode(maps, dtype=np.float64)
  plain = np.abs(expected - written_quarter(maps)).max(1) < 2
  np.testing.assert_allclose(found[0][plain], expected[plain], atol=1e-10)
