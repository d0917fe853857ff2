"""Positions of windows and tiles in an image, and sums of scores over tiles; see inference/sliding_window.py."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.inference import blending
from vpd_jax.types import Array

TILE = 256  # side in pixels of the tiles of scores on the device
CANVAS = 128
SQUARES = 16
OUTSIDE_LABEL = 255  # label of a canvas outside the image, which is not scored
# Windows of "few_shapes": quarters of the window's side along rows and columns.
QUARTERS = ((4, 4), (3, 4), (4, 3), (2, 4), (4, 2), (1, 4), (4, 1), (3, 3), (2, 2))
MULTIPLE = 64  # the UNet's coarsest stride


def scaled_size(size: tuple[int, int], scale: tuple[int, int] | None, ratio: float) -> tuple[int, int]:
  """(H, W) of an image whose sides fit into `ratio` times the scale, or are `ratio` times as long where it is None."""
  if scale is None:
    factor = ratio
  else:
    long, short = (int(side * ratio) for side in (max(scale), min(scale)))
    factor = min(long / max(size), short / min(size))
  height, width = (max(1, int(side * factor + 0.5)) for side in size)
  return height, width


def few_shapes(window: int) -> list[tuple[int, int]]:
  """Windows of `eval.small_images="few_shapes"`, at most nine: sides are quarters of the window, multiples of 64."""
  side = lambda n: window if n == 4 else max(n * window // 4 // MULTIPLE * MULTIPLE, min(MULTIPLE, window))
  return list(dict.fromkeys((side(rows), side(columns)) for rows, columns in QUARTERS))


def window_of(size: tuple[int, int], window: int, small: str) -> tuple[int, int]:
  """(H, W) of the windows of a view of this size, see `SlidingWindowInference`; a view whose side is shorter is padded.

  Of "few_shapes", the one with the smallest share of padding, and of several the largest.
  """
  if not window:
    return size
  if small == "whole":
    return min(window, size[0]), min(window, size[1])
  if small == "padded" or min(size) >= window:
    return window, window
  area = lambda shape: shape[0] * shape[1]
  covered = lambda shape: area([min(pair) for pair in zip(shape, size, strict=True)])
  return max(few_shapes(window), key=lambda shape: (covered(shape) / area(shape), area(shape)))


def corners(
  size: Sequence[int], window: int | Sequence[int], stride: int | Sequence[int]
) -> tuple[list[int], list[int], tuple[int, ...]]:
  """First rows and first columns of the windows, and their size, which is at most that of the image.

  The last windows are shifted back inside the image. A side shorter than the window has one window of its own length.

  Args:
    size: (H, W).
    window, stride: of both axes, or of rows and of columns; a window of 0 is the whole image.
  """
  if not window:
    return [0], [0], tuple(size)
  windows, strides = ((value, value) if isinstance(value, int) else value for value in (window, stride))
  starts: list[list[int]] = []
  for side, length, step in zip(size, windows, strides, strict=True):
    count = max(side - length + step - 1, 0) // step + 1
    starts.append([max(min(i * step + length, side) - length, 0) for i in range(count)])
  rows, columns = starts
  return rows, columns, tuple(min(pair) for pair in zip(windows, size, strict=True))


def canvas(size: Sequence[int]) -> tuple[int, int]:
  """(H, W) of the canvas of an image of this size: multiples of CANVAS."""
  height, width = (-(-side // CANVAS) * CANVAS for side in size)
  return height, width


def on_canvas(image: np.ndarray, value: float) -> np.ndarray:
  """[H, W, ...] padded at right and bottom to its canvas."""
  padded = np.full((*canvas(image.shape[:2]), *image.shape[2:]), value, image.dtype)
  padded[: image.shape[0], : image.shape[1]] = image
  return padded


def squares(image: np.ndarray, value: float) -> np.ndarray:
  """[H, W] cut into [n, CANVAS, CANVAS], padded with `value`; n is a multiple of SQUARES."""
  padded = on_canvas(image, value)
  parts = padded.reshape(padded.shape[0] // CANVAS, CANVAS, -1, CANVAS).swapaxes(1, 2).reshape(-1, CANVAS, CANVAS)
  return np.pad(parts, ((0, -len(parts) % SQUARES), (0, 0), (0, 0)), constant_values=value)


def bilinear_indices(old: int, new: int, *, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Bilinear resizing of one axis, align_corners=False: indices of both neighbors, and the weight of the second.

  Args:
    old, new: true sizes.
    mirrored: flips the result.
  """
  position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
  low = np.floor(position).astype(np.int32)
  high, weight = np.minimum(low + 1, old - 1), (position - low).astype(np.float32)
  return (low[::-1], high[::-1], weight[::-1]) if mirrored else (low, high, weight)


