"""Semantic segmentation: the losses of mmsegmentation, mean IoU from areas, images and files.

Source: mmsegmentation 0.30 models/losses, models/decode_heads/decode_head.py losses, core/evaluation/metrics.py.
"""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import UserError
from vpd_jax.tasks import drawing, finite, label_images, result_files
from vpd_jax.tasks.segmentation import baselines
from vpd_jax.tasks.segmentation.lovasz import lovasz_softmax
from vpd_jax.types import Array, Batch, DatasetInfo, Example, Fields, Loss, Outputs, Rows, Task

MAX_CLASSES = 255  # a label is one byte, and one value means "no label"


def cross_entropy(logits: Array, label: Array, *, ignore_label: int = 255, avg_non_ignore: bool = False) -> Array:
  """Cross-entropy of the labeled pixels, summed and divided by the number of all pixels.

  Args:
    logits: float32 or wider [..., K].
    label: int [...]; `ignore_label` marks pixels without a label. Other values outside 0 .. K - 1 result in NaN.
    ignore_label: see `label`.
    avg_non_ignore: divide by the number of labeled pixels instead. Release: False.

  Returns:
    float []; 0 if no pixel is labeled.

  Source: mmsegmentation 0.30 models/losses/cross_entropy_loss.py.
  """
  valid = label != ignore_label
  unknown = valid & ((label < 0) | (label >= logits.shape[-1]))
  losses = jax.nn.logsumexp(logits, axis=-1) - _of_label(logits, label)
  total = jnp.where(unknown, jnp.nan, jnp.where(valid, losses, 0)).sum()
  count = valid.sum() if avg_non_ignore else label.size
  return total / jnp.maximum(count, 1).astype(logits.dtype)


def _of_label(logits: Array, label: Array) -> Array:
  """The score of the true class: [..., K] to [...]."""
  # By comparison instead of indexing, whose gradient is a scatter.
  return jnp.where(label[..., None] == _numbers(logits), logits, 0).sum(axis=-1)


def _numbers(logits: Array) -> Array:
  """0 .. K - 1 along the last axis of `logits`."""
  return jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))


def accuracy(logits: Array, label: Array, *, ignore_label: int = 255) -> Array:
  """Percentage of the labeled pixels whose class has the highest score; 0 if no pixel is labeled.

  Source: mmsegmentation 0.30 models/losses/accuracy.py.
  """
  valid = label != ignore_label
  correct = valid & (_of_label(logits, label) >= logits.max(axis=-1))
  return 100 * correct.sum().astype(logits.dtype) / jnp.maximum(valid.sum(), 1).astype(logits.dtype)


def resized(logits: Array, size: Sequence[int]) -> Array:
  """Bilinearly resizes [B, h, w, K], as with torch's align_corners=False."""
  if logits.shape[1:3] == tuple(size):
    return logits
  return jax.image.resize(logits, (logits.shape[0], *size, logits.shape[3]), "linear", antialias=False)


def areas(prediction: Array, label: Array, classes: int, *, ignore_label: int = 255) -> dict[str, Array]:
  """Number of labeled pixels of each class in one image.

  Args:
    prediction: int [H, W], 0 .. K - 1.
    label: int [H, W]; `ignore_label` and other values outside 0 .. K - 1 mark pixels that are not evaluated.
    classes: K.
    ignore_label: see `label`.

  Returns:
    int32 [K] each: "intersect", where both have the class; "predicted"; "labeled".

  Source: mmsegmentation 0.30 core/evaluation/metrics.py intersect_and_union.
  """
  prediction, label = prediction.ravel(), label.ravel().astype(jnp.int32)
  # Outside of an image the label is tiles.OUTSIDE_LABEL, independent of the ignored label.
  valid = (label != ignore_label) & (label >= 0) & (label < classes)
  one = jnp.ones_like(label)
  # Invalid pixels are counted as class K.
  count = lambda which, where: jax.ops.segment_sum(one, jnp.where(where, which, classes), classes + 1)[:classes]
  return {
    "intersect": count(label, valid & (prediction == label)),
    "predicted": count(prediction.astype(jnp.int32), valid),
    "labeled": count(label, valid),
  }


