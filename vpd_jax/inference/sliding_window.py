"""The class of every pixel of pictures of any size: sliding windows, scales, mirror images, as in mmsegmentation.

Every picture is a sum over its views (a scale, plain or mirrored). A view is cut into windows; windows of all pictures
wait together until `at_once` of them fill one call of the network, which so has one shape and one program. Their scores
are added where they belong in the view, divided by the number of windows there, resized to the size of the picture,
turned into probabilities, mirrored back, and added up; then `decide` makes the result of them.

Scores are kept in tiles of TILE x TILE pixels, on the device, of the views or of the result, whichever is smaller: a
large picture never has all of its probabilities at once. All sizes share programs: where a tile lies, numbers say.

Source: mmsegmentation 0.30 models/segmentors/encoder_decoder.py slide_inference, inference, aug_test; mmcv 1.7
image/geometric.py imrescale.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import UserError
from vpd_jax.inference import tiles
from vpd_jax.inference.tiles import TILE, corners, scaled_size, taps, window_of
from vpd_jax.types import Array, Example

SMALL = ("whole", "padded", "few_shapes")
Predict = Callable[[Any, dict[str, Array]], Array]  # weights and batch of n windows to scores [n, h, w, K]


class Procedure(NamedTuple):
  """What the words of `eval.test_time` ask for.

  Attributes:
    window, stride: of the sliding window in pixels; 0: the picture as a whole.
    scale: (longest, shortest) sides into which a picture is resized, its aspect kept; None: as it is.
    ratios: factors on the scale, one view each.
    flip: each view mirrored too.
  """

  window: int = 0
  stride: int = 0
  scale: tuple[int, int] | None = None
  ratios: tuple[float, ...] = (1.0,)
  flip: bool = False


class Views(NamedTuple):
  """One picture in its scales.

  Attributes:
    images: uint8, or float in [0, 1], [h, w, 3] each.
    size: (H, W) of the result.
    extras: further arrays of the picture that the method reads, without the axis of the batch.
  """

  images: list[np.ndarray]
  size: tuple[int, int]
  extras: Example


def parse(words: tuple[str, ...]) -> Procedure:
  """Words of `eval.test_time`, such as ("resize:2048:512", "slide:512:341", "ms:0.75:1:1.25", "flip"), in any order.

  Raises:
    ValueError: a word that is unknown, comes twice, or has numbers that cannot be.
  """
  found: dict[str, Any] = {}
  for word in words:
    name, *numbers = word.split(":")
    try:
      values = [float(n) for n in numbers] if name == "ms" else [int(n) for n in numbers]
    except ValueError:
      values = [0]
    fits = {"flip": not numbers, "ms": len(values) > 0, "slide": len(values) == 2, "resize": len(values) == 2}
    if (
      not fits.get(name) or any(v <= 0 for v in values) or name in found or (name == "slide" and values[1] > values[0])
    ):
      raise UserError(
        f"eval.test_time has {word!r}; known are 'flip', 'slide:WINDOW:STRIDE' with the stride at most the window, "
        "'resize:LONG:SHORT' and 'ms:RATIO:RATIO..', each once, all numbers above 0."
      )
    found[name] = tuple(values)
  window, stride = found.get("slide", (0, 0))
  return Procedure(window, stride, found.get("resize"), found.get("ms", (1.0,)), "flip" in found)


class _View:
  """One scale of one picture, plain or mirrored, while its windows come in."""

  def __init__(self, picture: "_Picture", image: np.ndarray, mirrored: bool, procedure: Procedure, small: str):
    self.picture, self.mirrored, self.size = picture, mirrored, image.shape[:2]
    self.image: np.ndarray | None = image[:, ::-1] if mirrored else image
    self.window = window_of(self.size, procedure.window, small)
    self._grown = tuple(max(pair) for pair in zip(self.size, self.window, strict=True))
    # A shorter window moves on by as much less.
    strides = tuple(max(procedure.stride * side // max(procedure.window, 1), 1) for side in self.window)
    self.rows, self.columns, _ = corners(self._grown, self.window if procedure.window else 0, strides)
    self.left = len(self.rows) * len(self.columns)
    self.tiles: dict[tuple[int, int], Array] = {}  # sums of scores, by number of rows and of columns of tiles before

  def windows(self) -> Iterator[tuple[np.ndarray, int, int]]:
    """Pixels, float32 in [0, 1], and upper left corner of each window."""
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
    """Of the picture's rows and columns, `taps` of the view, and its `shares`."""
    sides = zip(self.size, self.picture.size, (False, self.mirrored), strict=True)
    reads = [taps(old, new, mirrored=mirrored) for old, new, mirrored in sides]
    starts = zip((self.rows, self.columns), self.window, self._grown, strict=True)
    return [(*read, tiles.shares(*start)) for read, start in zip(reads, starts, strict=True)]


