"""People per second of processor time of the pose input: decoding, and the augmentation at each size of the crop.

python benchmarks/pose_input_speed.py --folder=DIR

Writes generated 640x480 JPEG pictures with people of COCO's form, and takes training examples in one thread. Everything
is in the page cache: this is the cost of computing, not of a disk. Give --root for a copy of COCO instead.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import numpy as np

from vpd_jax.data.coco_pose import CocoPose
from vpd_jax.data.keypoints import COCO

SIZE = (480, 640)
CROPS = ((256, 192), (384, 288), (512, 384), (1024, 768))


def write_files(root: Path, count: int) -> None:
  """Smooth pictures with noise on top, about as hard to compress as photographs, two people in each."""
  rng = np.random.default_rng(0)
  (root / "annotations").mkdir(parents=True)
  (root / "train2017").mkdir()
  images, people = [], []
  for index in range(count):
    coarse = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC).astype(np.int16)
    picture = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    images.append({"id": index, "file_name": f"{index:012}.jpg", "height": SIZE[0], "width": SIZE[1]})
    cv2.imwrite(str(root / "train2017" / images[-1]["file_name"]), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
    for _ in range(2):
      x, y, w, h = rng.uniform((0, 0, 60, 120), (400, 200, 200, 270)).tolist()
      points = np.stack([rng.uniform(x, x + w, 17), rng.uniform(y, y + h, 17), np.full(17, 2)], axis=1)
      person = {"image_id": index, "category_id": 1, "bbox": [x, y, w, h], "keypoints": points.ravel().tolist()}
      people.append(person)
  category = {"id": 1, "name": "person", "keypoints": list(COCO.names)}
  content = {"images": images, "annotations": people, "categories": [category]}
  (root / "annotations/person_keypoints_train2017.json").write_text(json.dumps(content))


def per_second(work: Callable[[int], object], count: int, rounds: int) -> float:
  """Best of the rounds, calls per second of processor time."""
  best = 0.0
  for _ in range(rounds):
    start = time.process_time()
    for index in range(count):
      work(index)
    best = max(best, count / (time.process_time() - start))
  return best


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=Path, help="for generated files; kept for the next call")
  parser.add_argument("--root", type=Path, help="a copy of COCO")
  parser.add_argument("--count", type=int, default=200, help="people")
  parser.add_argument("--rounds", type=int, default=3)
  options = parser.parse_args()
  if not (options.folder or options.root):
    parser.error("give --folder or --root")
  root = options.root or options.folder / f"coco_{options.count}"
  if not root.exists():
    write_files(root, -(-options.count // 2))
  cv2.setNumThreads(0)
  rng = np.random.default_rng(0)
  for crop in CROPS:
    data = CocoPose(root=str(root), crop=crop, complete=False, boxes="annotated")
    source = data.source("train")
    count = min(len(source), options.count)
    held = [source[index] for index in range(min(count, 20))]
    if crop == CROPS[0]:
      print(f"decoding: {per_second(lambda i, s=source: s[i], count, options.rounds):.0f} people/s of one core")
    chain = lambda i, d=data, h=held: d.train_transform(h[i % len(h)], rng, 0)
    both = lambda i, d=data, s=source: d.train_transform(s[i], rng, 0)
    speeds = [per_second(work, count, options.rounds) for work in (chain, both)]
    print("{} x {}: the chain from memory {:.0f}, with decoding {:.0f} people/s of one core".format(*crop, *speeds))
  sizes = [path.stat().st_size for path in (root / "train2017").iterdir()]
  print(f"mean size of a picture {np.mean(sizes) / 1e3:.0f} kB")


if __name__ == "__main__":
  main()
