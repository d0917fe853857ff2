"""Colored depth and panels."""

import numpy as np

from vpd_jax.tasks import colormaps
from vpd_jax.tasks.depth import visualize
from vpd_jax.tasks.depth.task import Depth

TRUTH = np.array([[1.0, 2.0, 5.0], [0.0, np.nan, 5.0]])


def large(small):
  """Each pixel a square of 20."""
  return np.kron(small, np.ones((20, 20)))


def test_a_panel_shows_input_truth_prediction_and_error_below_titles():
  image = np.full((40, 60, 3), 7, np.uint8)
  prediction = np.array([[1.0, 3.0, 9.0], [3.0, np.inf, 5.0]])
  panel = visualize.panel(image, large(prediction), large(TRUTH), (1.0, 5.0), 1.0)
  above, bar = panel.shape[0] - 40, (panel.shape[1] - 4 * 60) // 2
  squares = panel[above + 10 :: 20]
  given, true, predicted = (squares[:, 60 * i + 10 : 60 * i + 60 : 20] for i in range(3))
  error = squares[:, 3 * 60 + bar + 10 :: 20][:, :3] if bar else None
  np.testing.assert_array_equal(given, 7)
  np.testing.assert_array_equal(predicted[0, 0], true[0, 0])
  np.testing.assert_array_equal(predicted[0, 2], true[0, 2])  # beyond the last color
  for gray in (true[1, 0], true[1, 1], predicted[1, 1]):
    np.testing.assert_array_equal(gray, colormaps.INVALID)
  assert (panel[:above] < 100).any(), "titles"
  assert error is not None
  first = 3 * 60 + visualize.drawing.color_bar(1.0, 5.0, colormaps.DEPTH, (40, 60)).shape[1]
  error = squares[:, first + 10 : first + 60 : 20]
  for gray in (error[1, 0], error[1, 1]):
    np.testing.assert_array_equal(gray, colormaps.INVALID)
  assert error[0, 0].max() < 5 and (error[0, 1] > 100).all()  # 1 m is the last color of the error
  np.testing.assert_array_equal(error[0, 1], error[0, 2])


def test_panels_of_several_images_share_one_scale():
  task, image = Depth(max_depth=10.0), np.zeros((40, 60, 3), np.uint8)
  near, far = (np.full((40, 60), depth, np.float32) for depth in (2.0, 8.0))
  panels = task.panels([{"image": image, "depth": near}, {"image": image, "depth": far}], [near, near])
  above = panels[0].shape[0] - 40
  np.testing.assert_array_equal(panels[0][above, 120], panels[1][above, 120])
  first, last = colormaps.paint(np.array([0.0, 1.0]), 0.0, 1.0, colormaps.DEPTH)
  np.testing.assert_array_equal(panels[0][above, 60], first)
  np.testing.assert_array_equal(panels[1][above, 60], last)
  empty = task.panel({"image": image, "depth": np.zeros((40, 60))}, np.full((40, 60), 10.0))
  np.testing.assert_array_equal(empty[above, 120], last)  # without truth the scale ends at max_depth
  assert (empty[above, 60] == colormaps.INVALID).all()


def test_colored_depth_has_a_bar_and_on_demand_contours():
  depth = np.broadcast_to(np.linspace(0.5, 3.5, 80), (60, 80)).astype(np.float32)
  plain, lined = visualize.colored(depth), visualize.colored(depth, 1.0)
  np.testing.assert_array_equal(plain[:, :80], colormaps.color_depth(depth))
  assert plain.shape == lined.shape and plain.shape[1] > 80
  assert np.flatnonzero((plain != lined).any((0, 2))).size in range(3, 7)
  unknown = np.zeros((60, 80), np.float32)
  assert (visualize.colored(unknown) == colormaps.INVALID).all() and visualize.colored(unknown).shape == (60, 80, 3)