def tile_indices(
  low: np.ndarray, high: np.ndarray, share: np.ndarray, over: np.ndarray, begin: int, step: int
) -> tuple[int, tuple[np.ndarray, ...]]:
  """The source of a tile of the result along one axis: the index of the first of two tiles, and `fold`'s steps in them.

  Args:
    low, high, share: of `bilinear_indices`.
    over: of `blending.overlap_weights`.
    begin, step: first position of the tile, and its length, at most TILE.
  """
  part = slice(begin, begin + step)
  tile = int(low[part].min()) // TILE
  pad = lambda values: np.pad(values, (0, TILE - len(values)), mode="edge")
  positions = pad(low[part] - tile * TILE), pad(high[part] - tile * TILE), pad(share[part])
  weights = over[tile * TILE : (tile + 2) * TILE]
  return tile, (*positions, np.pad(weights, (0, 2 * TILE - len(weights)), constant_values=1))


def add(tile: Array, scores: Array, where: Array, *, smooth: bool = False) -> Array:
  """A tile of a view plus the part of window i that lies in it.

  Args:
    tile: float [TILE, TILE, K], the sum so far.
    scores: float [n, h, w, K].
    where: int32: i; of the tile in the window, the first row and column; rows and columns of the window; 1 for the
      first window of this tile, which overwrites it.
    smooth: see `blending.overlap_weights`.
  """
  i, top, left, height, width, first = where
  rows, columns = (begin + jnp.arange(TILE) for begin in (top, left))
  window = jax.lax.dynamic_index_in_dim(scores, i, keepdims=False).astype(tile.dtype)
  part = window.take(jnp.clip(rows, 0, height - 1), 0).take(jnp.clip(columns, 0, width - 1), 1)
  inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
  if smooth:
    fade = blending.smooth_profile(rows, height)[:, None] * blending.smooth_profile(columns, width)[None, :]
    part = part * fade[..., None].astype(part.dtype)
  return jnp.where(first > 0, 0, tile) + jnp.where(inside[..., None], part, 0)


def _lerp(x: Array, low: Array, high: Array, share: Array, axis: int) -> Array:
  share = jnp.expand_dims(share, [a for a in range(3) if a != axis]).astype(x.dtype)
  return x.take(low, axis) * (1 - share) + x.take(high, axis) * share


def fold(
  total: Array,
  tiles: list[Array],
  steps: Array,
  flags: Array,
  weight: Array,
  softmax: bool,
  postprocess: Callable[[Array], Array],
):
  """A tile of the sum over views with one view added, and its result if that view was the last one.

  Args:
    total: float [TILE, TILE, K], the sum so far.
    tiles: four tiles of the view: upper left, upper right, lower left, lower right.
    steps: for rows and for columns, of the four tiles joined: `bilinear_indices` [TILE] and
      `blending.overlap_weights` [2 TILE].
    flags: bool: whether this is the first view, which overwrites the sum; whether it is the last one.
    weight: of the view.
    softmax, postprocess: see `SlidingWindowInference`.
  """
  block = jnp.concatenate([jnp.concatenate(tiles[:2], axis=1), jnp.concatenate(tiles[2:], axis=1)])  # [2 T, 2 T, K]
  (*rows, over_rows), (*columns, over_columns) = steps
  block = block * over_rows[:, None, None] * over_columns[None, :, None]
  resized = _lerp(_lerp(block, *rows, axis=0), *columns, axis=1)  # [T, T, K]
  view = weight * (jax.nn.softmax(resized, axis=-1) if softmax else resized)
  total = jnp.where(flags[0], 0, total) + view
  result = jax.eval_shape(postprocess, total)
  return total, jax.lax.cond(flags[1], postprocess, lambda _: jnp.zeros(result.shape, result.dtype), total)
