"""Titles, bars, contours and names, by their pixels."""

import numpy as np
import pytest

from vpd_jax.tasks import colormaps, drawing

GRAY = np.full((60, 80, 3), 128, np.uint8)


def test_a_row_keeps_its_pictures_below_a_title_each():
  other = np.full((60, 30, 3), 7, np.uint8)
  row = drawing.row([("input", GRAY), ("", other)])
  above = row.shape[0] - 60
  np.testing.assert_array_equal(row[above:], np.concatenate([GRAY, other], axis=1))
  assert (row[:above, :80] < 100).any() and (row[:above, 80:] == 255).all()


@pytest.mark.parametrize("low, high, most, expected", [
  (0, 10, 6, [0, 2, 4, 6, 8, 10]), (0.7, 4.1, 4, [1, 2, 3, 4]), (1.05, 2.7, 5, [1.5, 2, 2.5]),
  (0, 80, 3, [0, 50]), (5, 5.01, 3, [5, 5.005, 5.01]),
])  # fmt: skip
def test_ticks_are_round_numbers_inside(low, high, most, expected):
  np.testing.assert_allclose(drawing.ticks(low, high, most), expected)


@pytest.mark.parametrize("low, high", [(3.0, 3.0), (1e-9, 1e9), (0.0, 1e-12)])
def test_ticks_of_any_range_are_few(low, high):
  assert len(drawing.ticks(low, high, 5)) <= 5


@pytest.mark.parametrize("size", [(60, 80), (1, 1), (8, 3000), (3000, 8)])
def test_a_bar_runs_from_the_first_color_below_to_the_last_above(size):
  bar = drawing.color_bar(1.0, 4.0, colormaps.DEPTH, size)
  assert bar.shape[0] == size[0] and bar.dtype == np.uint8
  if size[0] >= 60:
    strip = bar[:, round(8 * drawing.text_scale(size)) + 2]
    inside = strip[(strip < 255).any(-1)]
    ends = colormaps.paint(np.array([4.0, 1.0]), 1.0, 4.0, colormaps.DEPTH)
    np.testing.assert_array_equal(inside[[0, -1]], ends)
    assert (bar[:, -20:] < 100).any()  # the numbers


def test_the_bar_of_a_small_image_has_several_numbers():
  bar = drawing.color_bar(0.5, 9.3, colormaps.DEPTH, (128, 128))
  dark_lines = (bar == 0).all(-1).sum(axis=0)
  assert 4 in dark_lines  # 2, 4, 6 and 8 m


def test_contours_lie_where_a_multiple_is_passed_and_not_beside_what_is_not_known():
  values = np.broadcast_to(np.linspace(0.55, 3.45, 80), (60, 80)).copy()
  values[:, 30:32] = np.nan
  values[:10] = 0
  dark = (drawing.contours(GRAY, values, 1.0) == 40).all(-1)
  columns = np.flatnonzero(dark.any(0))
  passed = [np.argmax(values[20] >= whole) for whole in (1, 2, 3)]
  assert len(columns) >= 3 and all(min(abs(columns - x)) <= 1 for x in passed)
  assert all(min(abs(np.array(passed) - x)) <= 1 for x in columns)
  assert not dark[:10].any() and not dark[:, 29:33].any()
  np.testing.assert_array_equal(drawing.contours(GRAY, np.full((60, 80), 2.5), 1.0), GRAY)


def test_names_are_written_inside_their_regions_and_nowhere_else():
  label = np.full((120, 200), 255, np.int64)
  label[:, :100], label[10:110, 100:] = 0, 1
  label[112:114, 150:153] = 2  # too small
  picture = np.full((120, 200, 3), 128, np.uint8)
  named = drawing.names(picture, label, ("wall", "bed", "lamp"))
  written = (named != 128).any(-1)
  assert written[:, :100].any() and written[10:110, 100:].any()
  rows, columns = np.nonzero(written[:, 100:])
  assert 30 < rows.mean() < 90 and 25 < columns.mean() < 75 and not written[110:].any()
  assert (picture == 128).all()
  np.testing.assert_array_equal(drawing.names(picture, np.full_like(label, 255), ("wall",)), picture)


def test_names_do_not_overlap():
  label = np.repeat([[0, 1]], (110, 90), axis=1).repeat(100, axis=0)
  written = lambda *names: (drawing.names(np.full((100, 200, 3), 128, np.uint8), label, names) != 128).any(-1).sum()
  long = ("a name of some length", "another long name")
  assert written(*long) == written(long[0], "") > 0  # there is room for one of them
  assert written("wall", "bed") > written("wall", "") > 0


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (2500, 1400)])
def test_pictures_of_any_size_are_named(size):
  label = np.zeros(size, np.uint8)
  assert drawing.names(np.zeros((*size, 3), np.uint8), label, ("wall",)).shape == (*size, 3)
