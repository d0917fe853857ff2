"""Pictures and label files, and what lies beside them on some disks."""

import cv2
import numpy as np


def write_pairs(images, masks, numbers, names, size=(40, 60), gray=False):
  """Pictures and label files of random blocks of `numbers`."""
  images.mkdir(parents=True, exist_ok=True)
  masks.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for name in names:
    image = rng.integers(0, 256, (4, 6, 1 if gray else 3), dtype=np.uint8)
    cv2.imwrite(str(images / f"{name}.jpg"), cv2.resize(image, size[::-1]))
    blocks = rng.choice(np.array(numbers, np.uint8), (4, 6))
    cv2.imwrite(str(masks / f"{name}.png"), cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST))


def add_companions(root):
  """What a disk that was in a Mac holds: a ._NAME beside every file, .DS_Store, folders of its own."""
  for path in [path for path in root.rglob("*") if path.is_file()]:
    path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (path.parent / ".DS_Store").write_bytes(b"\0")
    for name in ("__MACOSX", ".ipynb_checkpoints"):
      (path.parent / name).mkdir(exist_ok=True)
      (path.parent / name / path.name).write_bytes(path.read_bytes())
