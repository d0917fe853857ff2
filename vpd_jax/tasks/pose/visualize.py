"""Drawing skeletons, boxes and heatmaps over images."""

from collections.abc import Sequence

import cv2
import numpy as np

# By the side in the names of keypoints: orange left, blue right, green neither.
COLORS = {"left": (255, 140, 0), "right": (40, 130, 255), "": (0, 210, 90)}


def side(name: str) -> str:
  """ "left", "right" or neither, by a keypoint's name."""
  return next((word for word in ("left", "right") if word in name), "")


def draw(
  image: np.ndarray,
  people: Sequence[np.ndarray],
  names: Sequence[str],
  skeleton: Sequence[tuple[int, int]],
  *,
  least: float,
) -> np.ndarray:
  """Draws the bones and joints of people over an image.

  Args:
    image: uint8 [H, W, 3].
    people: float [K, 3] each, x, y and score.
    names: of the K keypoints; a bone belongs to a side if one end does, and the other end not to the other side.
    skeleton: pairs of indices that are connected by a bone.
    least: minimum score of the drawn keypoints, exclusive.

  Returns:
    uint8 [H, W, 3].
  """
  drawn = image.copy()
  sides = [side(name) for name in names]
  for points in people:
    visible = np.isfinite(points).all(-1) & (points[:, 2] > least)
    if not visible.any():
      continue
    height = np.ptp(points[visible, 1])
    thick = int(np.clip(round(height / 70), 1, 6))
    # In sixteenths of a pixel; clipped, since OpenCV's integers would overflow far outside.
    positions = np.round(np.clip(np.nan_to_num(points[:, :2]), -1e4, 1e4) * 16).astype(int)
    for a, b in skeleton:
      if visible[a] and visible[b]:
        both = {sides[a], sides[b]} - {""}
        color = COLORS[both.pop()] if len(both) == 1 else COLORS[""]
        cv2.line(drawn, positions[a].tolist(), positions[b].tolist(), color, thick, cv2.LINE_AA, 4)
    for k in np.flatnonzero(visible):
      cv2.circle(drawn, positions[k].tolist(), 16 * (thick + 1), (255, 255, 255), -1, cv2.LINE_AA, 4)
      cv2.circle(drawn, positions[k].tolist(), 16 * thick, COLORS[sides[k]], -1, cv2.LINE_AA, 4)
  return drawn


def boxes(image: np.ndarray, outlines: Sequence[Sequence[float]]) -> np.ndarray:
  """Draws boxes of people over an image as thin gray lines: uint8 [H, W, 3].

  Args:
    image: uint8 [H, W, 3].
    outlines: x, y, width and height of each in pixels.
  """
  drawn, (height, width) = image.copy(), image.shape[:2]
  for x, y, w, h in outlines:
    left, right = np.clip([round(x), round(x + w) - 1], 0, width - 1).tolist()
    top, bottom = np.clip([round(y), round(y + h) - 1], 0, height - 1).tolist()
    cv2.rectangle(drawn, (left, top), (right, bottom), (128, 128, 128), 2)
  return drawn


def heat(image: np.ndarray, strongest: np.ndarray) -> np.ndarray:
  """The image in gray, with the maximum of its heatmaps in red: uint8 [H, W, 3].

  Args:
    image: uint8 [H, W, 3].
    strongest: float [h, w]; 1 is full red.
  """
  resized = cv2.resize(strongest.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
  opacity = np.clip(np.nan_to_num(resized), 0, 1)[..., None]
  gray = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1) * 0.6
  return (gray * (1 - opacity) + opacity * np.array([255.0, 60.0, 0.0])).astype(np.uint8)
