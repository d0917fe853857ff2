"""Seconds per sentence of referring segmentation, with and without the encoder cache.

python scripts/benchmark_encoder_cache.py --config=configs/rooms.py:referring,tiny
python scripts/benchmark_encoder_cache.py --config=configs/refcoco_refer.py:refcoco --config.data.root=/data/refer \
    --config.dtype=bfloat16 --batches=20

Times evaluation and training on the same preloaded batches in three modes: VAE and text encoder inside the network, for
every sentence, as released; before the network, once per image of a pass (data.cache=off); and cached in memory.
Weights are random, since they do not affect the time. The VAE is treated as frozen.
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
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import encoder_cache, evaluate
from vpd_jax.training import compilation
from vpd_jax.types import Cache

BATCHES = flags.DEFINE_integer("batches", 8, "of each pass", lower_bound=2, flag_values=benchmark.FLAGS)
MODES = ("inside the network", "once per image", "cached in memory")


def seconds(run: Callable[[Any], Any], batches: Callable[[], Iterator[Any]], passes: int = 2) -> float:
  """The shortest time of a pass after a warm-up; batches are prepared while the device works."""
  times = []
  for _ in range(passes + 1):
    begin, last = time.perf_counter(), None
    for batch in batches():
      last = run(batch)
    jax.block_until_ready(last)
    times.append(time.perf_counter() - begin)
  return min(times[1:])


def measure(config: Any) -> dict[str, dict[str, float]]:
  """Seconds per row by split and mode; prints the numbers of rows and images."""
  config = config.copy_and_resolve_references().unlock()
  config.optim.lr_groups = ((r"/vae/", None), (r"", 1.0))
  config.optim.accumulation = 1
  exp = experiment.assemble(config.lock())
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  state = benchmark.random_state(config, exp, mesh)
  weights, spread = (state.params, state.frozen, state.stats), sharding.batch_sharding(mesh)
  dataset = experiment.dataset(config, exp)
  common = {"keys": {*exp.keys, *exp.task.eval_needs, "image_id"}, "prepare": exp.method.prepare}
  sources = {
    "evaluation": pipeline.eval_batches(dataset, batch_size=config.eval.batch_size, **common),
    "training": pipeline.train_batches(
      dataset, batch_size=config.data.batch_size, seed=0, **common | {"keys": exp.keys}
    ),
  }
  step = jax.jit(evaluate.make_step(config, exp))
  compiled: dict[frozenset[str], Any] = {}

  def trained(batch: Any) -> Any:
    nonlocal state
    names = frozenset(batch)
    if names not in compiled:
      compiled[names] = compilation.compile_step(config, exp, mesh, batch)
    state, logs = compiled[names](state, batch)
    return logs["train/loss"]

  runs = {"evaluation": lambda batch: step(weights, batch)[0], "training": trained}
  found: dict[str, dict[str, float]] = {}
  frozen = jax.device_get(state.frozen)  # a training step takes the state over
  for split, source in sources.items():
    rows = [batch for batch, _ in zip(source, range(BATCHES.value), strict=False)]
    source.close()
    count = sum(len(batch["image"]) for batch in rows)
    found[split] = {}
    for mode in MODES:
      dataset.encoder_cache = Cache("memory" if mode == "cached in memory" else "off", "")
      encodings = encoder_cache.EncoderCache(config, exp, dataset, mesh)
      encode = (lambda local: local) if mode == "inside the network" else lambda local: encodings(local, frozen)  # noqa: B023
      passed = lambda: pipeline.Prefetch(encode(pipeline.HostBatches(rows)), spread)  # noqa: B023
      found[split][mode] = seconds(runs[split], passed) / count
    images = len({int(i) for batch in rows for i in batch["image_id"]}) if split == "evaluation" else None
    print(f"{split}: {count} sentences" + (f" about {images} images" if images else ""), flush=True)
    first = found[split][MODES[0]]
    for mode, value in found[split].items():
      print(f"  {mode:20} {1e3 * value:9.2f} ms per sentence, {first / value:.2f} times as fast", flush=True)
    if split == "evaluation":
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
