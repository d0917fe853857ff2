"""Test-time augmentation: functions from a predict function to a predict function.

`cut` and `merge` accept numpy arrays and traced arrays, so that evaluation and prediction share one implementation.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import UserError, check_choice
from vpd_jax.inference import blending
from vpd_jax.types import Array, Batch

Images = TypeVar("Images", np.ndarray, Array)
Predict = Callable[[Batch], Array]  # batch of B images to [B, H, W, ...]
COVERAGES = ("released", "full")
# Values of `eval.test_time` by test-time protocol. Flipping would swap left and right in sentences.
TEST_TIME_OPTIONS = {"windows": ("flip", "shift:N", "halves:N"), "crops": ("flip",), "squeezed": ()}
NUMBERS = {"shift:N": " with N at least 2", "halves:N": " with N at least 1"}


class TestTime(NamedTuple):
  """What `eval.test_time` asks for.

  Attributes:
    flip: the mirrored image too.
    windows: number of square windows along the longer side; 1 for the whole image.
    overlap: columns that the two separately predicted halves of an image share; 0: it is not halved.
  """

  flip: bool
  windows: int
  overlap: int


def offsets(size: Sequence[int], count: int, *, coverage: str = "released") -> list[tuple[int, int]]:
  """Upper left corners (y, x) of `count` square windows along the longer side of an image.

  The side of a window is the shorter side. "released" takes steps of (long - short) // (count - 1), which may leave
  the last columns uncovered; "full" spreads the windows evenly to the end and adds some where they would not touch.

  Source: VPD depth/test.py, shift_window_test.
  """
  check_choice("eval.coverage", coverage, COVERAGES)
  short, long = min(size), max(size)
  if short == long:
    return [(0, 0)]
  if coverage == "full":
    count = max(count, -(-long // short))
    starts = [round(i * (long - short) / (count - 1)) for i in range(count)]
  else:
    starts = [i * ((long - short) // max(count - 1, 1)) for i in range(count)]
  return [(start, 0) if size[0] > size[1] else (0, start) for start in starts]


def check_coverage(
  size: Sequence[int], words: tuple[str, ...], coverage: str, region: tuple[int, int, int, int]
) -> None:
  """Checks that windows cover a region.

  Args:
    size: (H, W) of the images.
    words, coverage: of the config.
    region: (top, bottom, left, right) rows and columns.

  Raises:
    ValueError: pixels of the region have no prediction.
  """
  windows, side = parse(words).windows, min(size)
  if windows == 1:
    return
  covered = np.zeros(size, bool)
  for y, x in offsets(size, windows, coverage=coverage):
    covered[y : y + side, x : x + side] = True
  top, bottom, left, right = region
  if holes := int((~covered[top:bottom, left:right]).sum()):
    raise UserError(
      f"eval.coverage={coverage!r} with eval.test_time={tuple(words)} leaves {holes} pixels of each image of "
      f"{size[0]} x {size[1]} without a prediction that is scored; set config.eval.coverage='full'."
    )


def cut(images: Images, corners: list[tuple[int, int]]) -> Images:
  """[B, H, W, ...] to the windows at `corners`, window by window: [len(corners) * B, S, S, ...]."""
  side = min(images.shape[1:3])
  xp = cast(Any, np if isinstance(images, np.ndarray) else jnp)
  return xp.concatenate([images[:, y : y + side, x : x + side] for y, x in corners])


def merge(windows: Images, corners: list[tuple[int, int]], size: Sequence[int], *, smooth: bool = False) -> Images:
  """Inverse of `cut`: overlaps are averaged, with `smooth` by `blending.smooth_profile`; without a window it is NaN."""
  xp = cast(Any, np if isinstance(windows, np.ndarray) else jnp)
  side = windows.shape[1]
  parts = windows.reshape(len(corners), -1, *windows.shape[1:])  # [n, B, S, S, ...]
  trailing = ((0, 0),) * (windows.ndim - 3)
  total, count = 0, np.zeros((1, *size, *(1,) * len(trailing)), windows.dtype)
  weight = np.ones((side, side), windows.dtype)
  if smooth:  # along the longer side only; along the other one all windows weigh the same
    fade = blending.smooth_profile(np.arange(side), side).astype(windows.dtype)
    weight = weight * (fade[:, None] if size[0] > size[1] else fade)
    parts = parts * weight.reshape(1, 1, side, side, *(1,) * len(trailing))
  for part, (y, x) in zip(parts, corners, strict=True):
    total = total + xp.pad(part, ((0, 0), (y, size[0] - side - y), (x, size[1] - side - x), *trailing))
    count[:, y : y + side, x : x + side] += weight.reshape(1, side, side, *(1,) * len(trailing))
  with np.errstate(invalid="ignore"):
    return cast(Any, total) / xp.asarray(count)


def tiled(batch: Batch, times: int) -> Batch:
  """Every array [B, ...] of the batch, repeated to [times * B, ...]."""
  return {name: jnp.concatenate([value] * times) for name, value in batch.items()}


def mirror_back(prediction: Array) -> Array:
  """Flips a map [B, H, W, ...] horizontally."""
  return prediction[:, :, ::-1]


def flipped(predict: Predict, mirrored: Callable[[Array], Array] = mirror_back) -> Predict:
  """The mean of the predictions of the image and of the flipped image, which `mirrored` flips back."""

  def run(batch: Batch) -> Array:
    both = tiled(batch, 2) | {"image": jnp.concatenate([batch["image"], batch["image"][:, :, ::-1]])}
    plain, flipped_prediction = jnp.split(predict(both), 2)
    return (plain + mirrored(flipped_prediction)) / 2

  return run


def shifted_windows(predict: Predict, count: int, *, coverage: str = "released", smooth: bool = False) -> Predict:
  """Predicts `count` square windows along the longer side and averages them where they overlap, see `merge`."""

  def run(batch: Batch) -> Array:
    image = batch["image"]
    corners = offsets(image.shape[1:3], count, coverage=coverage)
    windows = tiled(batch, len(corners)) | {"image": cut(image, corners)}
    return merge(predict(windows), corners, image.shape[1:3], smooth=smooth)

  return run


def halves(predict: Predict, overlap: int) -> Predict:
  """Predicts the left and the right half of an image, which share `overlap` columns, and blends these linearly.

  An image that is not wider than the overlap is predicted as a whole. If the sum of width and overlap is odd, the
  halves share one more column.

  Source: EcoDepth depth/test.py (v1.0.0): 640 of KITTI's 1216 columns each, 64 in common.
  """

  def run(batch: Batch) -> Array:
    image = batch["image"]
    width, side = image.shape[2], -(-(image.shape[2] + overlap) // 2)
    if side >= width:
      return predict(batch)
    windows = tiled(batch, 2) | {"image": jnp.concatenate([image[:, :, :side], image[:, :, -side:]])}
    left, right = jnp.split(predict(windows), 2)
    common = 2 * side - width
    weight = jnp.linspace(0, 1, common, dtype=left.dtype).reshape(1, 1, common, *(1,) * (left.ndim - 3))
    blended = left[:, :, -common:] * (1 - weight) + right[:, :, :common] * weight
    return jnp.concatenate([left[:, :, :-common], blended, right[:, :, common:]], axis=2)

  return run


def parse(words: tuple[str, ...], protocol: str = "windows") -> TestTime:
  """Parses `eval.test_time`, such as ("flip", "shift:2").

  Args:
    words: of the config.
    protocol: of the task, see TEST_TIME_OPTIONS.

  Raises:
    ValueError: a word that the protocol does not support; windows and halves together.
  """
  flip, windows, overlap, known = False, 1, 0, TEST_TIME_OPTIONS[protocol]
  for word in words:
    name, _, number = word.partition(":")
    if name == "flip" and not number and "flip" in known:
      flip = True
    elif name == "shift" and number.isdigit() and int(number) >= 2 and "shift:N" in known:
      windows = int(number)
    elif name == "halves" and number.isdigit() and int(number) >= 1 and "halves:N" in known:
      overlap = int(number)
    else:
      listed = " and ".join(repr(word) + NUMBERS.get(word, "") for word in known)
      remedy = f"known are {listed}" if known else "this task supports none: use ()"
      raise UserError(f"eval.test_time has {word!r}; {remedy}.")
  if overlap and windows > 1:
    raise UserError(f"eval.test_time={tuple(words)} has both windows and halves; choose one.")
  return TestTime(flip, windows, overlap)


def with_test_time_augmentation(
  predict: Predict,
  words: tuple[str, ...],
  *,
  coverage: str = "released",
  smooth: bool = False,
  mirrored: Callable[[Array], Array] = mirror_back,
) -> Predict:
  """`predict` with `eval.test_time`: flips are averaged first, then windows or halves."""
  flip, windows, overlap = parse(words)
  combined = flipped(predict, mirrored) if flip else predict
  combined = shifted_windows(combined, windows, coverage=coverage, smooth=smooth) if windows > 1 else combined
  combined = halves(combined, overlap) if overlap else combined

  def run(batch: Batch) -> Array:
    if words and "latents" in batch:
      raise UserError(f"eval.test_time={words} cannot be combined with precomputed latents; set it to ().")
    return combined(batch)

  return run
