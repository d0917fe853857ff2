"""Metric depth: scale-invariant loss, the metrics of NYU and KITTI, images and files of the result."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

import cv2
import jax.numpy as jnp
import numpy as np

from vpd_jax.errors import UserError, check_choice
from vpd_jax.tasks import colormaps, drawing, finite
from vpd_jax.tasks.depth import point_cloud, visualize
from vpd_jax.tasks.depth.baselines import depth_baselines
from vpd_jax.tasks.result_files import write_result
from vpd_jax.types import Array, Batch, Example, Fields, Loss, Outputs, Rows, Task

SCORES = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
PNG_SCALES = (1000, 256, 100, 10, 1)  # units per meter of 16-bit depth images
RANGE = (1e-9, 1e9)  # meters; predictions are clipped to this range, in which no metric overflows
# Rows and columns of the image that are scored, as (top, bottom, left, right).
EVAL_CROPS = {
  "none": lambda h, w: (0, h, 0, w),
  "eigen_nyu": lambda h, w: (min(45, h), min(471, h), min(41, w), min(601, w)),  # of 480 x 640
  "eigen_nyu_scaled": lambda h, w: (45 * h // 480, 471 * h // 480, 41 * w // 640, 601 * w // 640),
  "garg": lambda h, w: (int(0.40810811 * h), int(0.99189189 * h), int(0.03594771 * w), int(0.96405229 * w)),
  "eigen_kitti": lambda h, w: (int(0.3324324 * h), int(0.91351351 * h), int(0.0359477 * w), int(0.96405229 * w)),
}


def silog(prediction: Array, target: Array, *, variance_focus: float = 0.5) -> tuple[Array, Array]:
  """Scale-invariant log error over the valid pixels of all given images together.

  sqrt(mean(e^2) - variance_focus * mean(e)^2) with e = log target - log prediction.

  Args:
    prediction: float32 or wider [B, H, W], meters, positive.
    target: float32 [B, H, W], meters; 0 marks a pixel without ground truth.
    variance_focus: 0 is the plain log RMSE, 1 ignores global scale.

  Returns:
    The error, float [], 0 if no pixel is valid; and whether any pixel is valid, bool [].

  Source: Eigen et al. 2014, training loss, here with a square root; VPD depth/utils_depth/criterion.py (0.5).
  """
  valid = target > 0
  count = valid.sum().astype(prediction.dtype)
  safe = jnp.where(valid, target.astype(prediction.dtype), 1)
  error = jnp.log(safe) - jnp.log(jnp.where(valid, prediction, 1))
  inverse_count = 1 / jnp.maximum(count, 1)
  square = (error**2).sum() * inverse_count - variance_focus * (error.sum() * inverse_count) ** 2
  flat = square <= 0  # the root has no gradient at 0; not "square > 0", which would hide a NaN
  return jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, square))), count > 0


class Depth(Task):
  """Predicts depth in meters, evaluated per image.

  Attributes:
    output: arguments of the head.
    best_metric, best_mode: see Task.
  """

  needs = frozenset({"depth"})
  result = "depth"
  best_metric, best_mode = "rmse", "min"
  test_time_protocol = "windows"
  eval_needs = frozenset()
  needs_truth = False
  measures_depth = True
  output_descriptions = MappingProxyType({"depth": "meters along the optical axis", "result": "the depth, unchanged"})

  def __init__(
    self,
    *,
    max_depth: float,
    min_depth: float = 1e-3,
    eval_crop: str = "none",
    variance_focus: float = 0.5,
    loss_scale: float = 1.0,
    clip_prediction: bool = False,
    benchmark_silog: bool = False,
    png_scale: int = 0,
    contours: float = 0.0,
  ):
    """Initializes the options of loss, metrics and files.

    Args:
      max_depth: meters; maximum of the head, and exclusive upper bound of the evaluated ground truth.
      min_depth: meters; exclusive lower bound of the evaluated ground truth.
      eval_crop: the evaluated region of the image: "eigen_nyu", in pixels; "eigen_nyu_scaled", the same part of an
        image of another size than 480 x 640; "garg" or "eigen_kitti", parts of the image; or "none".
      variance_focus: of the loss. Release of VPD: 0.5, of EcoDepth: 0.85.
      loss_scale: factor on the loss, which has little effect with AdamW. Release of VPD: 1.0, of EcoDepth: 10.0.
      clip_prediction: whether predictions are clipped to [min_depth, max_depth] for evaluation. Release of VPD: False,
        of EcoDepth: True.
      benchmark_silog: compute "silog" as KITTI's benchmark, 100 sqrt(mean(e^2) - mean(e)^2). Release of
        VPD: False, sqrt(mean(e^2) - 0.5 mean(e)^2), of EcoDepth: True.
      png_scale: units per meter of the 16-bit depth images of `save`: 1000 as in NYU's files, 256 as required by the
        KITTI server; 0 selects the first of PNG_SCALES for which max_depth fits 16 bits: 1000 up to 65 m, then 256.
      contours: meters between contour lines in the colored images, such as 1; 0: no lines.

    Raises:
      ValueError: unknown crop, an empty depth range, a negative contour spacing, or a scale for which max_depth does
        not fit 16 bits.
    """
    check_choice("task.eval_crop", eval_crop, sorted(EVAL_CROPS))
    if not 0 <= min_depth < max_depth:
      raise UserError(f"task.min_depth={min_depth} must be at least 0 and below task.max_depth={max_depth}.")
    if not 0 <= contours < float("inf"):
      raise UserError(f"task.contours={contours} must be a number of meters, or 0 for none.")
    self.png_scale = png_scale or next((scale for scale in PNG_SCALES if scale * max_depth <= 65535), 1)
    if not 0 < self.png_scale * max_depth <= 65535:
      raise UserError(
        f"task.png_scale={png_scale} must be above 0 and at most {65535 / max_depth:.4g}, so that 16 bits hold "
        f"task.max_depth={max_depth}; or 0, which chooses."
      )
    self.max_depth, self.min_depth = max_depth, min_depth
    self.eval_crop, self.variance_focus, self.loss_scale = eval_crop, variance_focus, loss_scale
    self.clip_prediction, self.benchmark_silog, self.contours = clip_prediction, benchmark_silog, contours
    self.output = {"max_depth": max_depth}

  def loss(self, outputs: Outputs, batch: Batch) -> Loss:
    """SiLog of one group of images; weight 0 if no pixel has ground truth."""
    value, any_valid = silog(outputs["depth"], batch["depth"], variance_focus=self.variance_focus)
    return Loss(self.loss_scale * value, any_valid.astype(value.dtype), {"silog": value})

  def predict(self, outputs: Outputs) -> Array:
    """Depth, float [B, H, W], meters."""
    return outputs["depth"]

  def region(self, size: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) rows and columns of the evaluated region of an image of this size."""
    return EVAL_CROPS[self.eval_crop](*size)

  def measure(self, prediction: Array, batch: Batch) -> dict[str, Array]:
    """Metrics of each image, float [B] each, and its number of evaluated pixels; all are 0 if it has none.

    Valid pixels have min_depth < truth < max_depth, both strict, inside the crop. The prediction is clipped to RANGE,
    and further if `clip_prediction`; infinities become `max_depth`, NaN `min_depth`, as released; "not_finite" counts
    both.

    Source: VPD and EcoDepth, depth/utils_depth/metrics.py cropping_img, eval_depth.
    """
    truth = batch["depth"].astype(prediction.dtype)
    finite = jnp.isfinite(prediction)
    prediction = jnp.where(jnp.isinf(prediction), self.max_depth, prediction)
    prediction = jnp.where(jnp.isnan(prediction), self.min_depth, prediction)
    if self.clip_prediction:
      prediction = prediction.clip(self.min_depth, self.max_depth)
    top, bottom, left, right = self.region(truth.shape[1:])
    inside = np.zeros((1, *truth.shape[1:]), bool)
    inside[:, top:bottom, left:right] = True
    valid = (truth > self.min_depth) & (truth < self.max_depth) & jnp.asarray(inside)
    p, g = jnp.where(valid, prediction, 1).clip(-RANGE[1], RANGE[1]), jnp.where(valid, truth, 1)
    pixels = valid.sum(axis=(1, 2)).astype(prediction.dtype)
    mean = lambda x: jnp.where(valid, x, 0).sum(axis=(1, 2)) / jnp.maximum(pixels, 1)
    difference, p = p - g, jnp.maximum(p, RANGE[0])
    ratio, logs = jnp.maximum(p / g, g / p), jnp.log(p) - jnp.log(g)
    scale, focus = (100, 1) if self.benchmark_silog else (1, 0.5)
    rows = {f"d{k}": mean((ratio < 1.25**k).astype(p.dtype)) for k in (1, 2, 3)}
    return rows | {
      "abs_rel": mean(jnp.abs(difference) / g),
      "sq_rel": mean(difference**2 / g),
      "rmse": jnp.sqrt(mean(difference**2)),
      "rmse_log": jnp.sqrt(mean(logs**2)),
      "log10": mean(jnp.abs(logs)) / jnp.log(jnp.asarray(10, p.dtype)),
      "silog": scale * jnp.sqrt(jnp.maximum(mean(logs**2) - focus * mean(logs) ** 2, 0)),
      "pixels": pixels,
      "not_finite": (valid & ~finite).sum(axis=(1, 2), dtype=jnp.int32),
    }

  def summarize(self, rows: Rows) -> dict[str, float]:
    """Means over the images with evaluated pixels (the published averaging), their number, and "not_finite".

    Raises:
      ValueError: no image has evaluated pixels.
    """
    scored = rows["pixels"] > 0
    if not scored.any():
      raise UserError(
        f"none of {len(scored)} images has ground truth in ({self.min_depth}, {self.max_depth}) meters; "
        "check the depth unit and task.max_depth."
      )
    return (
      {name: float(np.mean(rows[name][scored], dtype=np.float64)) for name in SCORES}
      | {"images": float(scored.sum())}
      | finite.total(rows)
    )

  def baselines(self, train: Iterable[Example], evaluation: Iterable[Example]) -> dict[str, float]:
    """RMSE, under the same protocol, of three predictors that do not use the content of the image."""
    evaluation = iter(evaluation)
    first = next(evaluation)
    region = self.region(first["depth"].shape)
    evaluation = itertools.chain((first,), evaluation)  # not a list, since all images of KITTI take 2 GB
    return depth_baselines(train, evaluation, min_depth=self.min_depth, max_depth=self.max_depth, region=region)

  def panel(self, example: Example, prediction: np.ndarray) -> np.ndarray:
    """See `panels`."""
    return self.panels([example], [prediction])[0]

  def panels(self, examples: Sequence[Example], predictions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Input, truth, prediction and error of each image: uint8 [H', W', 3], see `visualize.panel`.

    The color scale is the range of valid truth of all images, or 0 to `max_depth` without any; that of the error ends
    at a tenth of `max_depth`.
    """
    span = colormaps.depth_span([example["depth"] for example in examples]) or (0.0, self.max_depth)
    return [
      visualize.panel(example["image"], prediction, example["depth"], span, self.max_depth / 10)
      for example, prediction in zip(examples, predictions, strict=True)
    ]

  def colored(self, depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
    """Depth in color, uint8 [H, W, 3]: red at `nearest` to blue at `farthest`, meters, gray if unknown."""
    picture = colormaps.color_depth(depth, farthest, min_depth=nearest)
    return drawing.contours(picture, depth, self.contours) if self.contours else picture

  def save_point_cloud(self, stem: Path, depth: np.ndarray, image: np.ndarray, focal: tuple[float, str]) -> Path:
    """Writes stem.ply, the colored points of one image, and returns its path.

    Args:
      stem: path without suffix.
      depth: float [H, W], meters.
      image: uint8 [H, W, 3], RGB.
      focal: focal length in pixels, and its source in ASCII, for the header.
    """
    path, comment = stem.with_name(stem.name + ".ply"), f"focal length {focal[0]:.6g} pixels, {focal[1]}"
    return point_cloud.write_ply(path, depth, image, focal[0], [comment])

  def save(self, stem: Path, prediction: np.ndarray, extra: Fields, image: np.ndarray | None = None) -> list[Path]:
    """Writes the depth of one image; files appear only when complete, the JSON last.

    The PNG follows the convention of KITTI's development kit: value / png_scale is meters, 0 means no value. Hence
    depths are stored as at least 1, and only NaN as 0.

    Args:
      stem: path without suffix: stem.color.png (with a bar in meters at its right), stem.depth.png (16 bit), stem.npy
        (float32 meters), stem.json.
      prediction: float [H, W], meters.
      extra: additional entries for the JSON, which states unit and scale.
      image: unused.
    """
    del image
    depth = prediction.astype(np.float32)
    rounded = np.clip(np.nan_to_num(depth, posinf=65535, neginf=0) * self.png_scale + 0.5, 1, 65535)
    stored = np.where(np.isnan(depth), 0, rounded).astype(np.uint16)
    metadata = {
      "unit": "meter",
      "png_units_per_meter": self.png_scale,
      "png_no_value": 0,
      "max_depth": self.max_depth,
      **finite.ends(depth),
      "size": list(depth.shape),
      **extra,
    }
    color = visualize.colored(depth, self.contours)
    parts = {
      ".color.png": lambda path: _png(path, color[..., ::-1]),
      ".depth.png": lambda path: _png(path, stored),
      ".npy": lambda path: np.save(path, depth),
    }
    return write_result(stem, parts, metadata)


def _png(path: Path, image: np.ndarray) -> None:
  if not cv2.imwrite(str(path), image):
    raise OSError(f"{path} could not be written.")
