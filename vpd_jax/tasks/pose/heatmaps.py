"""Heatmaps of keypoints on the device: targets, flipped maps, subpixel decoding, conversion to image coordinates.

Heatmaps are float [B, h, w, K]; positions are (x, y). UDP measures sizes from the center of the first pixel to the
center of the last one; the classic convention counts pixels.

Source: mmpose 0.x core/evaluation/top_down_eval.py keypoints_from_heatmaps, datasets/pipelines/top_down_transform.py
TopDownGenerateTarget; Huang et al. 2020, https://arxiv.org/abs/1911.07524 (UDP); Zhang et al. 2020,
https://arxiv.org/abs/1910.06278 (DARK).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from vpd_jax.types import Array

LOWEST, HIGHEST = 0.001, 50.0  # range to which a blurred heatmap is clipped before the logarithm


def targets(
  keypoints: Array, crop: Sequence[int], size: Sequence[int], *, sigma: int = 2, udp: bool = True
) -> tuple[Array, Array]:
  """Heatmaps with a Gaussian of height 1 at each keypoint, truncated 3 sigma from the nearest pixel.

  Args:
    keypoints: float32 or wider [B, K, 3]: x and y in pixels of the crop, and 1 where labeled, else 0.
    crop: (H, W).
    size: (h, w) of the heatmaps.
    sigma: in pixels of the heatmap.
    udp: the center is not rounded; False rounds it (MSRA).

  Returns:
    float [B, h, w, K], 0 for keypoints without a label; and weights float [B, K]: 1 if labeled, but 0 if the square
    around the center is completely outside.
  """
  dtype = jnp.promote_types(keypoints.dtype, jnp.float32)
  labeled = keypoints[..., 2].astype(dtype)  # [B, K]
  inside, profiles = labeled > 0.5, []
  for axis, side, cells in ((1, crop[0], size[0]), (0, crop[1], size[1])):
    stride = (side - 1) / (cells - 1) if udp else side / cells
    place = keypoints[..., axis].astype(dtype) / stride
    nearest = jnp.trunc(place + 0.5)
    inside &= (nearest - 3 * sigma < cells) & (nearest + 3 * sigma + 1 >= 0)
    center = (place if udp else nearest)[:, None]  # [B, 1, K]
    cell = jnp.arange(cells, dtype=dtype)[None, :, None]  # [1, h, 1]
    near = jnp.abs(cell - nearest[:, None]) <= 3 * sigma
    profiles.append(jnp.where(near, jnp.exp(-((cell - center) ** 2) / (2 * sigma**2)), 0))  # [B, h, K]
  weights = jnp.where(inside, labeled, 0)
  heatmaps = profiles[0][:, :, None] * profiles[1][:, None]  # [B, h, w, K]
  return jnp.where(inside[:, None, None], heatmaps, 0), weights


def mirrored(heatmaps: Array, pairs: tuple[tuple[int, int], ...], *, shift: bool = False) -> Array:
  """Flips the heatmaps of a flipped crop back, and swaps left and right keypoints.

  Args:
    heatmaps: float [B, h, w, K].
    pairs: indices that a flip swaps.
    shift: moves the result right by one pixel, repeating the first column, to align it in the classic convention.
  """
  order = np.arange(heatmaps.shape[-1])
  for left, right in pairs:
    order[[left, right]] = right, left
  back = heatmaps[:, :, ::-1][..., order]
  return jnp.concatenate([back[:, :, :1], back[:, :, :-1]], axis=2) if shift else back


def maxima(heatmaps: Array) -> tuple[Array, Array]:
  """The maximum of each heatmap: its position int32 [B, K, 2] (x, y), and its value [B, K]."""
  batch, height, width, count = heatmaps.shape
  flat = heatmaps.reshape(batch, height * width, count)
  index = jnp.argmax(flat, axis=1).astype(jnp.int32)  # [B, K], the first of equals
  return jnp.stack([index % width, index // width], axis=-1), flat.max(axis=1)


def blur_matrix(length: int, kernel: int) -> np.ndarray:
  """Gaussian blur of one axis as a matrix float64 [length, length], with reflected borders (not repeating the edge).

  The standard deviation is that of OpenCV for this number of taps: 2 for 11.

  Source: OpenCV imgproc getGaussianKernel, BORDER_REFLECT_101.
  """
  sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
  half = kernel // 2
  taps = np.exp(-((np.arange(kernel) - half) ** 2) / (2 * sigma**2))
  columns = np.pad(np.arange(length), half, mode="reflect")
  matrix = np.zeros((length, length))
  for i, tap in enumerate(taps / taps.sum()):
    np.add.at(matrix, (np.arange(length), columns[i : i + length]), tap)
  return matrix


def blurred(heatmaps: Array, kernel: int) -> Array:
  """Blurs each heatmap with a Gaussian of `kernel` x `kernel` taps."""
  rows, columns = (jnp.asarray(blur_matrix(side, kernel), heatmaps.dtype) for side in heatmaps.shape[1:3])
  return jnp.einsum("ih,bhwk,jw->bijk", rows, heatmaps, columns, precision="highest")


def decode(heatmaps: Array, *, udp: bool = True, kernel: int = 11) -> tuple[Array, Array]:
  """Subpixel positions of the keypoints, and their scores.

  Args:
    heatmaps: float [B, h, w, K].
    udp: one Newton step p - (H + eps I)^-1 g from the maximum p on the logarithm of the blurred heatmap, with gradient
      and Hessian by central differences and the border repeated by one pixel; False: a quarter of a pixel towards the
      higher neighbor in each axis, unless p is one of the first two pixels or the last pixel of either axis.
    kernel: taps of the blur, odd. Release: 11 at sigma 2, 17 at sigma 3.

  Returns:
    float32 or wider [B, K, 2], x and y in pixels of the heatmap, -1 if the maximum is not positive; and the maximum,
    [B, K]. A heatmap with a value that is not finite has its keypoint at -1, with score 0.
  """
  heatmaps = heatmaps.astype(jnp.promote_types(heatmaps.dtype, jnp.float32))
  is_finite = jnp.isfinite(heatmaps).all(axis=(1, 2))  # [B, K]
  heatmaps = jnp.where(is_finite[:, None, None], heatmaps, 0)
  position, score = maxima(heatmaps)
  step = _newton(heatmaps, position, kernel) if udp else _quarter(heatmaps, position)
  step = jnp.where(jnp.isfinite(step), step, 0)
  return jnp.where((score > 0)[..., None], position.astype(heatmaps.dtype) + step, -1), score


def _at(maps: Array, x: Array, y: Array) -> Array:
  """Values [B, K] of maps [B, h, w, K] at int x, y [B, K]."""
  batch, height, width, count = maps.shape
  flat = maps.reshape(batch, height * width, count)
  return jnp.take_along_axis(flat, (y * width + x)[:, None], axis=1)[:, 0]


def _newton(heatmaps: Array, position: Array, kernel: int) -> Array:
  """The Newton step of `decode`, [B, K, 2]."""
  logs = jnp.log(jnp.clip(blurred(heatmaps, kernel), LOWEST, HIGHEST))
  logs = jnp.pad(logs, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
  x, y = position[..., 0] + 1, position[..., 1] + 1
  neighbors = {(i, j): _at(logs, x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i * j >= 0}
  center, left, right, above, below = (neighbors[k] for k in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)))
  dx, dy = (right - left) / 2, (below - above) / 2
  epsilon = float(np.finfo(np.float32).eps)  # also for float64, as in the release
  dxx, dyy = right - 2 * center + left + epsilon, below - 2 * center + above + epsilon
  dxy = (neighbors[1, 1] - right - below + 2 * center - left - above + neighbors[-1, -1]) / 2
  determinant = dxx * dyy - dxy**2
  safe = jnp.where(determinant == 0, 1, determinant)
  step = jnp.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], axis=-1) / safe[..., None]
  return jnp.where((determinant == 0)[..., None], 0, step)


def _quarter(heatmaps: Array, position: Array) -> Array:
  """The quarter step of `decode`, [B, K, 2]."""
  height, width = heatmaps.shape[1:3]
  x, y = position[..., 0], position[..., 1]
  inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
  cx, cy = jnp.clip(x, 1, max(width - 2, 1)), jnp.clip(y, 1, max(height - 2, 1))  # clipped reads are masked below
  across = _at(heatmaps, cx + 1, y) - _at(heatmaps, cx - 1, y)
  down = _at(heatmaps, x, cy + 1) - _at(heatmaps, x, cy - 1)
  return jnp.where(inside[..., None], jnp.sign(jnp.stack([across, down], axis=-1)) / 4, 0)


def to_picture(positions: Array, center: Array, extent: Array, size: Sequence[int], *, udp: bool = True) -> Array:
  """Converts positions in a heatmap to positions in the image.

  Args:
    positions: float [B, K, 2], (x, y) in pixels of the heatmap.
    center, extent: float [B, 2] of the crops, in pixels of the image; they were not rotated.
    size: (h, w) of the heatmap.
    udp: see the module docstring.

  Returns:
    float [B, K, 2].
  """
  cells = np.array(size[::-1], np.float32) - (1 if udp else 0)
  factor = (extent / jnp.asarray(cells, extent.dtype)[None])[:, None]
  return positions * factor.astype(positions.dtype) + (center - extent / 2)[:, None].astype(positions.dtype)
