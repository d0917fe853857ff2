"""Seconds per sentence of referring segmentation, with and without the work that is done once, as ratios.

python scripts/time_caching.py --config=configs/rooms.py:referring,tiny
python scripts/time_caching.py --config=configs/refcoco_refer.py:refcoco --config.data.root=/data/refer \
    --config.dtype=bfloat16 --batches=20

Evaluation and training over the same batches, which are read beforehand, in three ways: the VAE and the text encoder
inside the network for every sentence, as released; ahead of it, once for each picture of a pass (data.cache=off); and
found in memory. Weights are made up: they change no time. The VAE counts as frozen, whatever the config trains.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import benchmark
import jax
from absl import flags

from vpd_jax import experiment
from vpd_jax.data import pipeline
from vpd_jax.data.readers import referring
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import encoder_cache, evaluate
from vpd_jax.training import compilation

BATCHES = flags.DEFINE_integer("batches", 8, "of each pass", lower_bound=2, flag_values=benchmark.FLAGS)
PROTOCOLS = ("inside the network", "once a picture", "kept in memory")


def seconds(run: Callable[[Any], Any], batches: Callable[[], Iterator[Any]], passes: int = 2) -> float:
  """The shortest time of a pass, after one that compiles; batches are prepared while the device works."""
  times = []
  for _ in range(passes + 1):
    begin, last = time.perf_counter(), None
    for batch in batches():
      last = run(batch)
    jax.block_until_ready(last)
    times.append(time.perf_counter() - begin)
  return min(times[1:])


def measure(config: Any) -> dict[str, dict[str, float]]:
  """Seconds per row by mode and way; prints the rows and pictures of each."""
  config = config.copy_and_resolve_references().unlock()
  config.optim.lr_groups = ((r"/vae/", None), (r"", 1.0))
  config.optim.accumulation = 1
  product = experiment.assemble(config.lock())
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  state = benchmark.made_up_state(config, product, mesh)
  weights, spread = (state.params, state.frozen, state.stats), sharding.batch_sharding(mesh)
  dataset = experiment.dataset(config, product)
  common = {"keys": {*product.keys, *product.task.eval_needs, "image_id"}, "prepare": product.method.prepare}
  sources = {
    "evaluation": pipeline.eval_batches(dataset, batch_size=config.eval.batch_size, **common),
    "training": pipeline.train_batches(
      dataset, batch_size=config.data.batch_size, seed=0, **common | {"keys": product.keys}
    ),
  }
  step = jax.jit(evaluate.make_step(config, product))
  compiled: dict[frozenset[str], Any] = {}

  def trained(batch: Any) -> Any:
    nonlocal state
    names = frozenset(batch)
    if names not in compiled:
      compiled[names] = compilation.compile_step(config, product, mesh, batch)
    state, logs = compiled[names](state, batch)
    return logs["train/loss"]

  runs = {"evaluation": lambda batch: step(weights, batch)[0], "training": trained}
  found: dict[str, dict[str, float]] = {}
  frozen = jax.device_get(state.frozen)  # a training step takes the state over
  for mode, source in sources.items():
    rows = [batch for batch, _ in zip(source, range(BATCHES.value), strict=False)]
    source.close()
    count = sum(len(batch["image"]) for batch in rows)
    found[mode] = {}
    for way in PROTOCOLS:
      dataset.cache = referring.Cache("memory" if way == "kept in memory" else "off", "")
      encodings = encoder_cache.EncoderCache(config, product, dataset, mesh)
      encode = (lambda local: local) if way == "inside the network" else lambda local: encodings(local, frozen)  # noqa: B023
      passed = lambda: pipeline.prefetch(encode(iter(rows)), spread)  # noqa: B023
      found[mode][way] = seconds(runs[mode], passed) / count
    pictures = len({int(i) for batch in rows for i in batch["image_id"]}) if mode == "evaluation" else None
    print(f"{mode}: {count} sentences" + (f" about {pictures} pictures" if pictures else ""), flush=True)
    first = found[mode][PROTOCOLS[0]]
    for way, value in found[mode].items():
      print(f"  {way:20} {1e3 * value:9.2f} ms a sentence, {first / value:.2f} times as fast", flush=True)
    if mode == "evaluation":
      del weights
      runs["evaluation"] = None
  return found


def main() -> None:
  benchmark.parse(sys.argv)
  config = benchmark.CONFIG.value
  device = jax.devices()[0].device_kind
  print(f"{jax.device_count()} x {device}, jax {jax.__version__}, crop {tuple(config.data.crop)}, {config.dtype}")
  measure(config)


if __name__ == "__main__":
  main()
