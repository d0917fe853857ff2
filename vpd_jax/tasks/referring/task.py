"""Referring segmentation: weighted cross-entropy, overall and mean IoU per sentence, images and files.

One example is one sentence: its mask is 1 on the object it refers to and 0 elsewhere.

Source: VPD refer/train.py criterion, refer/test.py evaluate.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import UserError, check_choice
from vpd_jax.tasks import drawing, finite, label_images, result_files
from vpd_jax.tasks.referring import baselines, visualize
from vpd_jax.types import Array, Batch, Example, Fields, Loss, Outputs, Rows, Task

EVAL_AT = ("network", "original")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def weighted_cross_entropy(logits: Array, mask: Array, weights: Sequence[float]) -> Array:
  """Mean cross-entropy of two classes, weighted by class.

  sum w[t] (logsumexp(x) - x[t]) / sum w[t], over all pixels of all images.

  Args:
    logits: float32 or wider [..., 2], background first.
    mask: int or bool [...], 1 on the object.
    weights: of background and object.

  Returns:
    float [].

  Source: torch.nn.functional.cross_entropy(weight=...); VPD refer/train.py criterion.
  """
  inside = mask.astype(bool)
  losses = jax.nn.logsumexp(logits, axis=-1) - jnp.where(inside, logits[..., 1], logits[..., 0])
  weight = jnp.where(inside, *(jnp.asarray(w, logits.dtype) for w in (weights[1], weights[0])))
  return (weight * losses).sum() / weight.sum()


def resize_to_dynamic_size(margin: Array, size: Array, canvas: Sequence[int]) -> Array:
  """Bilinearly resizes a map to a size that is only known at runtime, at the top left of a canvas; no antialiasing.

  Pixel i of n reads the map at (i + 0.5) h / n - 0.5, as with torch's align_corners=False.

  Args:
    margin: float [h, w].
    size: int [2], (height, width) of the result.
    canvas: static (H, W) of the canvas.

  Returns:
    float [H, W]; repeats the border beyond `size`.
  """

  def interpolation_weights(old: int, new: Array, count: int) -> Array:
    scale = old / new.astype(margin.dtype)
    positions = jnp.clip((jnp.arange(count, dtype=margin.dtype) + 0.5) * scale - 0.5, 0, old - 1)
    distance = jnp.abs(positions[:, None] - jnp.arange(old, dtype=margin.dtype)[None])
    return jnp.maximum(1 - distance, 0)  # [count, old]

  rows, columns = (interpolation_weights(margin.shape[i], size[i], canvas[i]) for i in (0, 1))
  return jnp.einsum("hy,yx,wx->hw", rows, margin, columns, precision="highest")


class Referring(Task):
  """Segments the object that a sentence refers to; evaluates intersection and union per sentence.

  Attributes:
    eval_needs: keys of a Batch that only `measure` reads.
    output, best_metric, best_mode: see Task.
  """

  needs = frozenset({"mask"})
  result = "mask"
  best_metric, best_mode = "oIoU", "max"
  test_time_protocol = "squeezed"
  needs_truth = False
  output_descriptions = MappingProxyType(
    {
      "logits": "scores of background (0) and object (1) before the softmax, unitless",
      "result": "a pixel belongs to the object if its score 1 is above its score 0",
    }
  )

  def __init__(self, *, class_weights: tuple[float, float] = (0.9, 1.1), eval_at: str = "network"):
    """Initializes the options of loss and scores.

    Args:
      class_weights: of background and object in the loss. Release: (0.9, 1.1).
      eval_at: resolution of the evaluation: "network", the size of the network's input, to which the mask was resized
        with nearest-neighbor interpolation, as released; or "original", the size of the image, to which the scores are
        resized bilinearly.

    Raises:
      ValueError: weights that are not two positive numbers, unknown `eval_at`.
    """
    if len(class_weights) != 2 or min(class_weights) <= 0:
      raise UserError(
        f"task.class_weights={class_weights} must be two numbers above 0, of background and object, such as (0.9, 1.1)."
      )
    check_choice("task.eval_at", eval_at, EVAL_AT)
    self.class_weights, self.eval_at = tuple(map(float, class_weights)), eval_at
    self.output = {"classes": 2}
    self.eval_needs = frozenset({"full_mask", "full_size"} if eval_at == "original" else ())

  def loss(self, outputs: Outputs, batch: Batch) -> Loss:
    """Weighted cross-entropy of one group of images, and the pixel accuracy as a log."""
    logits, mask = outputs["logits"], batch["mask"]
    _check_size(logits, mask)
    value = weighted_cross_entropy(logits, mask, self.class_weights)
    correct = (logits[..., 1] > logits[..., 0]) == mask.astype(bool)
    return Loss(value, jnp.ones((), value.dtype), {"pixel_accuracy": correct.mean(dtype=jnp.float32)})

  def predict(self, outputs: Outputs) -> Array:
    """Scores of background and object, float [B, H, W, 2], before the softmax."""
    return outputs["logits"]

  def decide(self, scores: Array) -> Array:
    """Scores [..., 2] to bool [...], true on the object."""
    return scores[..., 1] > scores[..., 0]

  def measure(self, prediction: Array, batch: Batch) -> dict[str, Array]:
    """{"intersection", "union"}: pixels of each sentence, int32 [B] each; "not_finite", see finite.count.

    Args:
      prediction: scores float [B, H, W, 2]; the larger one determines the class.
      batch: "mask" [B, H, W], 1 on the object; for "original" also "full_mask" [B, H', W'], a canvas with the mask of
        the image at its top left, and "full_size" int [B, 2], the (height, width) of the image.
    """
    counts = {finite.KEY: finite.count(prediction)}
    margin = prediction[..., 1] - prediction[..., 0]
    margin = jnp.where(jnp.isfinite(margin), margin, 0)  # no object
    if self.eval_at == "network":
      _check_size(prediction, batch["mask"])
      return counts | jax.vmap(_overlap)(margin > 0, batch["mask"].astype(bool))
    canvas = batch["full_mask"].shape[1:3]

    def one(margin: Array, mask: Array, size: Array) -> dict[str, Array]:
      rows, columns = (jnp.arange(side) < size[i] for i, side in enumerate(canvas))
      valid = rows[:, None] & columns[None]
      return _overlap(valid & (resize_to_dynamic_size(margin, size, canvas) > 0), valid & mask.astype(bool))

    return counts | jax.vmap(one)(margin, batch["full_mask"], batch["full_size"])

  def summarize(self, rows: Rows) -> dict[str, float]:
    """Scores over all sentences, all between 0 and 1 except for the last two.

    Returns:
      "oIoU", sum of intersections over sum of unions; "mIoU", mean over sentences, where an empty union counts as 0;
      "P@0.5" to "P@0.9", share of sentences with at least this IoU; "sentences"; "not_finite".

    Source: VPD refer/test.py evaluate.
    """
    intersection, union = (rows[name].astype(np.int64) for name in ("intersection", "union"))
    iou = np.where(union > 0, intersection / np.maximum(union, 1), 0.0)
    return {
      "oIoU": float(intersection.sum() / max(union.sum(), 1)),
      "mIoU": float(iou.mean()),
      **{f"P@{threshold}": float((iou >= threshold).mean()) for threshold in THRESHOLDS},
      "sentences": float(len(iou)),
      **finite.total(rows),
    }

  def baselines(self, train: Iterable[Example], evaluation: Iterable[Example]) -> dict[str, float]:
    """Overall IoU of two predictors that use neither sentence nor image.

    "constant_mask": the constant mask that is best on the training examples; "everything": all pixels.

    Raises:
      ValueError: no training example has an object.
    """
    constant = baselines.best_constant([example["mask"] for example in train])
    rows: dict[str, list[tuple[int, int]]] = {"constant_mask": [], "everything": []}
    for example in evaluation:
      mask = example["mask"].astype(bool)
      if self.eval_at == "original":
        height, width = (int(side) for side in example["full_size"])
        mask = example["full_mask"][:height, :width].astype(bool)
      guesses = {"constant_mask": baselines.nearest(constant, mask.shape), "everything": np.ones_like(mask)}
      for name, guess in guesses.items():
        rows[name].append((int((guess & mask).sum()), int((guess | mask).sum())))
    total = {name: np.array(row).sum(axis=0) for name, row in rows.items()}
    return {name: float(inside / max(union, 1)) for name, (inside, union) in total.items()}

  def panel(self, example: Example, prediction: np.ndarray) -> np.ndarray:
    """Image, image with mask, and image with prediction side by side, above the sentence: uint8 [H + 2 h, 3 W, 3]."""
    image, mask = example["image"], example["mask"].astype(bool)
    shown = (visualize.overlay(x, image) for x in (np.zeros_like(mask), mask, _object(prediction)))
    parts = list(zip(("input", "truth", "prediction"), shown, strict=True))
    return visualize.titled(drawing.row(parts), str(example.get("sentence", "")))

  def save(self, stem: Path, prediction: np.ndarray, extra: Fields, image: np.ndarray | None = None) -> list[Path]:
    """Writes the mask of one sentence; files appear only when complete, the JSON last.

    Args:
      stem: path without suffix: stem.mask.png (255 on the object, else 0), stem.overlay.png (the object in color over
        the image, above the sentence and a note if nothing was found), stem.json.
      prediction: bool or int [H, W], 1 on the object; or scores float [H, W, 2].
      extra: additional entries for the JSON, including "sentence". The JSON contains the object's share and box (left,
        top, width, height in pixels, None if nothing was found).
      image: uint8, or float in [0, 1], [H, W, 3], the background; None: black.
    """
    mask = _object(prediction)
    background = np.zeros((*mask.shape, 3), np.uint8) if image is None else image
    title = str(extra.get("sentence", "")) + ("" if mask.any() else " (nothing found)")
    picture = visualize.titled(visualize.overlay(mask, background), title)
    found = {"share": round(float(mask.mean()), 6), "box": visualize.box(mask), "size": list(mask.shape)}
    parts = {
      ".mask.png": lambda path: label_images.write_colors(path, mask.astype(np.uint8) * 255),
      ".overlay.png": lambda path: label_images.write_colors(path, picture),
    }
    return result_files.write_result(stem, parts, {**found, **extra})


def _overlap(prediction: Array, mask: Array) -> dict[str, Array]:
  """Number of pixels in the intersection and in the union of bool [H, W]."""
  count = lambda which: which.sum(dtype=jnp.int32)
  return {"intersection": count(prediction & mask), "union": count(prediction | mask)}


def _object(prediction: np.ndarray) -> np.ndarray:
  """Converts scores [H, W, 2], or a mask, to bool [H, W]."""
  return prediction[..., 1] > prediction[..., 0] if prediction.ndim == 3 else prediction.astype(bool)


def _check_size(logits: Array, mask: Array) -> None:
  if logits.shape[:3] != mask.shape:
    raise UserError(
      f"the scores have the size {logits.shape[1:3]}, the masks {mask.shape[1:]}; data.crop must be that of both."
    )
