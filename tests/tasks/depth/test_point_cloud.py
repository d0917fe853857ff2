"""Point clouds: the geometry of a few pixels by hand, and what a file holds."""

import numpy as np

from vpd_jax.tasks.depth import point_cloud


def read(path):
  """Header lines and vertices of a binary PLY file."""
  header, _, body = path.read_bytes().partition(b"end_header\n")
  lines = header.decode("ascii").splitlines()
  kinds = {"float": "<f4", "uchar": "u1"}
  fields = [(line.split()[2], kinds[line.split()[1]]) for line in lines if line.startswith("property ")]
  return lines, np.frombuffer(body, np.dtype(fields))


def test_points_by_hand():
  # Focal length 2: the middles of 4 columns are 1.5, 0.5, 0.5 and 1.5 pixels off the axis, of 2 rows 0.5.
  found = point_cloud.points(np.asarray([[4.0, 4, 4, 4], [2, 2, 2, 8]]), 2.0)
  np.testing.assert_array_equal(found[0], [[-3, -1, 4], [-1, -1, 4], [1, -1, 4], [3, -1, 4]])
  np.testing.assert_array_equal(found[1], [[-1.5, 0.5, 2], [-0.5, 0.5, 2], [0.5, 0.5, 2], [6, 2, 8]])


def test_a_file_holds_the_points_and_colors_of_known_pixels(tmp_path):
  depth = np.asarray([[np.nan, 4], [2, np.inf], [0, 8]], np.float32)
  image = np.arange(18, dtype=np.uint8).reshape(3, 2, 3)
  path = point_cloud.write_ply(tmp_path / "a.ply", depth, image, 2.0, ["focal length 2 pixels"])
  lines, vertices = read(path)
  assert lines == [
    "ply",
    "format binary_little_endian 1.0",
    "comment x right, y down, z forward from the camera, meters; principal point in the middle of the picture",
    "comment focal length 2 pixels",
    "element vertex 3",
    *(f"property float {axis}" for axis in "xyz"),
    *(f"property uchar {color}" for color in ("red", "green", "blue")),
  ]
  # Rows are 1 pixel above, on and 1 pixel below the axis, columns half a pixel beside it.
  expected = [(1, -2, 4, 3, 4, 5), (-0.5, 0, 2, 6, 7, 8), (2, 4, 8, 15, 16, 17)]
  assert [tuple(vertex) for vertex in vertices.tolist()] == expected
