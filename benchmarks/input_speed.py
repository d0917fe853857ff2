"""Images per second of the training input of every data set, per worker, from files and from ArrayRecord shards.

python benchmarks/input_speed.py --folder=/tmp/inputs                                 # synthetic data of all sets
python benchmarks/input_speed.py --folder=/tmp/inputs --only nyu --workers 0 2        # and batches, with workers
python benchmarks/input_speed.py --config=configs/nyu_depth.py --root=/data/nyu --shards=/data/nyu_shards --workers 0 8

`--shards` is a folder that scripts/prepare_data.py wrote from the same data; without it only the files are read. First
comes what one core does in a second of processor time: reading and decoding alone, then with the augmentation of
training. Batches with N workers are timed by the clock; with 0, threads of this process read. Files and shards take
turns, and the best of the rounds is reported. All files are in the page cache, so that this is the cost of
computation, not of a disk or a bucket.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import numpy as np
import synthetic_data
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.data import pipeline
from vpd_jax.data.shards import writer
from vpd_jax.files import atomic

CONFIGS = {
  "nyu": "configs/nyu_depth.py:vpd",
  "kitti": "configs/kitti_depth.py:vpd",
  "ade20k": "configs/ade20k_seg.py:vpd",
  "cityscapes": "configs/cityscapes_seg.py:meta_prompts",
  "refcoco": "configs/refcoco_refer.py:refcoco",
  "coco_pose": "configs/coco_pose.py:vpd",
}


def synthetic(name: str, folder: Path, count: int) -> tuple[ConfigDict, dict[str, str]]:
  """The config of a synthetic data set, and where its files and shards are, written where they are not."""
  config = loader.load(CONFIGS[name]).unlock()
  if "complete" in config.data:
    config.data.complete = False
  if "tokenizer" in config.method:
    config.method.tokenizer = "words"  # CLIP's needs its files
  places = {form: folder / f"{name}_{count}_{form}" for form in ("files", "tfds")}
  if not places["files"].exists():
    with atomic.beside(places["files"]) as unfinished:
      unfinished.mkdir()
      synthetic_data.WRITERS[name](unfinished, count)
  config.data.root = str(places["files"])
  writer.prepare(experiment.dataset(config, experiment.assemble(config)), places["tfds"], name=name, splits=("train",))
  return config.lock(), {form: str(place) for form, place in places.items()}


def datasets(config: ConfigDict, exp: experiment.Experiment, places: dict[str, str]) -> dict[str, Any]:
  """The config's data set by form: "files", "tfds"."""
  made = {}
  for form, place in places.items():
    changed = config.copy_and_resolve_references().unlock()
    changed.data.root = place or changed.data.root
    if "format" in changed.data:
      changed.data.format = form
    elif form != "files":
      raise ValueError(f"data set {changed.data.name!r} is read from its files only; leave --shards out.")
    made[form] = experiment.dataset(changed.lock(), exp)
  return made


def per_core(work: Callable[[int], Any], count: int) -> float:
  """Calls per second of processor time, in one thread."""
  start = time.process_time()
  for index in range(count):
    work(index)
  return count / (time.process_time() - start)


def batches_per_second(
  config: ConfigDict, exp: experiment.Experiment, dataset: Any, workers: int, batches: int
) -> float:
  """Images per second of training batches; those made while the workers start do not count."""
  size = min(config.data.batch_size, 32)
  iterator = pipeline.train_batches(
    dataset, batch_size=size, seed=0, workers=workers, keys=exp.keys, prepare=exp.method.prepare
  )
  for _ in range(4 * max(workers, 1)):
    next(iterator)
  start = time.perf_counter()
  for _ in range(batches):
    next(iterator)
  seconds = time.perf_counter() - start
  iterator.close()
  return batches * size / seconds


def measure(
  config: ConfigDict, places: dict[str, str], *, count: int, workers: list[int], batches: int, rounds: int
) -> list[list[str]]:
  """A row of Markdown for each form; see the columns in `main`."""
  exp = experiment.assemble(config)
  made = datasets(config, exp, places)
  works: dict[str, Callable[[Any], float]] = {"decoding": _decoding(count), "all": _whole(count)}
  for n in workers:
    works[str(n)] = lambda dataset, n=n: batches_per_second(config, exp, dataset, n, batches)
  best = {form: dict.fromkeys(works, 0.0) for form in made}
  for _ in range(rounds):
    for form, dataset in made.items():
      best[form] = {name: max(best[form][name], work(dataset)) for name, work in works.items()}
  words = {"files": "files", "tfds": "ArrayRecord"}
  crop = "{} x {}".format(*config.data.crop)
  return [[config.data.name, crop, words[form], *(f"{rate:.0f}" for rate in best[form].values())] for form in made]


def _decoding(count: int) -> Callable[[Any], float]:
  def work(dataset: Any) -> float:
    source = dataset.source("train")
    return per_core(source.__getitem__, min(count, len(source)))

  return work


def _whole(count: int) -> Callable[[Any], float]:
  def work(dataset: Any) -> float:
    source, rng = dataset.source("train"), np.random.default_rng(0)
    return per_core(lambda index: dataset.train_transform(source[index], rng, index), min(count, len(source)))

  return work


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--folder", type=Path, help="for synthetic files and shards, which are reused")
  parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="synthetic data sets")
  parser.add_argument("--config", help="config file and words, in place of synthetic data")
  parser.add_argument("--root", default="", help="of its files; default: the config's")
  parser.add_argument("--shards", default="", help="folder of its shards")
  parser.add_argument("--count", type=int, default=60, help="examples; generated, and timed in one thread")
  parser.add_argument("--workers", type=int, nargs="*", default=[], help="also batches, with so many workers")
  parser.add_argument("--batches", type=int, default=20, help="that are timed")
  parser.add_argument("--rounds", type=int, default=3)
  options = parser.parse_args()
  if bool(options.folder) == bool(options.config):
    parser.error("give --folder=DIR for synthetic data, or --config=FILE for data of your own")
  cv2.setNumThreads(0)
  heads = [
    "data set",
    "crop",
    "from",
    "decoding",
    "with augmentation",
    *(f"batches, {n} workers" for n in options.workers),
  ]
  print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
  times = {name: getattr(options, name) for name in ("count", "workers", "batches", "rounds")}
  for name in options.only if options.folder else [""]:
    if options.folder:
      config, places = synthetic(name, options.folder, options.count)
    else:
      config = loader.load(options.config)
      places = {"files": options.root} | ({"tfds": options.shards} if options.shards else {})
    for row in measure(config, places, **times):
      print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
  main()
