"""Label maps of a large image and of many sizes: memory above the network's own, and programs that are compiled.

python benchmarks/large_pictures.py --measure=memory [--height=3000] [--width=4000] [--ratios=1] [--flip]
python benchmarks/large_pictures.py --measure=programs [--small=few_shapes] [--ratios=0.5,1] [--flip] [--run=50]

A stub network of one matrix under the windows of configs/ade20k_seg.py: everything but the network is what
--mode=predict does. "memory" is the peak of resident memory while an image of the given size is labeled, above that
of the network's call alone. "programs" counts the shapes of windows of 2000 images whose sides are drawn
evenly, on a logarithmic scale, from 256 to 2048 pixels; then it labels some and counts all that XLA compiles.
"""

import resource
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from vpd_jax.config import loader
from vpd_jax.inference import sliding_window, tiles
from vpd_jax.prediction import protocols
from vpd_jax.tasks.segmentation.task import Segmentation

MEASURE = flags.DEFINE_enum("measure", "memory", ("memory", "programs"), "what is measured")
HEIGHT = flags.DEFINE_integer("height", 3000, "rows of the large image")
WIDTH = flags.DEFINE_integer("width", 4000, "columns of the large image")
CLASSES = flags.DEFINE_integer("classes", 0, "number of classes; 0: 150 for memory, 2 for programs")
COUNT = flags.DEFINE_integer("count", 2000, "images whose shapes are counted")
RUN = flags.DEFINE_integer("run", 50, "how many of them are labeled")
RATIOS = flags.DEFINE_list("ratios", ["1"], "scales of each image")
FLIP = flags.DEFINE_bool("flip", False, "mirrored too")
SMALL = flags.DEFINE_string("small", "", "config.eval.small_images; empty: as the config says")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "windows in one call of the network")


def stub_network(classes: int, shapes: list[tuple[int, int]]) -> types.SimpleNamespace:
  """An experiment whose network is a matrix on the colors, and that notes the shapes in which it is traced."""

  def network(weights, batch, training):
    del training
    shapes.append(batch["image"].shape[1:3])
    return {"logits": batch["image"] @ weights}

  merge = lambda weights: lambda batch, training: network(weights, batch, training)
  return types.SimpleNamespace(spec=types.SimpleNamespace(merge=merge), task=Segmentation(classes=classes))


def peak() -> float:
  """GiB of this process in memory at most (Linux)."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_image(seed: int, size: tuple[int, int]) -> np.ndarray:
  """Random colors in squares of 8 x 8 pixels, uint8 [H, W, 3]."""
  coarse = np.random.default_rng(seed).integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3), np.uint8)
  return coarse.repeat(8, axis=0).repeat(8, axis=1)[: size[0], : size[1]]


def main(_: list[str]) -> None:
  config, shapes, compiled = loader.load("configs/ade20k_seg.py"), [], []
  words = (*config.eval.test_time, *(("flip",) if FLIP.value else ()))
  config.eval.test_time = (*words, ":".join(["ms", *RATIOS.value]))
  config.eval.batch_size, config.eval.small_images = BATCH_SIZE.value, SMALL.value or config.eval.small_images
  classes = CLASSES.value or {"memory": 150, "programs": 2}[MEASURE.value]
  weights = (jax.random.normal(jax.random.key(0), (3, classes)),)
  label = protocols.SlidingWindowProtocol(config, stub_network(classes, shapes))
  if MEASURE.value == "memory":
    call = jax.jit(lambda w, image: image @ w)
    call(*weights, jnp.zeros((BATCH_SIZE.value, 512, 512, 3))).block_until_ready()
    before, image, start = peak(), random_image(0, (HEIGHT.value, WIDTH.value)), time.perf_counter()
    (result,) = label(weights, [image], [{}])
    share = np.bincount(result["label"].ravel(), minlength=classes).max() / image[..., 0].size
    print(
      f"{config.eval.test_time}, {classes} classes, {HEIGHT.value} x {WIDTH.value}: {peak() - before:.2f} GiB above "
      f"the {before:.2f} of the network's call, {time.perf_counter() - start:.0f} s, commonest class {share:.6f}"
    )
    return
  rng = np.random.default_rng(0)
  sizes = [tuple(int(256 * 8 ** rng.random()) for _ in range(2)) for _ in range(COUNT.value)]
  options, small = sliding_window.parse(config.eval.test_time), config.eval.small_images
  scaled = [tiles.scaled_size(size, options.scale, ratio) for size in sizes for ratio in options.ratios]
  windows = {tiles.window_of(size, options.window, small) for size in scaled}
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
  start = time.perf_counter()
  for i, size in enumerate(sizes[: RUN.value]):
    label(weights, [random_image(i, size)], [{}])
  count = sum(name.endswith("backend_compile_duration") for name in compiled)
  print(
    f"{config.eval.test_time}, small={small}: {len(windows)} shapes of windows of {COUNT.value} images; {RUN.value} "
    f"of them: {len(set(shapes))} shapes, {count} programs in all, {time.perf_counter() - start:.0f} s"
  )


if __name__ == "__main__":
  app.run(main)
