"""Pictures of depth."""

import numpy as np

from vpd_jax.tasks import colormaps


def test_the_span_of_several_maps_is_that_of_their_known_depths():
  maps = [np.array([[0.0, 3.0]]), np.array([[np.nan, np.inf]]), np.array([[-1.0, 7.0]])]
  assert colormaps.depth_span(maps) == (3.0, 7.0)
  assert colormaps.depth_span(maps[1:2]) is None


def test_near_is_red_and_far_is_blue():
  near, far = colormaps.color_depth(np.array([[1.0, 4.0]]))[0].astype(int)
  assert near[0] > near[2] + 50 and far[2] > far[0] + 50


def test_odd_maps_are_painted_without_a_warning():
  assert (colormaps.color_depth(np.zeros((2, 2))) == colormaps.INVALID).all()
  assert colormaps.color_depth(np.full((2, 2), 3.0)).shape == (2, 2, 3)
  assert (colormaps.color_depth(np.array([[np.nan, -1.0, np.inf]])) == colormaps.INVALID).all()
