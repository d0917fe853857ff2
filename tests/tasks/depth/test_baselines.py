import numpy as np
import pytest

from vpd_jax.tasks.depth.baselines import depth_baselines


def example(depth: np.ndarray, image: np.ndarray | None = None) -> dict[str, np.ndarray]:
  image = np.zeros((*depth.shape, 3), np.uint8) if image is None else image
  return {"image": image, "depth": depth.astype(np.float32)}


def test_each_baseline_is_exact_on_what_it_can_express():
  rng, ramp = np.random.default_rng(0), np.linspace(1, 3, 12).reshape(3, 4)
  bumps = rng.uniform(1, 5, (3, 4))
  images = [rng.integers(0, 256, (3, 4, 3), np.uint8) for _ in range(3)]
  flat = depth_baselines([example(np.full((3, 4), 2.0))] * 3, [example(np.full((3, 4), 2.5))])
  np.testing.assert_allclose(flat["constant"], 0.5, atol=1e-6)
  assert depth_baselines([example(bumps)] * 2, [example(bumps)])["position_mean"] < 1e-6
  colored = [example(ramp + image[..., 0] / 100, image) for image in images]
  scores = depth_baselines(colored[:2], colored[2:])
  assert scores["linear_rgb_position"] < 1e-5 < scores["constant"]


def test_images_are_averaged_not_pixels_and_missing_depth_is_left_out():
  near, far = np.zeros((4, 4)), np.full((4, 4), 4.0)
  near[0, 0] = 2.0
  scores = depth_baselines([example(np.full((4, 4), 3.0))], [example(near), example(far), example(np.zeros((4, 4)))])
  np.testing.assert_allclose(scores["constant"], 1.0, atol=1e-6)
  np.testing.assert_allclose(scores["position_mean"], 1.0, atol=1e-6)


def test_the_constant_is_the_best_for_the_mean_over_images():
  images = [example(np.full((2, 2), depth)) for depth in (1.0, 1.0, 4.0)]
  assert depth_baselines(images, images)["constant"] == pytest.approx(1.0, abs=1e-6)  # the median, not the mean


def test_region_limits_what_is_scored():
  train = [example(np.full((4, 4), 2.0))]
  truth = np.full((4, 4), 2.0)
  truth[:, 2:] = 5.0
  assert depth_baselines(train, [example(truth)], region=(0, 4, 0, 2))["constant"] < 1e-6
  assert depth_baselines(train, [example(truth)])["constant"] > 1


def test_nothing_valid_or_two_sizes_is_an_error():
  empty, full = example(np.zeros((2, 2))), example(np.ones((2, 2)))
  with pytest.raises(ValueError, match="no training image"):
    depth_baselines([empty], [full])
  with pytest.raises(ValueError, match="no evaluation image"):
    depth_baselines([full], [empty])
  with pytest.raises(ValueError, match="one size"):
    depth_baselines([full], [example(np.ones((3, 2)))])
