"""Class probabilities of pictures of any size: sliding windows, scales and mirror images, as mmsegmentation takes them.

Every picture is a sum over its views (a scale, plain or mirrored). A view is cut into windows; windows of all pictures
wait together until `at_once` of them fill one call of the network, which so has one shape and one program. Their scores
are added where they belong on a canvas on the device, divided by the number of windows there, resized to the size of
the picture, turned into probabilities, mirrored back, and added up. Canvases have sides of whole multiples of CANVAS,
and how a size maps to another travels as arrays, so that few small programs serve all sizes. On the host nothing
outlives its picture.

Source: mmsegmentation 0.30 models/segmentors/encoder_decoder.py slide_inference, inference, aug_test; mmcv 1.7
image/geometric.py imrescale.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.types import Array, Example

CANVAS = 128
NOWHERE = 255  # as a label on a canvas: beyond the picture, neither right nor wrong
SMALL = ("whole", "padded")
Corners = list[tuple[int, int]]
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
      raise ValueError(
        f"eval.test_time has {word!r}; known are 'flip', 'slide:WINDOW:STRIDE' with the stride at most the window, "
        "'resize:LONG:SHORT' and 'ms:RATIO:RATIO..', each once, all numbers above 0."
      )
    found[name] = tuple(values)
  window, stride = found.get("slide", (0, 0))
  return Procedure(window, stride, found.get("resize"), found.get("ms", (1.0,)), "flip" in found)


def scaled_size(size: tuple[int, int], scale: tuple[int, int] | None, ratio: float) -> tuple[int, int]:
  """(H, W) of a picture whose sides fit into `ratio` times the scale, or are `ratio` times as long where it is None."""
  if scale is None:
    factor = ratio
  else:
    long, short = (int(side * ratio) for side in (max(scale), min(scale)))
    factor = min(long / max(size), short / min(size))
  return tuple(max(1, int(side * factor + 0.5)) for side in size)


def corners(size: tuple[int, int], window: int, stride: int) -> tuple[list[int], list[int], tuple[int, int]]:
  """Where windows begin along rows and along columns, and their size, which is at most that of the picture.

  The last windows are moved back inside. A side that is shorter than the window has one window of its own length.
  """
  if not window:
    return [0], [0], size
  starts = []
  for side in size:
    count = max(side - window + stride - 1, 0) // stride + 1
    starts.append([max(min(i * stride + window, side) - window, 0) for i in range(count)])
  return *starts, tuple(min(window, side) for side in size)


def canvas(size: tuple[int, int]) -> tuple[int, int]:
  """The size of the array that holds an image of this size."""
  return tuple(-(-side // CANVAS) * CANVAS for side in size)


def on_canvas(image: np.ndarray, value: float) -> np.ndarray:
  """[H, W, ...] grown at right and bottom to its canvas."""
  grown = np.full((*canvas(image.shape[:2]), *image.shape[2:]), value, image.dtype)
  grown[: image.shape[0], : image.shape[1]] = image
  return grown


class _View:
  """One scale of one picture, plain or mirrored, while its windows come in."""

  def __init__(self, picture: "_Picture", image: np.ndarray, mirrored: bool, procedure: Procedure, small: str):
    self.picture, self.mirrored, self.size = picture, mirrored, image.shape[:2]
    self.image = image[:, ::-1] if mirrored else image
    if small == "padded" and procedure.window:
      missing = [max(procedure.window - side, 0) for side in self.size]
      # Mid grey, zero after scaling to [-1, 1].
      self.image = np.pad(self.image, (*((0, m) for m in missing), (0, 0)), constant_values=0.5)
    self.rows, self.columns, self.window = corners(self.image.shape[:2], procedure.window, procedure.stride)
    self.left = len(self.rows) * len(self.columns)
    self.total = None

  def windows(self) -> Iterator[tuple[np.ndarray, int, int]]:
    """Pixels and upper left corner of each window."""
    height, width = self.window
    for y in self.rows:
      for x in self.columns:
        yield self.image[y : y + height, x : x + width], y, x

  def shares(self) -> tuple[np.ndarray, np.ndarray]:
    """One over the number of windows on each row and on each column of the canvas."""
    result = []
    for starts, length, side in zip((self.rows, self.columns), self.window, canvas(self.image.shape[:2]), strict=True):
      count = np.zeros(side)
      for start in starts:
        count[start : start + length] += 1
      result.append((1 / np.maximum(count, 1)).astype(np.float32))
    return tuple(result)


class _Picture:
  """What is still to come for one picture."""

  def __init__(self, views: Views, procedure: Procedure, small: str):
    self.size, self.extras, self.scores = tuple(views.size), views.extras, None
    mirrors = (False, True) if procedure.flip else (False,)
    unit = lambda image: image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    self.views = [_View(self, unit(image), m, procedure, small) for image in views.images for m in mirrors]
    self.count = self.left = len(self.views)

  def taken(self) -> Array:
    """The result, which nothing here holds any more: picture and views refer to each other and would outlive it."""
    scores, self.scores, self.views = self.scores, None, []
    return scores


def taps(old: int, new: int, length: int, *, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Bilinear resizing of one axis, align_corners=False: the neighbours of each new place, and the share of the second.

  Args:
    old, new: true sizes.
    length: entries of the result; those from `new` on read place 0.
    mirrored: the result runs backwards.
  """
  place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
  low = np.floor(place).astype(np.int32)
  parts = low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32)
  return tuple(np.pad(part[::-1] if mirrored else part, (0, length - new)) for part in parts)


