"""Text, titles, color bars and contours in images."""

import itertools
import math
from collections.abc import Sequence

import cv2
import numpy as np

from vpd_jax.tasks import colormaps

FONT = cv2.FONT_HERSHEY_SIMPLEX
LINE = 45  # pixels of a line of text at scale 1
SMALLEST_SCALE = 0.4  # of the font
LARGEST = 512  # side in pixels of the label map in which positions for names are searched
SMALLEST_REGION = 0.004  # share of the image below which a region gets no name


def text_scale(size: Sequence[int]) -> float:
  """The font scale for an image of (height, width): legible on small images, proportional on large ones."""
  return float(np.clip(min(size) / 1000, SMALLEST_SCALE, 4))


def text_width(string: str, scale: float) -> int:
  """Width in pixels of a text that is not outlined."""
  return cv2.getTextSize(_in_ascii(string), FONT, scale, 1)[0][0]


def text(picture: np.ndarray, string: str, origin: tuple[int, int], scale: float, *, outlined: bool = False) -> None:
  """Draws black text, or white text with a black outline, into uint8 [H, W, 3].

  Args:
    picture: is modified in place.
    string: non-ASCII characters become "?".
    origin: (x, y) of the left end of the baseline.
    scale: from `text_scale`.
    outlined: white with an outline, for colored backgrounds.
  """
  readable, thick = _in_ascii(string), max(1, round(1.5 * scale))
  write = lambda color, x, y: cv2.putText(picture, readable, (x, y), FONT, scale, color, thick, cv2.LINE_AA)
  if outlined:
    # Shifted copies, since OpenCV increases the spacing of thicker text.
    step = max(1, round(1.5 * scale))
    for right, down in itertools.product((-step, 0, step), repeat=2):
      write((0, 0, 0), origin[0] + right, origin[1] + down)
  write((255,) * 3 if outlined else (0,) * 3, *origin)


def _in_ascii(string: str) -> str:
  """The string as OpenCV's fonts can show it."""
  return string.encode("ascii", "replace").decode()


def text_line(string: str, width: int, scale: float = SMALLEST_SCALE) -> np.ndarray:
  """Black text on a white line of the given width, clipped to it: uint8 [h, width, 3]."""
  picture = np.full((round(LINE * scale), width, 3), 255, np.uint8)
  text(picture, string, (round(8 * scale), round(0.7 * LINE * scale)), scale)
  return picture