class _Picture:
  """What is still to come for one picture.

  Attributes:
    held: its views are smaller than its result: they wait for each other, and the result is made tile by tile.
    ready: views whose windows have all come in, and which are not added yet.
    sums: tiles of what has been added up, by corner.
    result: of `decide`, once there is one.
  """

  def __init__(self, views: Views, procedure: Procedure, small: str):
    height, width = views.size
    self.size, self.extras = (height, width), views.extras
    mirrors = (False, True) if procedure.flip else (False,)
    self.views = [_View(self, image, m, procedure, small) for image in views.images for m in mirrors]
    self.count = self.left = len(self.views)
    needed = lambda size: -(-size[0] // TILE) * -(-size[1] // TILE)
    self.held = self.count == 1 or sum(needed(view.size) for view in self.views) < needed(self.size)
    self.ready: list[_View] = []
    self.sums: dict[tuple[int, int], Array] = {}
    self.result: np.ndarray | None = None
    # A tile of the result reads at most TILE + 1 rows and columns of each view.
    factors = [max(view.size[axis] for view in self.views) / side for axis, side in enumerate(self.size)]
    self.steps = [min(TILE, int((TILE - 1) / factor) + 1) for factor in factors]

  def corners(self) -> Iterator[tuple[int, int]]:
    """Where tiles of the result begin."""
    rows, columns = (range(0, side, step) for side, step in zip(self.size, self.steps, strict=True))
    return itertools.product(rows, columns)

  def put(self, decided: np.ndarray, corner: tuple[int, int]) -> None:
    """Writes a tile into the result."""
    if self.result is None:
      self.result = np.empty((*self.size, *decided.shape[2:]), decided.dtype)
    here = self.result[corner[0] :, corner[1] :][: self.steps[0], : self.steps[1]]
    here[:] = decided[: here.shape[0], : here.shape[1]]

  def taken(self) -> np.ndarray:
    """The result, which nothing here holds any more: picture and views refer to each other and would outlive it."""
    result, self.result, self.views = cast(np.ndarray, self.result), None, []
    return result


@jax.jit
def most_probable(scores: Array) -> Array:
  """[H, W, K] to the class of the highest score, int32 [H, W]."""
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


@jax.jit
def finite_label(scores: Array) -> Array:
  """As `most_probable`, but K, which is no class, where a score is NaN or infinity."""
  return jnp.where(jnp.isfinite(scores).all(axis=-1), most_probable(scores), scores.shape[-1])


class SlidingWindowInference:
  """Labels, probabilities or scores of the classes of pictures, one after the other.

  Attributes:
    shapes: (H, W) of the windows that the network has been called with, each a program.
  """

  def __init__(
    self,
    predict: Predict,
    procedure: Procedure,
    *,
    at_once: int = 8,
    small: str = "whole",
    softmax: bool = True,
    decide: Callable[[Array], Array] = lambda scores: scores,
    place: Callable[[np.ndarray], Array] = jax.device_put,
    gathered: jax.sharding.Sharding | None = None,
  ):
    """Prepares the programs.

    Args:
      predict: (weights, {"image": float [n, h, w, 3] in [0, 1], ..}) to scores [n, h, w, K] at the size of the windows.
      procedure: of `parse`.
      at_once: n, windows in one call.
      small: what a side shorter than the window does: "whole", as released, makes the window shorter there, which is
        another shape and another program; "few_shapes" takes windows of at most nine shapes, the largest that fits
        into the view, as many as cover it; "padded" fills with mid gray at right and bottom, so that all windows are
        squares of one size. Both give other scores there than "whole".
      softmax: False adds up scores in place of probabilities.
      decide: scores [.., K] to what is wanted of each pixel, such as `most_probable`; traced.
      place: puts an array [n, ...] on the devices.
      gathered: where the scores of all windows of a call are, None for where they are computed.

    Raises:
      ValueError: unknown word, or no window.
    """
    if small not in SMALL:
      raise UserError(f"eval.small={small!r} is unknown; choose one of {SMALL}.")
    if at_once < 1:
      raise UserError(f"at_once={at_once} must be at least 1.")
    self.procedure, self.at_once, self.small, self.place = procedure, at_once, small, place
    self.shapes, self._unused = set(), []  # the latter tiles, to be written over

    def full(weights: Any, batch: dict[str, Array]) -> Array:
      # Scores of smaller windows have the same shape, and so the same programs afterwards.
      scores = predict(weights, batch)
      missing = [(0, max(procedure.window - side, 0)) for side in scores.shape[1:3]]
      return jnp.pad(scores, ((0, 0), *missing, (0, 0)))

    where: dict[str, Any] = {} if gathered is None else {"out_shardings": gathered}
    self._predict = jax.jit(full, **where)
    self._add = jax.jit(tiles.add, donate_argnums=0)
    fold = lambda total, four, steps, flags, weight: tiles.fold(total, four, steps, flags, weight, softmax, decide)
    self._fold = jax.jit(fold, donate_argnums=0)

  def views(self, example: Example) -> Views:
    """A picture, "image" uint8 or float [H, W, 3], resized to every ratio; everything else goes to the method."""
    image = example["image"]
    images = []
    for ratio in self.procedure.ratios:
      size = scaled_size(image.shape[:2], self.procedure.scale, ratio)
      images.append(image if size == image.shape[:2] else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR))
    return Views(images, image.shape[:2], {name: x for name, x in example.items() if name != "image"})

  def __call__(self, weights: Any, pictures: Iterable[Views]) -> Iterator[np.ndarray]:
    """What is decided of each picture, [H, W, ...] at the size of the result, in order; float32 [H, W, K] of `softmax`.

    Pictures are taken from the iterable as they are needed: at most `at_once` are open.
    """
    try:
      yield from self._results(weights, pictures)
    finally:
      self._unused.clear()

  def _results(self, weights: Any, pictures: Iterable[Views]) -> Iterator[np.ndarray]:
    waiting = collections.defaultdict(collections.deque)  # by size of the window: (view, pixels, y, x)
    opened: collections.deque[_Picture] = collections.deque()
    for views in pictures:
      picture = _Picture(views, self.procedure, self.small)
      opened.append(picture)
      for view in picture.views:
        queue = waiting[view.window]
        for window in view.windows():
          queue.append((view, *window))
          if len(queue) == self.at_once:
            self._run(weights, queue)
      if len(opened) >= self.at_once:  # sizes that are rare would keep their pictures waiting
        self._complete(weights, opened[0], waiting)
      while opened and not opened[0].left:
        yield opened.popleft().taken()
    while opened:
      self._complete(weights, opened[0], waiting)
      yield opened.popleft().taken()

  def _complete(self, weights: Any, picture: _Picture, waiting: dict[Any, collections.deque]) -> None:
    """Runs what a picture still waits for, even where that fills no call."""
    for view in picture.views:
      while view.left:
        self._run(weights, waiting[view.window])

  def _run(self, weights: Any, queue: collections.deque) -> None:
    """One call of the network on the first windows of a queue, the last repeated to fill it."""
    taken = [queue.popleft() for _ in range(min(self.at_once, len(queue)))]
    filled = taken + taken[-1:] * (self.at_once - len(taken))
    batch = {"image": self.place(np.stack([pixels for _, pixels, _, _ in filled]))}
    for name in taken[0][0].picture.extras:
      batch[name] = self.place(np.stack([view.picture.extras[name] for view, _, _, _ in filled]))
    self.shapes.add(filled[0][0].window)
    scores = self._predict(weights, batch)
    for i, (view, _, y, x) in enumerate(taken):
      self._keep(view, scores, i, y, x)
      view.left -= 1
      if not view.left:
        self._finish(view)

  def _keep(self, view: _View, scores: Array, i: int, y: int, x: int) -> None:
    """Adds the scores of window i, whose corner is (y, x), to the tiles of the view."""
    height, width = view.window
    for row in range(y // TILE, (y + height - 1) // TILE + 1):
      for column in range(x // TILE, (x + width - 1) // TILE + 1):
        first = (row, column) not in view.tiles
        tile = self._tile(scores) if first else view.tiles.pop((row, column))
        where = [i, row * TILE - y, column * TILE - x, height, width, first]
        view.tiles[row, column] = self._add(tile, scores, np.array(where, np.int32))

  def _tile(self, like: Array) -> Array:
    """A tile of as many classes that nobody uses, whatever it holds."""
    if self._unused:
      return self._unused.pop()
    shape, dtype = (TILE, TILE, like.shape[-1]), jnp.promote_types(like, jnp.float32)
    return jax.device_put(np.zeros(shape, dtype), like.sharding)

  def _finish(self, view: _View) -> None:
    """Adds a view, whose windows have all come in, to its picture, or leaves it until the others have."""
    picture = view.picture
    view.image = None
    picture.left -= 1
    picture.ready.append(view)
    if picture.left and picture.held:
      return
    ready, picture.ready = picture.ready, []
    axes = [view.axes() for view in ready]
    for corner in picture.corners():
      for i, (view, reads) in enumerate(zip(ready, axes, strict=True)):
        self._add_tile(view, corner, reads, last=not picture.left and i == len(ready) - 1)
    for view in ready:
      self._unused += view.tiles.values()
      view.tiles = {}

  def _add_tile(self, view: _View, corner: tuple[int, int], reads: Any, last: bool) -> None:
    """One view's part of the tile of the result at `corner`."""
    picture, first = view.picture, corner not in view.picture.sums
    parts = zip(reads, corner, picture.steps, strict=True)
    (row, rows), (column, columns) = (tiles.reading(*read, begin=begin, step=step) for read, begin, step in parts)
    near = view.tiles[row, column]  # also where there is no further tile, and nothing reads it
    four = [view.tiles.get((row + down, column + right), near) for down in (0, 1) for right in (0, 1)]
    total = self._tile(near) if first else picture.sums.pop(corner)
    weight = np.dtype(near.dtype).type(1 / picture.count)
    total, decided = self._fold(total, four, (rows, columns), np.array([first, last]), weight)
    if last:
      self._unused.append(total)
      picture.put(np.asarray(decided), corner)
    else:
      picture.sums[corner] = total