def merged(entries: tuple[str, ...], names: tuple[str, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """(name, ids of its parts) of each class after merging, in the order of first parts; see Segmentation.

  Raises:
    ValueError: in one line, for all entries with invalid syntax, or with unknown or repeated classes; for two classes
      of one name.
  """
  first, used, invalid = {}, set(), []
  for entry in entries:
    name, _, parts = entry.partition("=")
    ids = [names.index(part) for part in parts.split("+") if part in names]
    if not name or len(ids) != len(parts.split("+")) or len(set(ids) | used) != len(ids) + len(used):
      invalid.append(entry)
      continue
    used |= set(ids)
    first[min(ids)] = (name, tuple(sorted(ids)))
  if invalid:
    raise UserError(
      f"task.merge has {invalid}; write 'NEW=NAME+NAME..' with classes of {', '.join(names)}, each in one entry only."
    )
  result = tuple(first.get(k, (name, (k,))) for k, name in enumerate(names) if k in first or k not in used)
  count = collections.Counter(name for name, _ in result)
  if twice := [name for name, _ in first.values() if count[name] > 1]:
    raise UserError(
      f"task.merge leaves several classes named {', '.join(sorted(set(twice)))}; choose another NEW, or merge them all."
    )
  return result


def merge_description(merge: tuple[tuple[str, tuple[int, ...]], ...], names: tuple[str, ...]) -> str:
  """Says in words what `Segmentation.decide` does with merged classes, from `merged`, of the classes `names`."""
  sums = [(name, " + ".join(names[k] for k in parts)) for name, parts in merge]
  changed = [f"{name} = {parts}" for name, parts in sums if parts != name]
  return (
    f"after a softmax of the scores, probabilities are added: {', '.join(changed)}; the class of a pixel is the index "
    f"of the largest of {', '.join(name for name, _ in sums)}"
  )


class Segmentation(Task):
  """Predicts the class of every pixel, evaluated by areas over the full data set.

  Attributes:
    output: arguments of the head.
    best_metric, best_mode: see Task.
  """

  needs = frozenset({"label"})
  result = "label"
  best_metric, best_mode = "mIoU", "max"
  test_time_protocol = "sliding"
  eval_needs = frozenset()
  needs_truth = False
  draws_attention = True
  output_descriptions = MappingProxyType(
    {
      "logits": "scores of the classes before the softmax, unitless",
      "aux_logits": "those of the auxiliary head, which only training uses",
      "result": "the class of a pixel is the index of its largest score",
    }
  )

  def __init__(
    self,
    *,
    classes: int,
    lovasz: float = 0.0,
    auxiliary: float = 0.0,
    avg_non_ignore: bool = False,
    ignore_label: int = 255,
    class_names: tuple[str, ...] = (),
    palette: tuple[tuple[int, int, int], ...] = (),
    label_ids: tuple[int, ...] = (),
    merge: tuple[str, ...] = (),
  ):
    """Initializes the options of losses, scores and files.

    Args:
      classes: K, at most 255.
      lovasz: weight of the Lovász-Softmax loss, added to the cross-entropy. Release: 1.0 for MetaPrompts, else 0.
      auxiliary: weight of the cross-entropy of the auxiliary head. Release: 0.4 for MetaPrompts, else there is none.
      avg_non_ignore: see `cross_entropy`. Release: False.
      ignore_label: marks pixels without a label.
      class_names: K names for legends and files; empty: the class ids.
      palette: K colors, RGB; empty: those of Pascal VOC.
      label_ids: K ids that `save` writes instead of 0 .. K - 1 in an additional image, such as those required by a
        benchmark's server; empty: no such image.
      merge: for predictions, not for scores: "NEW=NAME+NAME.." merges several classes into one, or renames one; the
        others are unchanged.

    Raises:
      ValueError: too many classes, lists of another length, an ignored label that is a class, unknown or repeated
        classes in `merge`.
    """
    if not 1 <= classes <= MAX_CLASSES:
      raise UserError(f"task.classes={classes} must lie between 1 and {MAX_CLASSES}.")
    if 0 <= ignore_label < classes:
      raise UserError(f"task.ignore_label={ignore_label} is one of the {classes} classes; choose a number beyond.")
    for field, values in (("class_names", class_names), ("palette", palette), ("label_ids", label_ids)):
      if len(values) not in (0, classes):
        raise UserError(f"task.{field} has {len(values)} entries for {classes} classes; give {classes}, or none.")
    self.classes, self.lovasz, self.auxiliary = classes, lovasz, auxiliary
    self.avg_non_ignore, self.ignore_label = avg_non_ignore, ignore_label
    self.class_names = tuple(class_names) or tuple(map(str, range(classes)))
    self.palette = np.asarray(palette or label_images.voc_palette(classes), np.uint8)
    self.merge = merged(merge, self.class_names)
    self.label_ids = np.asarray(() if merge else label_ids, np.uint8)
    self.output = {"classes": classes}
    if merge:
      result = merge_description(self.merge, self.class_names)
      self.output_descriptions = {**type(self).output_descriptions, "result": result}

  @classmethod
  def dataset_options(cls, info: DatasetInfo, name: str) -> Fields:
    """See types.Task."""
    colors = {"palette": info.palette, "label_ids": info.label_ids}
    known = {field: values for field, values in colors.items() if values}
    return {"classes": len(info.classes), "class_names": info.classes, **known}

  def loss(self, outputs: Outputs, batch: Batch) -> Loss:
    """Sum of the losses of one group of images; its logs have the names and values of mmseg.

    Scores are resized to the labels first. A group without any label has loss 0 and full weight, as in the release,
    which averages over GPUs.

    Raises:
      ValueError: the head has an auxiliary head without a weight, or vice versa.
    """
    if ("aux_logits" in outputs) != (self.auxiliary > 0):
      has = "an" if "aux_logits" in outputs else "no"
      raise UserError(f"task.auxiliary={self.auxiliary}, but the head has {has} auxiliary part; make them agree.")
    label = batch["label"].astype(jnp.int32)
    logits = resized(outputs["logits"], label.shape[1:])
    options = {"ignore_label": self.ignore_label, "avg_non_ignore": self.avg_non_ignore}
    logs = {"decode.loss_ce": cross_entropy(logits, label, **options)}
    if self.lovasz:
      flat = logits.reshape(-1, self.classes), label.ravel()
      logs["decode.loss_lovasz"] = self.lovasz * lovasz_softmax(*flat, flat[1] != self.ignore_label)
    if self.auxiliary:
      aux = resized(outputs["aux_logits"], label.shape[1:])
      logs["aux.loss_ce_aux"] = self.auxiliary * cross_entropy(aux, label, **options)
    total = cast(Array, sum(logs.values()))
    logs["decode.acc_seg"] = accuracy(logits, label, ignore_label=self.ignore_label)
    if self.auxiliary:
      logs["aux.acc_seg"] = accuracy(aux, label, ignore_label=self.ignore_label)
    return Loss(total, jnp.ones((), total.dtype), jax.lax.stop_gradient(logs))

  def predict(self, outputs: Outputs) -> Array:
    """Scores of the classes, float [B, H, W, K], before the softmax."""
    return outputs["logits"]

  def decide(self, scores: Array) -> Array:
    """Probabilities [..., K] to the class of every pixel after `merge`, int32 [...].

    The probability of a merged class is the sum of the probabilities of its parts.
    """
    if len(self.merge) < self.classes:
      scores = jnp.stack([sum(scores[..., k] for k in parts) for _, parts in self.merge], axis=-1)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)

  def measure(self, prediction: Array, batch: Batch) -> dict[str, Array]:
    """Areas of each image, int32 [B, K] each; see `areas`, and `finite.labels` for scores.

    Args:
      prediction: int [B, H, W] classes, or float [B, H, W, K] scores.
      batch: "label" int [B, H, W].
    """
    counts, prediction = finite.labels(prediction)
    count = lambda p, t: areas(p, t, self.classes, ignore_label=self.ignore_label)
    return counts | jax.vmap(count)(prediction, batch["label"])

  def summarize(self, rows: Rows) -> dict[str, float]:
    """Scores of the full data set: areas are summed over the images first.

    Returns:
      "mIoU", "mAcc": means over the classes in prediction or truth, and in truth; "aAcc": share of correct pixels;
      "images"; "not_finite". All except the last two are between 0 and 1.

    Raises:
      ValueError: no pixel has a label.

    Source: mmsegmentation 0.30 core/evaluation/metrics.py total_area_to_metrics.
    """
    scores_by_class = self.per_class(rows)
    correct, labeled = (rows[name].sum(dtype=np.int64) for name in ("intersect", "labeled"))
    if not labeled:
      raise UserError(f"none of {len(rows['labeled'])} images has a labeled pixel; check the labels of the data set.")
    return {
      "mIoU": float(np.nanmean(scores_by_class["IoU"])),
      "mAcc": float(np.nanmean(scores_by_class["Acc"])),
      "aAcc": float(correct / labeled),
      "images": float(len(rows["labeled"])),
      **finite.total(rows),
    }

  def per_class(self, rows: Rows) -> dict[str, np.ndarray]:
    """{"IoU", "Acc"}: float64 [K] each over the full data set; NaN for classes that do not occur."""
    total = {name: rows[name].sum(axis=0, dtype=np.int64) for name in ("intersect", "predicted", "labeled")}
    union = total["predicted"] + total["labeled"] - total["intersect"]
    with np.errstate(invalid="ignore"):
      return {"IoU": total["intersect"] / union, "Acc": total["intersect"] / total["labeled"]}

  def baselines(self, train: Iterable[Example], evaluation: Iterable[Example]) -> dict[str, float]:
    """Mean IoU of three predictors that do not use the content of the image."""
    fit = baselines.Fit(self.classes, self.ignore_label)
    for example in train:
      fit.add(example["image"], example["label"])
    predictors, rows = fit.predictors(), {}
    for example in evaluation:
      label = example["label"].astype(np.int64)
      valid = label != self.ignore_label
      for name, predict in predictors.items():
        guess = predict(example["image"])
        count = lambda which, valid=valid: np.bincount(which[valid], minlength=self.classes)
        both = np.bincount(label[valid & (guess == label)], minlength=self.classes)
        row = {"intersect": both, "predicted": count(guess), "labeled": count(label)}
        sums = rows.setdefault(name, row)
        if sums is not row:
          rows[name] = {key: sums[key] + row[key] for key in row}
    return {n: self.summarize({k: v[None] for k, v in row.items()})["mIoU"] for n, row in rows.items()}

  def panel(self, example: Example, prediction: np.ndarray) -> np.ndarray:
    """Image, label and prediction in the colors of the palette, with names: uint8 [H + h, 3 W, 3], see drawing.row."""
    height, width = example["label"].shape
    prediction = prediction.argmax(-1) if prediction.ndim == 3 else prediction
    parts = [("input", label_images.as_bytes(example["image"]))]
    for title, label in (("truth", example["label"]), ("prediction", prediction[:height, :width])):
      painted = label_images.paint(label, self.palette)
      parts.append((title, drawing.names(painted, label.astype(np.int64), self.class_names)))
    return drawing.row(parts)

  def save_attention(self, stem: Path, attention: np.ndarray, prediction: np.ndarray, image: np.ndarray) -> Path:
    """Writes stem.attention.png: maps float [h, w, K] of the classes in int [H, W] of `decide`, over the image."""
    maps = [(name, cast(np.ndarray, sum(attention[..., part] for part in parts))) for name, parts in self.merge]
    picture = label_images.attention(maps, prediction, image)
    return result_files.write(stem, ".attention.png", lambda path: label_images.write_colors(path, picture))

  def save(self, stem: Path, prediction: np.ndarray, extra: Fields, image: np.ndarray | None = None) -> list[Path]:
    """Writes the labels of one image; files appear only when complete, the JSON last.

    Args:
      stem: path without suffix: stem.label.png (class ids with palette), stem.overlay.png (colors over the image, with
        a legend), stem.label_ids.png if there are `label_ids`, stem.json.
      prediction: int [H, W] from `decide`.
      extra: additional entries for the JSON, which contains the share of each class.
      image: uint8, or float in [0, 1], [H, W, 3], the background; None shows only the colors.
    """
    label, names = prediction.astype(np.uint8), [name for name, _ in self.merge]
    palette = self.palette[[parts[0] for _, parts in self.merge]]
    overlay = label_images.overlay(label, palette, names, image)
    counts = np.bincount(label.ravel(), minlength=len(names)) / label.size
    order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    metadata = {
      "classes": {names[k]: {"number": int(k), "share": round(float(counts[k]), 6)} for k in order},
      "size": list(label.shape),
      **extra,
    }
    parts = {
      ".label.png": lambda path: label_images.write_indexed(path, label, palette),
      ".overlay.png": lambda path: label_images.write_colors(path, overlay),
    }
    if self.label_ids.size:
      parts[".label_ids.png"] = lambda path: label_images.write_colors(path, self.label_ids[label])
    return result_files.write_result(stem, parts, metadata)
