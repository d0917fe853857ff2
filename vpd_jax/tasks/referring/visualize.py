"""Drawing a mask and its sentence."""

import cv2
import numpy as np

from vpd_jax.tasks import drawing
from vpd_jax.tasks.label_images import as_bytes

COLOR = (255, 40, 40)
OPACITY = 0.5


def overlay(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
  """Blends a color over the object, and draws its opaque outline: uint8 [H, W, 3].

  Args:
    mask: bool [H, W].
    image: uint8, or float in [0, 1], [H, W, 3].
  """
  picture, color = as_bytes(image).copy(), np.array(COLOR, np.uint8)
  picture[mask] = (picture[mask] * (1 - OPACITY) + color * OPACITY).astype(np.uint8)
  inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
  picture[mask & ~inner] = color
  return picture


def titled(picture: np.ndarray, sentence: str) -> np.ndarray:
  """The image above a line with the sentence, clipped to its width: uint8 [H + h, W, 3]."""
  return np.concatenate([picture, drawing.text_line(sentence, picture.shape[1])])


def box(mask: np.ndarray) -> list[int] | None:
  """Bounding box [left, top, width, height] in pixels of a mask; None if it is empty."""
  rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
  if not rows.size:
    return None
  left, top = int(columns[0]), int(rows[0])
  return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
