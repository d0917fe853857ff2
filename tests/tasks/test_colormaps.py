"""Pictures of depth."""

import numpy as np

from vpd_jax.tasks import colormaps


def test_a_panel_shows_input_prediction_truth_and_error_on_common_scales():
  image = np.full((2, 3, 3), 7, np.uint8)
  truth = np.array([[1.0, 2.0, 5.0], [0.0, np.nan, 5.0]])
  prediction = np.array([[1.0, 3.0, 9.0], [3.0, np.inf, 5.0]])
  panel = colormaps.depth_panel(image, prediction, truth, max_depth=10.0)
  assert panel.shape == (2, 12, 3) and panel.dtype == np.uint8
  given, predicted, true, error = np.split(panel, 4, axis=1)
  np.testing.assert_array_equal(given, image)
  np.testing.assert_array_equal(predicted[0, 0], true[0, 0])
  np.testing.assert_array_equal(predicted[0, 2], true[0, 2])  # beyond the last color
  for gray in (true[1, 0], true[1, 1], predicted[1, 1], error[1, 0], error[1, 1]):
    np.testing.assert_array_equal(gray, colormaps.INVALID)
  assert error[0, 0].max() < 5 and (error[0, 1] > 100).all()  # 1 m of 10 m is the last color of the error
  np.testing.assert_array_equal(error[0, 1], error[0, 2])


def test_a_panel_without_truth_spans_the_whole_range():
  panel = colormaps.depth_panel(np.zeros((1, 2, 3), np.uint8), np.array([[1e-9, 10.0]]), np.zeros((1, 2)), 10.0)
  np.testing.assert_array_equal(panel[0, 2:4], colormaps.paint(np.array([0.0, 1.0]), 0.0, 1.0, "Spectral"))
  assert (panel[0, 4:] == colormaps.INVALID).all()


def test_near_is_red_and_far_is_blue():
  near, far = colormaps.color_depth(np.array([[1.0, 4.0]]))[0].astype(int)
  assert near[0] > near[2] + 50 and far[2] > far[0] + 50


def test_odd_maps_are_painted_without_a_warning():
  assert (colormaps.color_depth(np.zeros((2, 2))) == colormaps.INVALID).all()
  assert colormaps.color_depth(np.full((2, 2), 3.0)).shape == (2, 2, 3)
  assert (colormaps.color_depth(np.array([[np.nan, -1.0, np.inf]])) == colormaps.INVALID).all()
