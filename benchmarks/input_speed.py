"""Images per second of the input, from files and from ArrayRecord shards, in one run.

python benchmarks/input_speed.py --folder=/tmp/input_speed

Writes noisy 480x640 pictures (PNG) with 16-bit depth in NYU's layout and their shards, then takes training batches with
the released augmentation. Files and shards take turns, and the best of the rounds counts, for other programs disturb.
Everything is in the page cache: this is the cost of decoding, not of a disk or a bucket.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import numpy as np

from vpd_jax.data import builders, nyu, pipeline

SIZE = (480, 640)
KEYS = ("class_id", "depth", "image")


def write_files(root: Path, count: int) -> None:
  """Smooth pictures with noise on top, about as hard to compress as photographs."""
  rng = np.random.default_rng(0)
  for split, folder in nyu.FOLDERS.items():
    lines = []
    for index in range(count if split == "train" else 1):
      names = [f"kitchen_0001/{kind}_{index:05}.png" for kind in ("rgb", "sync_depth")]
      (root / folder / names[0]).parent.mkdir(parents=True, exist_ok=True)
      coarse = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
      smooth = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC).astype(np.int16)
      picture = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
      depth = cv2.resize(rng.uniform(500, 9500, (30, 40)).astype(np.float32), SIZE[::-1]).astype(np.uint16)
      cv2.imwrite(str(root / folder / names[0]), picture)
      cv2.imwrite(str(root / folder / names[1]), depth)
      lines.append(" ".join(names))
    (root / nyu.LISTS[split][0]).write_text("\n".join(lines) + "\n")


def batches_per_second(dataset: nyu.Nyu, workers: int, batch_size: int, batches: int) -> float:
  """Images per second of training batches; those made while the workers start do not count."""
  iterator = pipeline.train_batches(dataset, batch_size=batch_size, seed=0, workers=workers, keys=KEYS)
  for _ in range(4 * max(workers, 1)):
    next(iterator)
  start = time.perf_counter()
  for _ in range(batches):
    next(iterator)
  seconds = time.perf_counter() - start
  iterator.close()
  return batches * batch_size / seconds


def reads_per_second(dataset: nyu.Nyu) -> float:
  """Examples per second of processor time, one thread, without augmentation."""
  source = dataset.source("train")
  start = time.process_time()
  for index in range(len(source)):
    source[index]
  return len(source) / (time.process_time() - start)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=Path, required=True, help="for files and shards; kept for the next call")
  parser.add_argument("--count", type=int, default=96, help="pictures")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--batches", type=int, default=40, help="that are timed")
  parser.add_argument("--workers", type=int, nargs="+", default=(0, 2))
  parser.add_argument("--rounds", type=int, default=2)
  options = parser.parse_args()
  root, shards = options.folder / f"files_{options.count}", options.folder / f"shards_{options.count}"
  if not (root / nyu.LISTS["eval"][0]).exists():
    write_files(root, options.count)
  builders.prepare(nyu.Nyu(root=str(root)), shards, name="nyu")
  formats = {"files": nyu.Nyu(root=str(root)), "tfds": nyu.Nyu(root=str(shards), format="tfds")}
  sizes = [sum(path.stat().st_size for path in (root / "sync").rglob(f"{kind}*")) for kind in ("rgb", "sync_depth")]
  print(
    f"{options.count} pictures, {sizes[0] / options.count / 1e3:.0f} kB, depth {sizes[1] / options.count / 1e3:.0f} kB"
  )
  tests = {"reading only, per CPU second": lambda dataset: reads_per_second(dataset)}
  for workers in options.workers:
    tests[f"training batches, {workers} workers"] = lambda dataset, workers=workers: batches_per_second(
      dataset, workers, options.batch_size, options.batches
    )
  print(f"{'images/s':32}" + "".join(f"{name:>10}" for name in formats))
  for name, test in tests.items():
    best = dict.fromkeys(formats, 0.0)
    for _ in range(options.rounds):
      best = {name: max(best[name], test(dataset)) for name, dataset in formats.items()}
    print(f"{name:32}" + "".join(f"{rate:10.1f}" for rate in best.values()), flush=True)


if __name__ == "__main__":
  main()
