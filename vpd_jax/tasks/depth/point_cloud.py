"""Converts depth maps to colored point clouds, and writes PLY files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpd_jax.files import atomic

# By whether y is up.
CONVENTION = {
  False: "x right, y down, z forward from the camera, meters; principal point in the middle of the picture",
  True: "x right, y up, z against the camera's direction, meters; principal point in the middle of the picture",
}
VERTEX = np.dtype([(axis, "<f4") for axis in "xyz"] + [(color, "u1") for color in ("red", "green", "blue")])


def points(depth: np.ndarray, focal: float) -> np.ndarray:
  """The 3D point of every pixel of a pinhole camera that looks along z.

  x = (column + 1/2 - W/2) depth / focal, y = (row + 1/2 - H/2) depth / focal, z = depth.

  Args:
    depth: float [H, W], meters along the optical axis, not along the ray.
    focal: focal length, in pixels.

  Returns:
    float64 [H, W, 3]: x to the right, y down, z away from the camera, meters. The camera is at the origin.

  Source: Hartley and Zisserman, Multiple View Geometry, 6.1.
  """
  height, width = depth.shape
  z = depth.astype(np.float64)
  x = (np.arange(width) + 0.5 - width / 2) / focal
  y = (np.arange(height) + 0.5 - height / 2) / focal
  return np.stack([x[None] * z, y[:, None] * z, z], axis=-1)


def write_ply(
  path: Path,
  depth: np.ndarray,
  image: np.ndarray,
  focal: float,
  comments: Sequence[str] = (),
  *,
  y_up: bool = False,
) -> Path:
  """Writes a PLY file, binary little endian: x, y, z as float32 and red, green, blue as uint8 of every pixel.

  Pixels are in order, row by row; those whose depth is not positive and finite are omitted.

  Args:
    path: of the file, which appears only when it is complete.
    depth: float [H, W], meters.
    image: uint8 [H, W, 3], RGB.
    focal: focal length, in pixels.
    comments: lines of ASCII for the header, after that of the convention.
    y_up: rotate the points about the x axis to the axes of OpenGL and glTF, as expected by viewers.
  """
  valid = np.isfinite(depth) & (depth > 0)
  axes = np.array([1, -1, -1] if y_up else [1, 1, 1])
  columns = *(points(np.where(valid, depth, 0), focal)[valid] * axes).T, *image[valid].T
  vertices = np.empty(int(valid.sum()), VERTEX)
  for name, column in zip(VERTEX.names or (), columns, strict=True):
    vertices[name] = column
  header = ["ply", "format binary_little_endian 1.0", *(f"comment {line}" for line in (CONVENTION[y_up], *comments))]
  header += [f"element vertex {len(vertices)}", *(f"property float {axis}" for axis in "xyz")]
  header += [*(f"property uchar {color}" for color in ("red", "green", "blue")), "end_header"]
  return atomic.write(path, "\n".join(header).encode("ascii") + b"\n" + vertices.tobytes())
