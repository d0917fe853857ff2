"""Labels as images and files: palette, overlay, legend."""

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vpd_jax.tasks import colormaps, drawing

UNLABELED = (128, 128, 128)  # gray, not used by the palettes of the supported data sets
OPACITY = 0.5
LINE = 18  # pixels of the legend per class
SWATCH = 14
MAX_MAPS = 16  # attention maps in an image


def voc_palette(classes: int) -> np.ndarray:
  """uint8 [K, 3]: the colors of Pascal VOC from class 1 on; its class 0, black, is the background.

  The bits of the class id are distributed to red, green and blue in turn, from the highest bit of each color.

  Source: VOCdevkit VOClabelcolormap.m.
  """
  numbers = np.arange(1, classes + 1)
  colors = np.zeros((classes, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      colors[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
  return colors


def paint(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """int [H, W] to uint8 [H, W, 3]; ids beyond the palette are gray."""
  table = np.full((256, 3), UNLABELED, np.uint8)
  table[: len(palette)] = palette
  return table[label.astype(np.uint8)]


def as_bytes(image: np.ndarray) -> np.ndarray:
  """uint8, or float in [0, 1], to uint8."""
  return image if image.dtype == np.uint8 else np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def overlay(
  label: np.ndarray, palette: np.ndarray, names: Sequence[str], image: np.ndarray | None = None
) -> np.ndarray:
  """Colors blended over the image, names in the regions, and a legend of the present classes below, largest first.

  Args:
    label: uint8 [H, W].
    palette: uint8 [K, 3].
    names: of the K classes.
    image: uint8, or float in [0, 1], [H, W, 3]; None shows only the colors.

  Returns:
    uint8 [H + h, W', 3], W' at least W.
  """
  painted = paint(label, palette)
  if image is not None:
    painted = cv2.addWeighted(as_bytes(image), 1 - OPACITY, painted, OPACITY, 0)
  painted = drawing.names(painted, label, names)
  counts = np.bincount(label.ravel(), minlength=256)[: len(palette)]
  entries = legend(
    [
      (names[int(k)], palette[k], float(counts[k] / label.size))
      for k in np.argsort(-counts, kind="stable")
      if counts[k]
    ],
    painted.shape[1],
  )
  right = max(0, entries.shape[1] - painted.shape[1])
  return np.concatenate([np.pad(painted, ((0, 0), (0, right), (0, 0)), constant_values=255), entries])


def legend(entries: list[tuple[str, np.ndarray, float]], width: int) -> np.ndarray:
  """A swatch, name and share per entry, in as many columns as fit: uint8 [h, at least width, 3]."""
  texts = [f"{name} {100 * share:.1f}%" for name, _, share in entries]
  column = 3 * LINE // 2 + max((drawing.text_width(text, drawing.SMALLEST_SCALE) for text in texts), default=0)
  columns = max(1, width // column)
  picture = np.full((LINE * -(-len(entries) // columns), max(width, column), 3), 255, np.uint8)
  for i, (text, (_, color, _)) in enumerate(zip(texts, entries, strict=True)):
    y, x = LINE * (i // columns), column * (i % columns)
    picture[y + 2 : y + 2 + SWATCH, x + 2 : x + 2 + SWATCH] = color
    drawing.text(picture, text, (x + SWATCH + 6, y + SWATCH), drawing.SMALLEST_SCALE)
  return picture


def attention(maps: list[tuple[str, np.ndarray]], label: np.ndarray, image: np.ndarray) -> np.ndarray:
  """Maps of the largest classes over the image, each from its smallest (dark) to largest value (light), with titles.

  Args:
    maps: name and float [h, w] of each class.
    label: int [H, W].
    image: uint8 [H, W, 3].

  Returns:
    uint8 [rows * (H + h), columns * W, 3] with titles of height h, approximately square.
  """
  height, width = image.shape[:2]
  counts = np.bincount(label.ravel(), minlength=len(maps))
  tiles = []
  for name, values in (maps[k] for k in np.argsort(-counts, kind="stable")[:MAX_MAPS] if counts[k]):
    large = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    heat = colormaps.paint(large, float(large.min()), float(large.max()), "magma")
    tiles.append(np.concatenate([drawing.text_line(name, width), cv2.addWeighted(image, 0.3, heat, 0.7, 0)]))
  columns = math.ceil(math.sqrt(len(tiles) * tiles[0].shape[0] / width))
  tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
  rows = (tiles[i : i + columns] for i in range(0, len(tiles), columns))
  return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def write_indexed(path: Path, label: np.ndarray, palette: np.ndarray) -> None:
  """Writes an indexed PNG of labels uint8 [H, W] with their palette."""
  picture = Image.fromarray(label)
  picture.putpalette(paint(np.arange(256, dtype=np.uint8)[None], palette).tobytes())
  picture.save(path, "PNG")


def write_colors(path: Path, picture: np.ndarray) -> None:
  """Writes a PNG of uint8 [H, W, 3] RGB, or [H, W]."""
  Image.fromarray(picture).save(path, "PNG")