def row(parts: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
  """Images side by side, each below its title; titles that do not fit are clipped.

  Args:
    parts: title and uint8 [H, W, 3] of each; all with the same height.

  Returns:
    uint8 [H + h, sum of W, 3].
  """
  scale = text_scale(min((picture.shape[:2] for _, picture in parts), key=lambda size: size[0]))
  columns = [np.concatenate([text_line(title, picture.shape[1], scale), picture]) for title, picture in parts]
  return np.concatenate(columns, axis=1)


def ticks(low: float, high: float, most: int) -> list[float]:
  """At most `most` round numbers, multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
  magnitude = 10.0 ** math.floor(math.log10(max(high - low, 1e-9) / max(most, 2)))
  for step in (factor * magnitude for factor in (1, 2, 5, 10, 20, 50)):
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first < max(most, 2):
      break
  return [number * step for number in range(first, last + 1)]


def color_bar(low: float, high: float, colors: str, size: Sequence[int], unit: str = "m") -> np.ndarray:
  """A legend of `colormaps.paint`: colors from `low` at the bottom to `high` at the top, with round numbers.

  Args:
    low, high: values of the first and the last color.
    colors: name of the color map.
    size: (height, width) of the image next to it.
    unit: appended to the numbers.

  Returns:
    uint8 [height, w, 3].
  """
  height, scale = size[0], text_scale(size)
  margin, bar_width, half = round(8 * scale), max(6, round(30 * scale)), round(LINE * scale / 4)
  numbers = ticks(low, high, max(2, round(height / (2 * LINE * scale))))
  labels = [f"{number:.6g} {unit}" for number in numbers]
  label_width = max((text_width(label, scale) for label in labels), default=0)
  bar = np.full((height, 3 * margin + bar_width + label_width, 3), 255, np.uint8)
  top, bottom = min(half, height // 4), height - 1 - min(half, height // 4)
  span = np.linspace(high, low, bottom - top + 1)
  bar[top : bottom + 1, margin : margin + bar_width] = colormaps.paint(span, low, high, colors)[:, None]
  for number, label in zip(numbers, labels, strict=True):
    y = round(bottom - (bottom - top) * (number - low) / max(high - low, 1e-9))
    bar[y, margin + bar_width : margin + bar_width + max(2, margin // 2)] = 0
    text(bar, label, (2 * margin + bar_width, min(y + half, height - 1)), scale)
  return bar


def contours(picture: np.ndarray, values: np.ndarray, spacing: float) -> np.ndarray:
  """Draws dark lines where the values cross a multiple of `spacing`: uint8 [H, W, 3].

  Args:
    picture: uint8 [H, W, 3].
    values: float [H, W]; no line is drawn next to values that are not positive and finite.
    spacing: above 0.
  """
  valid = np.isfinite(values) & (values > 0)
  band = np.floor(np.where(valid, values, 0) / spacing)
  line = np.zeros(values.shape, np.uint8)
  line[:, 1:] |= (band[:, 1:] != band[:, :-1]) & valid[:, 1:] & valid[:, :-1]
  line[1:] |= (band[1:] != band[:-1]) & valid[1:] & valid[:-1]
  thick = max(1, round(2 * text_scale(values.shape)))
  line = cv2.dilate(line, np.ones((thick, thick), np.uint8)).astype(bool)
  return np.where(line[..., None], np.uint8(40), picture)


def names(picture: np.ndarray, label: np.ndarray, classes: Sequence[str]) -> np.ndarray:
  """Writes the names of classes into their regions, largest first, skipping regions that are too small.

  Args:
    picture: uint8 [H, W, 3].
    label: int [H, W]; values that are not a class id are ignored.
    classes: names by class id.

  Returns:
    uint8 [H, W, 3].
  """
  picture, scale = picture.copy(), text_scale(picture.shape[:2])
  occupied = np.zeros(label.shape, bool)
  for _, class_id, (x, y), radius in sorted(_largest_circles(label, len(classes)), reverse=True):
    (width, height), descent = cv2.getTextSize(_in_ascii(classes[class_id]), FONT, scale, 1)
    left = int(np.clip(x - width / 2, 0, max(0, label.shape[1] - width)))
    base = int(np.clip(y + height / 2, height, max(height, label.shape[0] - descent)))
    rows, columns = slice(max(0, base - height), base + descent), slice(left, left + width)
    if radius >= 0.6 * height and width <= label.shape[1] and not occupied[rows, columns].any():
      occupied[rows, columns] = True
      text(picture, classes[class_id], (left, base), scale, outlined=True)
  return picture


def _largest_circles(label: np.ndarray, classes: int) -> list[tuple[float, int, tuple[float, float], float]]:
  """For each connected region: share of the image, class, center (x, y) and radius of the largest inscribed circle."""
  factor = max(1.0, max(label.shape) / LARGEST)
  small = label[(np.arange(int(label.shape[0] / factor)) * factor).astype(int)]
  small = small[:, (np.arange(int(label.shape[1] / factor)) * factor).astype(int)]
  circles = []
  for class_id in np.flatnonzero(np.bincount(small[(small >= 0) & (small < classes)].ravel(), minlength=1)):
    count, regions, stats, _ = cv2.connectedComponentsWithStats((small == class_id).astype(np.uint8), connectivity=4)
    for k in range(1, count):
      share = stats[k, cv2.CC_STAT_AREA] / small.size
      if share >= SMALLEST_REGION:
        # The padding counts as another region.
        inside = cv2.distanceTransform(np.pad((regions == k).astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        _, radius, _, (x, y) = cv2.minMaxLoc(inside)
        circles.append((float(share), int(class_id), (x * factor, y * factor), float(radius * factor)))
  return circles
