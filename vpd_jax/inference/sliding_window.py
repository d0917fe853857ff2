"""Semantic segmentation of images of any size: sliding windows, several scales and flips, as in mmsegmentation.

The result of an image is a sum over its views (one scale, plain or flipped). A view is cut into windows, and windows of
several images are collected until `batch_size` of them fill one call of the network, so that every call has the same
shape and runs the same program. Scores are added to the view at the positions of their windows, divided by the number
of overlapping windows (or by the sum of their weights, see `smooth`), resized to the image, converted to probabilities,
flipped back and summed over the views. Last, `postprocess` computes the result from the sum.

Sums are stored on the device in tiles of TILE x TILE pixels, of the views or of the result, whichever is smaller, so
that the probabilities of a large image never exist all at once. Images of all sizes share the same programs, because
the positions of tiles are passed as numbers.

Source: mmsegmentation 0.30 models/segmentors/encoder_decoder.py slide_inference, inference, aug_test; mmcv 1.7
image/geometric.py imrescale.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import UserError, check_choice
from vpd_jax.inference import blending, tiles
from vpd_jax.inference.tiles import TILE, bilinear_indices, corners, scaled_size, window_of
from vpd_jax.types import Array, Example, Fields, Weights

SMALL_IMAGE_MODES = ("whole", "padded", "few_shapes")
Predict = Callable[[Weights, dict[str, Array]], Array]  # (weights, batch of n windows) to scores [n, h, w, K]


class SlidingWindowOptions(NamedTuple):
  """The parsed `eval.test_time`.

  Attributes:
    window, stride: of the sliding window in pixels; 0: one window for the whole image.
    scale: (long, short) side within which an image is resized, with its aspect ratio; None: not resized.
    ratios: factors of the scale, one view each.
    flip: also every view flipped.
  """

  window: int = 0
  stride: int = 0
  scale: tuple[int, int] | None = None
  ratios: tuple[float, ...] = (1.0,)
  flip: bool = False


class Views(NamedTuple):
  """One image at all of its scales.

  Attributes:
    images: uint8, or float in [0, 1], [h, w, 3] each.
    size: (H, W) of the result.
    extras: other arrays that the method reads for this image, without a batch axis.
  """

  images: list[np.ndarray]
  size: tuple[int, int]
  extras: Example


def parse(words: tuple[str, ...]) -> SlidingWindowOptions:
  """Parses `eval.test_time`, such as ("resize:2048:512", "slide:512:341", "ms:0.75:1:1.25", "flip"), in any order.

  Raises:
    ValueError: an unknown or repeated word, or invalid numbers.
  """
  options: Fields = {}
  for word in words:
    name, *numbers = word.split(":")
    try:
      values = [float(n) for n in numbers] if name == "ms" else [int(n) for n in numbers]
    except ValueError:
      values = [0]
    fits = {"flip": not numbers, "ms": len(values) > 0, "slide": len(values) == 2, "resize": len(values) == 2}
    if (
      not fits.get(name)
      or any(v <= 0 for v in values)
      or name in options
      or (name == "slide" and values[1] > values[0])
    ):
      raise UserError(
        f"eval.test_time has {word!r}; known are 'flip', 'slide:WINDOW:STRIDE' with the stride at most the window, "
        "'resize:LONG:SHORT' and 'ms:RATIO:RATIO..', each once, all numbers above 0."
      )
    options[name] = tuple(values)
  window, stride = options.get("slide", (0, 0))
  return SlidingWindowOptions(window, stride, options.get("resize"), options.get("ms", (1.0,)), "flip" in options)


class _View:
  """One scale of one image, plain or flipped, while its windows are being computed."""

  def __init__(
    self, parent: "_Image", image: np.ndarray, mirrored: bool, options: SlidingWindowOptions, small: str, smooth: bool
  ):
    self.parent, self.mirrored, self.size, self.smooth = parent, mirrored, image.shape[:2], smooth
    self.image: np.ndarray | None = image[:, ::-1] if mirrored else image
    self.window = window_of(self.size, options.window, small)
    self._grown = tuple(max(pair) for pair in zip(self.size, self.window, strict=True))
    # The stride of a shorter window is shorter by the same factor.
    strides = tuple(max(options.stride * side // max(options.window, 1), 1) for side in self.window)
    self.rows, self.columns, _ = corners(self._grown, self.window if options.window else 0, strides)
    self.left = len(self.rows) * len(self.columns)
    self.tiles: dict[tuple[int, int], Array] = {}  # sums of scores by (row, column) of the tile

  def windows(self) -> Iterator[tuple[np.ndarray, int, int]]:
    """Pixels, float32 in [0, 1], and (y, x) of the upper left corner of each window."""
    image = cast(np.ndarray, self.image)
    height, width = self.window
    for y in self.rows:
      for x in self.columns:
        part = image[y : y + height, x : x + width]
        part = part.astype(np.float32) / 255 if part.dtype == np.uint8 else part.astype(np.float32)
        missing = [(0, full - side) for full, side in zip(self.window, part.shape, strict=False)]
        # Mid gray, zero after scaling to [-1, 1].
        yield np.pad(part, (*missing, (0, 0)), constant_values=0.5) if max(missing)[1] else part, y, x

  def axes(self) -> list[tuple[np.ndarray, ...]]:
    """For rows and for columns: `bilinear_indices` from the view to the image, and `overlap_weights` of the view."""
    sides = zip(self.size, self.parent.size, (False, self.mirrored), strict=True)
    reads = [bilinear_indices(old, new, mirrored=mirrored) for old, new, mirrored in sides]
    starts = zip((self.rows, self.columns), self.window, self._grown, strict=True)
    return [
      (*read, blending.overlap_weights(*start, smooth=self.smooth)) for read, start in zip(reads, starts, strict=True)
    ]


class _Image:
  """The pending views of one image.

  Attributes:
    joint: the views are smaller than the result: they wait for each other, and are added together tile by tile.
    ready: views whose windows are all computed, but which are not added yet.
    sums: tiles of the sum over the views, by corner.
    result: of `postprocess`; None before its first tile.
  """

  def __init__(self, views: Views, options: SlidingWindowOptions, small: str, smooth: bool):
    height, width = views.size
    self.size, self.extras = (height, width), views.extras
    mirrors = (False, True) if options.flip else (False,)
    self.views = [_View(self, image, m, options, small, smooth) for image in views.images for m in mirrors]
    self.count = self.left = len(self.views)
    needed = lambda size: -(-size[0] // TILE) * -(-size[1] // TILE)
    self.joint = self.count == 1 or sum(needed(view.size) for view in self.views) < needed(self.size)
    self.ready: list[_View] = []
    self.sums: dict[tuple[int, int], Array] = {}
    self.result: np.ndarray | None = None
    # A tile of the result reads at most TILE + 1 rows and columns of each view.
    factors = [max(view.size[axis] for view in self.views) / side for axis, side in enumerate(self.size)]
    self.steps = [min(TILE, int((TILE - 1) / factor) + 1) for factor in factors]

  def corners(self) -> Iterator[tuple[int, int]]:
    """Upper left corners of the tiles of the result."""
    rows, columns = (range(0, side, step) for side, step in zip(self.size, self.steps, strict=True))
    return itertools.product(rows, columns)

  def put(self, result: np.ndarray, corner: tuple[int, int]) -> None:
    """Writes a tile into the result."""
    if self.result is None:
      self.result = np.empty((*self.size, *result.shape[2:]), result.dtype)
    target = self.result[corner[0] :, corner[1] :][: self.steps[0], : self.steps[1]]
    target[:] = result[: target.shape[0], : target.shape[1]]

  def pop_result(self) -> np.ndarray:
    """Returns the result and drops all references to it; image and views form a reference cycle."""
    result, self.result, self.views = cast(np.ndarray, self.result), None, []
    return result


@jax.jit
def most_probable(scores: Array) -> Array:
  """[H, W, K] to the class of the highest score, int32 [H, W]."""
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


@jax.jit
def finite_label(scores: Array) -> Array:
  """As `most_probable`, but K, which is not a class, where a score is NaN or infinite."""
  return jnp.where(jnp.isfinite(scores).all(axis=-1), most_probable(scores), scores.shape[-1])


class SlidingWindowInference:
  """Labels, probabilities or scores of a stream of images.

  Attributes:
    shapes: (H, W) of the windows the network has been called with; each is a program of its own.
  """

  def __init__(
    self,
    predict: Predict,
    options: SlidingWindowOptions,
    *,
    batch_size: int = 8,
    small_images: str = "whole",
    smooth: bool = False,
    softmax: bool = True,
    postprocess: Callable[[Array], Array] = lambda scores: scores,
    place: Callable[[np.ndarray], Array] = jax.device_put,
    gathered: jax.sharding.Sharding | None = None,
  ):
    """
    Args:
      predict: (weights, {"image": float [n, h, w, 3] in [0, 1], ..}) to scores [n, h, w, K] at the size of the windows.
      options: of `parse`.
      batch_size: n, the number of windows per call.
      small_images: what happens where a side of the image is shorter than the window. "whole", as released, shortens
        the window, which compiles another program; "few_shapes" chooses among at most nine shapes the largest that fits
        into the view, and covers it; "padded" pads with mid gray at right and bottom, so that all windows have one
        size. The last two give other scores than "whole" there.
      smooth: overlapping windows are weighed by `blending.smooth_profile`, so that no seam shows; False averages
        them, as published.
      softmax: sums probabilities; False sums scores.
      postprocess: sum of scores [.., K] to the result of each pixel, such as `most_probable`; traced.
      place: transfers an array [n, ...] to the devices.
      gathered: sharding of the scores of a call; None leaves them where they are computed.

    Raises:
      ValueError: unknown `small_images`, or a batch size below 1.
    """
    check_choice("eval.small_images", small_images, SMALL_IMAGE_MODES)
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size} must be at least 1.")
    self.options, self.batch_size, self.small_images, self.place = options, batch_size, small_images, place
    self.smooth = smooth
    self.shapes, self._unused = set(), []  # the latter: tiles to reuse

    def full(weights: Weights, batch: dict[str, Array]) -> Array:
      # Padded to the full window, so that all programs after the network are shared.
      scores = predict(weights, batch)
      missing = [(0, max(options.window - side, 0)) for side in scores.shape[1:3]]
      return jnp.pad(scores, ((0, 0), *missing, (0, 0)))

    jit_options: Fields = {} if gathered is None else {"out_shardings": gathered}
    self._predict = jax.jit(full, **jit_options)
    self._add = jax.jit(functools.partial(tiles.add, smooth=smooth), donate_argnums=0)
    fold = lambda total, four, steps, flags, weight: tiles.fold(total, four, steps, flags, weight, softmax, postprocess)
    self._fold = jax.jit(fold, donate_argnums=0)

  def views(self, example: Example) -> Views:
    """Resizes "image", uint8 or float [H, W, 3], to every ratio; all other entries are passed to the method."""
    image = example["image"]
    images = []
    for ratio in self.options.ratios:
      size = scaled_size(image.shape[:2], self.options.scale, ratio)
      images.append(image if size == image.shape[:2] else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR))
    return Views(images, image.shape[:2], {name: x for name, x in example.items() if name != "image"})

  def __call__(self, weights: Weights, images: Iterable[Views]) -> Iterator[np.ndarray]:
    """Yields the result of every image in order: [H, W, ...] of `postprocess`, else float32 [H, W, K].

    Images are read from the iterable as needed; at most `batch_size` are pending.
    """
    try:
      yield from self._results(weights, images)
    finally:
      self._unused.clear()

  def _results(self, weights: Weights, images: Iterable[Views]) -> Iterator[np.ndarray]:
    queues = collections.defaultdict(collections.deque)  # (view, pixels, y, x) by size of the window
    pending: collections.deque[_Image] = collections.deque()
    for views in images:
      image = _Image(views, self.options, self.small_images, self.smooth)
      pending.append(image)
      for view in image.views:
        queue = queues[view.window]
        for window in view.windows():
          queue.append((view, *window))
          if len(queue) == self.batch_size:
            self._run(weights, queue)
      if len(pending) >= self.batch_size:  # or images of a rare size would wait until the end
        self._complete(weights, pending[0], queues)
      while pending and not pending[0].left:
        yield pending.popleft().pop_result()
    while pending:
      self._complete(weights, pending[0], queues)
      yield pending.popleft().pop_result()

  def _complete(self, weights: Weights, image: _Image, queues: dict[tuple, collections.deque]) -> None:
    """Computes the remaining windows of an image, even if they do not fill a call."""
    for view in image.views:
      while view.left:
        self._run(weights, queues[view.window])

  def _run(self, weights: Weights, queue: collections.deque) -> None:
    """One call of the network on the first windows of a queue, padded by repeating the last one."""
    chosen = [queue.popleft() for _ in range(min(self.batch_size, len(queue)))]
    filled = chosen + chosen[-1:] * (self.batch_size - len(chosen))
    batch = {"image": self.place(np.stack([pixels for _, pixels, _, _ in filled]))}
    for name in chosen[0][0].parent.extras:
      batch[name] = self.place(np.stack([view.parent.extras[name] for view, _, _, _ in filled]))
    self.shapes.add(filled[0][0].window)
    scores = self._predict(weights, batch)
    for i, (view, _, y, x) in enumerate(chosen):
      self._add_window(view, scores, i, y, x)
      view.left -= 1
      if not view.left:
        self._finish(view)

  def _add_window(self, view: _View, scores: Array, i: int, y: int, x: int) -> None:
    """Adds the scores of window i, whose corner is (y, x), to the tiles of the view."""
    height, width = view.window
    for row in range(y // TILE, (y + height - 1) // TILE + 1):
      for column in range(x // TILE, (x + width - 1) // TILE + 1):
        first = (row, column) not in view.tiles
        tile = self._tile(scores) if first else view.tiles.pop((row, column))
        offsets = [i, row * TILE - y, column * TILE - x, height, width, first]
        view.tiles[row, column] = self._add(tile, scores, np.array(offsets, np.int32))

  def _tile(self, like: Array) -> Array:
    """A tile of the same number of classes, with arbitrary contents."""
    if self._unused:
      return self._unused.pop()
    shape, dtype = (TILE, TILE, like.shape[-1]), jnp.promote_types(like, jnp.float32)
    return jax.device_put(np.zeros(shape, dtype), like.sharding)

  def _finish(self, view: _View) -> None:
    """Adds a view whose windows are all computed to its image, or defers it until the other views are ready."""
    image = view.parent
    view.image = None
    image.left -= 1
    image.ready.append(view)
    if image.left and image.joint:
      return
    ready, image.ready = image.ready, []
    axes = [view.axes() for view in ready]
    for corner in image.corners():
      for i, (view, reads) in enumerate(zip(ready, axes, strict=True)):
        self._add_tile(view, corner, reads, last=not image.left and i == len(ready) - 1)
    for view in ready:
      self._unused += view.tiles.values()
      view.tiles = {}

  def _add_tile(
    self, view: _View, corner: tuple[int, int], reads: Sequence[tuple[np.ndarray, ...]], last: bool
  ) -> None:
    """Adds one view to the tile of the result at `corner`."""
    image, first = view.parent, corner not in view.parent.sums
    parts = zip(reads, corner, image.steps, strict=True)
    (row, rows), (column, columns) = (tiles.tile_indices(*read, begin=begin, step=step) for read, begin, step in parts)
    first_tile = view.tiles[row, column]  # also used for tiles outside the view, which are not read
    four = [view.tiles.get((row + down, column + right), first_tile) for down in (0, 1) for right in (0, 1)]
    total = self._tile(first_tile) if first else image.sums.pop(corner)
    weight = np.dtype(first_tile.dtype).type(1 / image.count)
    total, result = self._fold(total, four, (rows, columns), np.array([first, last]), weight)
    if last:
      self._unused.append(total)
      image.put(np.asarray(result), corner)
    else:
      image.sums[corner] = total
