"""Images per second of processor time of the segmentation input: decoding, and the training chain at 512.

python benchmarks/segmentation_input_speed.py --folder=/tmp/segmentation_speed

Writes generated 683x512 JPEG pictures with grey PNG annotations in ADE20K's layout, and takes training examples in one
thread. Everything is in the page cache: this is the cost of computing, not of a disk.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import numpy as np

from vpd_jax.data import ade20k

SIZE = (512, 683)


def write_files(root: Path, count: int) -> None:
  """Smooth pictures with noise on top, about as hard to compress as photographs, and blobs of classes."""
  rng = np.random.default_rng(0)
  for kind, split in (("images", "training"), ("annotations", "training")):
    (root / kind / split).mkdir(parents=True, exist_ok=True)
  for index in range(count):
    coarse = rng.integers(0, 255, (64, 85, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC).astype(np.int16)
    picture = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    levels = cv2.resize(rng.random((8, 10), np.float32), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    numbers = rng.permutation(151)[np.clip(levels * 12, 0, 11).astype(int)].astype(np.uint8)
    cv2.imwrite(str(root / "images/training" / f"ADE_train_{index:08}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
    cv2.imwrite(str(root / "annotations/training" / f"ADE_train_{index:08}.png"), numbers)


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
  parser.add_argument("--folder", type=Path, required=True, help="for the files; kept for the next call")
  parser.add_argument("--count", type=int, default=100, help="pictures")
  parser.add_argument("--rounds", type=int, default=3)
  options = parser.parse_args()
  root = options.folder / f"ade_{options.count}"
  if not (root / "images").exists():
    write_files(root, options.count)
  cv2.setNumThreads(0)
  data = ade20k.Ade20k(root=str(root), complete=False)
  source = data.source("train")
  held = [source[index] for index in range(min(len(source), 20))]
  rng = np.random.default_rng(0)
  for name, work in (
    ("decoding", lambda index: source[index]),
    ("the chain, from memory", lambda index: data.train_transform(held[index % len(held)], rng, 0)),
    ("decoding and the chain", lambda index: data.train_transform(source[index], rng, 0)),
  ):
    print(f"{name}: {per_second(work, len(source), options.rounds):.0f} images/s of one core")
  sizes = [np.mean([path.stat().st_size for path in (root / kind).rglob("*.*")]) for kind in ("images", "annotations")]
  print("mean size of a picture {:.0f} kB, of an annotation {:.1f} kB".format(*(size / 1e3 for size in sizes)))


if __name__ == "__main__":
  main()
