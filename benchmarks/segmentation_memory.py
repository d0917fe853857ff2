"""Memory of the process while mean IoU is taken over many predictions.

python benchmarks/segmentation_memory.py [--count=2000] [--height=512] [--width=683] [--classes=150]

A stub network of one matrix, sliding windows, scores at the size of the image, areas on the device: everything
but the network is what evaluation does. Prints the resident memory as it goes, and its growth after the first tenth.
"""

import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from vpd_jax.inference import sliding_window
from vpd_jax.tasks.segmentation.task import Segmentation

COUNT = flags.DEFINE_integer("count", 2000, "predictions")
HEIGHT = flags.DEFINE_integer("height", 512, "rows of an image")
WIDTH = flags.DEFINE_integer("width", 683, "columns of an image")
CLASSES = flags.DEFINE_integer("classes", 150, "number of classes")


def resident() -> float:
  """GiB of this process in memory (Linux)."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30


def growth(count: int, size: tuple[int, int], classes: int) -> tuple[dict[str, float], float, float]:
  """Scores, resident GiB after the first tenth of the images, and the most of it afterwards."""
  task = Segmentation(classes=classes)
  weights = jax.random.normal(jax.random.key(0), (3, classes))
  procedure = sliding_window.parse((f"slide:{min(size)}:{2 * min(size) // 3}",))
  options = {"batch_size": 2, "postprocess": sliding_window.most_probable}
  engine = sliding_window.SlidingWindowInference(lambda w, batch: batch["image"] @ w, procedure, **options)
  measure = jax.jit(lambda prediction, label: task.measure(prediction[None], {"label": label[None]}))
  labels = []

  def images():
    for i in range(count):
      rng = np.random.default_rng(i)
      coarse = rng.integers(0, classes, (16, 16)).astype(np.uint8)
      label = coarse.repeat(-(-size[0] // 16), axis=0).repeat(-(-size[1] // 16), axis=1)[: size[0], : size[1]]
      labels.append(label)
      yield engine.views({"image": rng.integers(0, 256, (*size, 3), np.uint8)})

  rows, sizes, start = [], [], time.perf_counter()
  for i, prediction in enumerate(engine(weights, images())):
    rows.append(jax.device_get(measure(prediction, labels.pop(0))))
    sizes.append(resident())
    if (i + 1) % max(count // 10, 1) == 0:
      speed = (time.perf_counter() - start) / (i + 1)
      print(f"{i + 1:6} images  {sizes[-1]:.3f} GiB  {1e3 * speed:.0f} ms each", flush=True)
  settled = max(count // 10, 1)
  scores = task.summarize({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
  return scores, max(sizes[:settled]), max(sizes[settled:])


def main(_: list[str]) -> None:
  scores, before, after = growth(COUNT.value, (HEIGHT.value, WIDTH.value), CLASSES.value)
  print(f"{scores}\n{before:.3f} GiB at most in the first tenth, {after:.3f} GiB afterwards: {after - before:+.3f}")


if __name__ == "__main__":
  app.run(main)