def _add(total: Array, scores: Array, i: Array, y: Array, x: Array) -> Array:
  """The canvas with the scores of window i added at its corner."""
  window = jax.lax.dynamic_index_in_dim(scores, i, keepdims=False).astype(total.dtype)
  here = jax.lax.dynamic_slice(total, (y, x, jnp.zeros_like(y)), window.shape)
  return jax.lax.dynamic_update_slice(total, here + window, (y, x, jnp.zeros_like(y)))


def _between(x: Array, low: Array, high: Array, share: Array, axis: int) -> Array:
  share = jnp.expand_dims(share, [a for a in range(3) if a != axis]).astype(x.dtype)
  return x.take(low, axis) * (1 - share) + x.take(high, axis) * share


def _finished(scores: Array | None, total: Array, shares: Any, rows: Any, columns: Any, softmax: bool, weight: float):
  """`scores` with one view added: its means over windows, at the size of the picture; rows None: it has that size."""
  total = total * shares[0][:, None, None] * shares[1][None, :, None]
  resized = total if rows is None else _between(_between(total, *rows, axis=0), *columns, axis=1)
  view = weight * (jax.nn.softmax(resized, axis=-1) if softmax else resized)
  return view if scores is None else scores + view


@jax.jit
def most_probable(scores: Array) -> Array:
  """[H, W, K] to the class of the highest score, int32 [H, W]."""
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)


class Labelling:
  """Probabilities or scores of the classes of pictures, one after the other."""

  def __init__(
    self,
    predict: Predict,
    procedure: Procedure,
    *,
    at_once: int = 8,
    small: str = "whole",
    softmax: bool = True,
    place: Callable[[np.ndarray], Array] = jnp.asarray,
  ):
    """Prepares the programs.

    Args:
      predict: (weights, {"image": float [n, h, w, 3] in [0, 1], ..}) to scores [n, h, w, K] at the size of the windows.
      procedure: of `parse`.
      at_once: n, windows in one call.
      small: what a side shorter than the window does: "whole", as released, makes the window shorter there, which is
        another shape and another program; "padded" fills with mid grey at right and bottom, so that all windows are
        squares of one size.
      softmax: False adds up scores in place of probabilities.
      place: puts an array [n, ...] on the devices.

    Raises:
      ValueError: unknown word, or no window.
    """
    if small not in SMALL:
      raise ValueError(f"eval.small={small!r} is unknown; choose one of {SMALL}.")
    if at_once < 1:
      raise ValueError(f"at_once={at_once} must be at least 1.")
    self.procedure, self.at_once, self.small, self.softmax, self.place = procedure, at_once, small, softmax, place
    self._predict = jax.jit(predict)
    self._add = jax.jit(_add, donate_argnums=0)
    self._finished = jax.jit(_finished, donate_argnums=0, static_argnums=(5, 6))

  def views(self, example: Example) -> Views:
    """A picture, "image" uint8 or float [H, W, 3], resized to every ratio; everything else goes to the method."""
    image = example["image"]
    images = []
    for ratio in self.procedure.ratios:
      size = scaled_size(image.shape[:2], self.procedure.scale, ratio)
      same = size == image.shape[:2]
      images.append(image if same else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR))
    return Views(images, image.shape[:2], {name: x for name, x in example.items() if name != "image"})

  def __call__(self, weights: Any, pictures: Iterable[Views]) -> Iterator[Array]:
    """Probabilities of each picture, in order.

    Pictures are taken from the iterable as they are needed: at most `at_once` are open.

    Returns:
      float32 [H', W', K] each, on the devices: canvases whose upper left H x W is the picture; what lies beyond means
      nothing.
    """
    waiting = collections.defaultdict(collections.deque)  # by size of the window: (view, pixels, y, x)
    opened: collections.deque[_Picture] = collections.deque()
    for views in pictures:
      picture = _Picture(views, self.procedure, self.small)
      opened.append(picture)
      for view in picture.views:
        queue = waiting[view.window]
        queue.extend((view, *window) for window in view.windows())
        while len(queue) >= self.at_once:
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
    scores = self._predict(weights, batch)
    for i, (view, _, y, x) in enumerate(taken):
      if view.total is None:
        view.total = jnp.zeros(
          (*canvas(view.image.shape[:2]), scores.shape[-1]), jnp.promote_types(scores, jnp.float32)
        )
      view.total = self._add(view.total, scores, np.int32(i), np.int32(y), np.int32(x))
      view.left -= 1
      if not view.left:
        self._finish(view)

  def _finish(self, view: _View) -> None:
    picture, total = view.picture, view.total
    sides = zip(view.size, picture.size, canvas(picture.size), (False, view.mirrored), strict=True)
    rows, columns = (taps(old, new, length, mirrored=m) for old, new, length, m in sides)
    if view.size == picture.size and not view.mirrored and total.shape[:2] == canvas(picture.size):
      rows = columns = None  # all is where it belongs
    options = self.softmax, 1 / picture.count
    picture.scores = self._finished(picture.scores, total, view.shares(), rows, columns, *options)
    view.total = view.image = None
    picture.left -= 1
