"""Milliseconds of the segmentation losses alone, value and gradient, on made-up scores at the sizes of the recipes.

python benchmarks/segmentation_loss.py [--batch=1] [--repeats=5]

An image shows `present` of the classes, in blobs; the scores favor the true class, as half-way through training.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from vpd_jax.tasks.segmentation.task import Segmentation

# name: (side, classes, classes in one image, stride of the scores)
SIZES = {"1024x1024x19": (1024, 19, 14, 4), "512x512x150": (512, 150, 12, 4)}
LOSSES = {"CE": {}, "CE + Lovász": {"lovasz": 1.0}, "CE + Lovász + auxiliary": {"lovasz": 1.0, "auxiliary": 0.4}}

BATCH = flags.DEFINE_integer("batch", 1, "images, each a group of its own")
REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs; the best is reported")


def random_scores(side: int, classes: int, present: int, batch: int) -> tuple[jax.Array, jax.Array]:
  """Scores at the size of the image, float32 [B, 1, H, W, K], and labels, int32 [B, 1, H, W]."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, present, (batch, 1, side // 64, side // 64))
  label = coarse.repeat(64, axis=2).repeat(64, axis=3) * (classes // present)
  label = jnp.asarray(np.where(rng.random(label.shape) < 0.05, 255, label), jnp.int32)
  noise = 2 * jax.random.normal(jax.random.key(0), (*label.shape, classes))
  return noise + 4 * (label[..., None] == jnp.arange(classes)), label


def main(_: list[str]) -> None:
  print(f"{jax.devices()[0].device_kind}, batch {BATCH.value}, value and gradient, best of {REPEATS.value}")
  for size, (side, classes, present, stride) in SIZES.items():
    logits, label = random_scores(side, classes, present, BATCH.value)
    for name, options in LOSSES.items():
      task = Segmentation(classes=classes, **options)
      outputs = {"logits": logits}
      if "auxiliary" in options:
        outputs["aux_logits"] = logits[:, :, :: stride * 4, :: stride * 4]

      def total(outputs, label, task=task):
        return jax.vmap(task.loss)(outputs, {"label": label}).value.sum()

      step = jax.jit(jax.value_and_grad(total))
      jax.block_until_ready(step(outputs, label))
      times = []
      for _ in range(REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(step(outputs, label))
        times.append(1e3 * (time.perf_counter() - start))
      print(f"{size:14} {name:24} {min(times):8.1f} ms")


if __name__ == "__main__":
  app.run(main)
