"""Images per second of any config's training input, from its files and from ArrayRecord shards of them, per worker.

python benchmarks/config_input_speed.py --config=configs/nyu_depth.py --root=/data/nyu --shards=/data/nyu_shards
python benchmarks/config_input_speed.py --config=configs/ade20k_seg.py --root=/data/ADEChallengeData2016 --workers 0 4 8

`--shards` is a folder that scripts/prepare_data.py wrote from the same data; without it only the files are read. Files
and shards take turns, and the best of the rounds counts, for other programs disturb. With 0 workers threads of this
process read; the last column is the rate of one of the processes.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from vpd_jax import assemble, config_file
from vpd_jax.data import pipeline


def datasets(config: Any, product: Any, root: str, shards: str) -> dict[str, Any]:
  """The config's data set by format."""
  made, places = {}, {"files": root} | ({"tfds": shards} if shards else {})
  for form, place in places.items():
    changed = config.copy_and_resolve_references().unlock()
    changed.data.root = place or changed.data.root
    if "format" in changed.data:
      changed.data.format = form
    elif form != "files":
      raise ValueError(f"data set {changed.data.name!r} is read from its files only; leave --shards out.")
    made[form] = assemble.dataset(changed.lock(), product)
  return made


def batches_per_second(config: Any, product: Any, dataset: Any, workers: int, batches: int) -> float:
  """Images per second of training batches; those made while the workers start do not count."""
  size = config.data.batch_size
  iterator = pipeline.train_batches(
    dataset, batch_size=size, seed=0, workers=workers, keys=product.keys, prepare=product.method.prepare
  )
  for _ in range(4 * max(workers, 1)):
    next(iterator)
  start = time.perf_counter()
  for _ in range(batches):
    next(iterator)
  seconds = time.perf_counter() - start
  iterator.close()
  return batches * size / seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="config file and words, like configs/nyu_depth.py")
  parser.add_argument("--root", default="", help="of the files; default: the config's")
  parser.add_argument("--shards", default="", help="folder of the shards")
  parser.add_argument("--batches", type=int, default=40, help="that are timed")
  parser.add_argument("--workers", type=int, nargs="+", default=(0, 2))
  parser.add_argument("--rounds", type=int, default=2)
  options = parser.parse_args()
  config = config_file.load(options.config)
  product = assemble.assemble(config)
  made = datasets(config, product, options.root, options.shards)
  print(f"{config.data.name}, batches of {config.data.batch_size}, crops of {tuple(config.data.crop)}, images a second")
  print(f"{'workers':8}" + "".join(f"{form:>10}{'each':>10}" for form in made))
  for workers in options.workers:
    best = dict.fromkeys(made, 0.0)
    for _ in range(options.rounds):
      for form, dataset in made.items():
        best[form] = max(best[form], batches_per_second(config, product, dataset, workers, options.batches))
    print(
      f"{workers:<8}" + "".join(f"{rate:10.1f}{rate / max(workers, 1):10.1f}" for rate in best.values()), flush=True
    )


if __name__ == "__main__":
  main()
