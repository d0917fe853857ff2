"""Frames in the layout of NYU Depth v2, small."""

import cv2
import numpy as np

TRAIN = ["kitchen_0028b/{}_00045", "study_room_0004/{}_00001", "nyu_office_0/{}_00000"]
TEST = ["bathroom/{}_00045", "office_kitchen/{}_00411"]


def write_frames(folder, names, size=(48, 64)):
  """Frames in BTS's layout: JPEG and millimeters, with a hole in the depth. Returns the lines of their list."""
  rng, lines = np.random.default_rng(0), []
  for name in names:
    image, depth = folder / (name.format("rgb") + ".jpg"), folder / (name.format("sync_depth") + ".png")
    image.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(image), cv2.resize(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8), size[::-1]))
    millimeters = rng.integers(500, 9999, size).astype(np.uint16)
    millimeters[:4] = 0
    cv2.imwrite(str(depth), millimeters)
    lines.append(f"/{image.relative_to(folder)} /{depth.relative_to(folder)}")
  return lines
