"""Top-down pose estimation: heatmaps per crop, decoded to image coordinates, evaluated as in COCO.

Source: ViTPose configs/body/2d_kpt_sview_rgb_img/topdown_heatmap/coco; mmpose 0.x models/losses/mse_loss.py,
models/heads/topdown_heatmap_base_head.py, datasets/datasets/top_down/topdown_coco_dataset.py.
"""

from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from etils import epath

from vpd_jax.errors import UserError
from vpd_jax.files import atomic
from vpd_jax.tasks import drawing, finite
from vpd_jax.tasks.label_images import as_bytes, write_colors
from vpd_jax.tasks.pose import baselines, heatmaps, oks, visualize
from vpd_jax.tasks.result_files import write_result
from vpd_jax.types import Array, Batch, DatasetInfo, Example, Fields, Keypoints, Loss, Outputs, Rows, Task

STRIDE = 4  # pixels of the crop per pixel of a heatmap
DRAWN = 0.2  # score above which a keypoint is drawn


def joints_mse(predicted: Array, target: Array, weights: Array) -> Array:
  """Mean over batch, pixels and keypoints of (w predicted - w target)^2.

  Keypoints of weight 0 add nothing, but count in the mean.

  Args:
    predicted, target: float [B, h, w, K].
    weights: float [B, K].

  Returns:
    float [].

  Source: mmpose 0.x models/losses/mse_loss.py JointsMSELoss, use_target_weight.
  """
  return jnp.square((predicted - target) * weights[:, None, None]).mean()


class Pose(Task):
  """Predicts a heatmap per keypoint, evaluates keypoints in the image.

  Attributes:
    output: arguments of the head.
    best_metric, best_mode: see Task.
    needs_truth: `summarize` and `baselines` take the data set's `truth`.
  """

  needs = frozenset({"keypoints", "center", "extent", "box_score", "image_index"})
  result = "keypoints"
  best_metric, best_mode = "AP", "max"
  test_time_protocol = "crops"
  eval_needs = frozenset()
  needs_truth = True
  output_descriptions = MappingProxyType(
    {
      "heatmaps": "one map per keypoint, close to 1 at the keypoint, unitless",
      "result": "the position and the score of a keypoint are those of the largest value of its heatmap; the package "
      "refines the position to subpixel accuracy (DARK) and maps it back to the image",
    }
  )

  def __init__(
    self,
    *,
    keypoints: Keypoints,
    udp: bool = True,
    sigma: int = 2,
    blur: int = 0,
    shift_flipped: bool = False,
    score_above: float = 0.2,
    nms: float = 0.9,
  ):
    """Initializes the options of loss, decoding and scores.

    Args:
      keypoints: names, pairs, skeleton and sigmas, determined by the data set; see types.Keypoints.
      udp: coordinate convention of crops and heatmaps, determined by the data set; see heatmaps.py.
      sigma: of the target Gaussians, in pixels of the heatmap. Release: 2 at 256 x 192, 3 at 384 x 288.
      blur: taps of the blur before decoding, odd; 0: 6 sigma - 1. Release: 11 at sigma 2, 17 at sigma 3.
      shift_flipped: shifts the heatmaps of the flipped crop by a pixel. Release: False with udp, True without.
      score_above: minimum score, exclusive, of keypoints that count in a person's score. Release: 0.2.
      nms: similarity above which the worse of two people in an image is suppressed. Release: 0.9.

    Raises:
      ValueError: in one line, for numbers out of range.
    """
    problems = []
    blur = blur or 6 * sigma - 1
    if sigma < 1 or sigma != int(sigma):
      problems.append(f"sigma={sigma} must be a whole number of at least 1")
    if blur < 3 or blur % 2 != 1:
      problems.append(f"blur={blur} must be an odd number of at least 3, or 0")
    if not 0 < nms <= 1:
      problems.append(f"nms={nms} must be above 0 and at most 1")
    if problems:
      raise UserError(f"task: {'; '.join(problems)}.")
    self.keypoints, self.udp, self.sigma, self.blur = keypoints, udp, int(sigma), int(blur)
    self.shift_flipped, self.score_above, self.nms = shift_flipped, score_above, nms
    self.sigmas = np.asarray(keypoints.sigmas, np.float64)
    self.output = {"keypoints": len(keypoints.names)}

  @classmethod
  def dataset_options(cls, info: DatasetInfo, name: str) -> Fields:
    """See types.Task."""
    if info.keypoints is None:
      raise UserError(f"task 'pose' needs keypoints, which data set {name!r} does not provide; choose another.")
    return {"keypoints": info.keypoints, "udp": info.udp}

  def loss(self, outputs: Outputs, batch: Batch) -> Loss:
    """Weighted squared error of one group of crops; weight 0 if no keypoint is labeled.

    Args:
      outputs: "heatmaps" float [B, h, w, K].
      batch: "keypoints" float32 [B, K, 3], x and y in pixels of the crop, and 1 where labeled, else 0.
    """
    predicted = outputs["heatmaps"]
    size = predicted.shape[1:3]
    crop = tuple(STRIDE * side for side in size)
    target, weights = heatmaps.targets(batch["keypoints"], crop, size, sigma=self.sigma, udp=self.udp)
    target, weights = target.astype(predicted.dtype), weights.astype(predicted.dtype)
    value = joints_mse(predicted, target, weights)
    return Loss(value, (weights > 0).any().astype(value.dtype), {"joints_mse": value})

  def predict(self, outputs: Outputs) -> Array:
    """Heatmaps, float [B, h, w, K]."""
    return outputs["heatmaps"]

  def mirrored(self, prediction: Array) -> Array:
    """Flips the heatmaps of a flipped crop back, and swaps left and right keypoints.

    Source: mmpose 0.x core/post_processing/post_transforms.py flip_back; models/heads/topdown_heatmap_base_head.py.
    """
    return heatmaps.mirrored(prediction, self.keypoints.pairs, shift=self.shift_flipped)

  def locate(self, prediction: Array, center: Array, extent: Array) -> Array:
    """Keypoints in the image: float [B, K, 3], x, y and score.

    Args:
      prediction: heatmaps, float [B, h, w, K].
      center, extent: float [B, 2] of the crops, which were not rotated.
    """
    positions, scores = heatmaps.decode(prediction, udp=self.udp, kernel=self.blur)
    positions = heatmaps.to_picture(positions, center, extent, prediction.shape[1:3], udp=self.udp)
    return jnp.concatenate([positions, scores[..., None]], axis=-1)

  def measure(self, prediction: Array, batch: Batch) -> dict[str, Array]:
    """One row per crop.

    Returns:
      "keypoints" float [B, K, 3], see `locate`; "area" float [B] of the padded box; "box_score" float [B];
      "image_index" int32 [B]; "not_finite" int32 [B], pixels of the heatmaps, see finite.count.
    """
    center, extent = batch["center"], batch["extent"]
    return {
      "keypoints": self.locate(prediction, center, extent),
      "area": extent[:, 0] * extent[:, 1],
      "box_score": batch["box_score"],
      "image_index": batch["image_index"],
      finite.KEY: finite.count(prediction),
    }

  def rescored(self, box_scores: np.ndarray, joint_scores: np.ndarray) -> np.ndarray:
    """Scores of people, float64 [N], from those of boxes [N] and keypoints [N, K]; see oks.rescored."""
    return oks.rescored(box_scores, joint_scores, self.score_above)

  def results(self, rows: Rows, truth: Fields) -> list[Fields]:
    """Entries of a COCO results file, rescored and after non-maximum suppression.

    Args:
      rows: from `measure`, of the full split.
      truth: of the data set.
    """
    return oks.detections(
      rows["keypoints"],
      self.rescored(rows["box_score"], rows["keypoints"][..., 2]),
      rows["area"],
      rows["image_index"],
      sigmas=self.sigmas,
      threshold=self.nms,
      image_ids=[image["id"] for image in truth["images"]],
      category=truth["categories"][0]["id"],
    )

  def summarize(self, rows: Rows, truth: Fields) -> dict[str, float]:
    """COCO's scores over all images of the truth, including those without people or rows.

    Returns:
      oks.SCORES; "people", the number of rows; "not_finite".

    Raises:
      ValueError: no person in the truth has a labeled keypoint.
    """
    if not any(person["num_keypoints"] and not person["iscrowd"] for person in truth["annotations"]):
      raise UserError(f"none of {len(truth['images'])} images has a labeled keypoint to score; check the data set.")
    scores = oks.coco_scores(truth, self.results(rows, truth), self.sigmas)
    return scores | {"people": float(len(rows["area"]))} | finite.total(rows)

  def write_results(self, path: epath.Path, rows: Rows, truth: Fields) -> epath.Path:
    """Writes `results` in COCO's format; the file appears only when complete."""
    entries = self.results(rows, truth)
    return atomic.write(path, atomic.to_json(entries))

  def baselines(self, train: Iterable[Example], evaluation: Iterable[Example], truth: Fields) -> dict[str, float]:
    """AP of two predictors: the mean pose, and a linear regression on the crop; see baselines.py."""
    fit, rows = baselines.Fit(len(self.keypoints.names)), {}
    for example in train:
      fit.add(example["image"], example["keypoints"])
    predictors = fit.predictors()
    for example in evaluation:
      crop = np.array(example["image"].shape[1::-1]) - (1 if self.udp else 0)
      corner = example["center"] - example["extent"] / 2
      for name, predictor in predictors.items():
        points = predictor(example["image"]) * example["extent"] / crop + corner
        row = {
          "keypoints": np.concatenate([points, np.ones((len(points), 1))], axis=1),
          "area": np.prod(example["extent"]),
          "box_score": example["box_score"],
          "image_index": example["image_index"],
        }
        rows.setdefault(name, []).append(row)
    stacked = {n: {key: np.stack([r[key] for r in row_list]) for key in row_list[0]} for n, row_list in rows.items()}
    return {name: self.summarize(stacked_rows, truth)["AP"] for name, stacked_rows in stacked.items()}

  def panel(self, example: Example, prediction: np.ndarray) -> np.ndarray:
    """Crop with the annotated skeleton, with the predicted one, and the maximum of heatmaps: uint8 [H + h, 3 W, 3]."""
    height, width = example["image"].shape[:2]
    offset = 1 if self.udp else 0
    positions, scores = heatmaps.decode(jnp.asarray(prediction)[None], udp=self.udp, kernel=self.blur)
    stride = (np.array([width, height]) - offset) / (np.array(prediction.shape[1::-1]) - offset)
    predicted = np.concatenate([np.asarray(positions[0]) * stride, np.asarray(scores[0])[:, None]], axis=-1)
    shown = [self._drawn(example["image"], [points]) for points in (example["keypoints"], predicted)]
    shown.append(visualize.heat(example["image"], prediction.max(-1)))
    return drawing.row(list(zip(("truth", "prediction", "heatmaps"), shown, strict=True)))

  def save(self, stem: Path, prediction: np.ndarray, extra: Fields, image: np.ndarray | None = None) -> list[Path]:
    """Writes the people of one image; files appear only when complete, the JSON last.

    Args:
      stem: path without suffix: stem.skeleton.png, if there is an image, with the boxes in `extra` of people without a
        sufficiently confident keypoint; stem.json with each person's keypoints by name as x, y, score, all 0 if they
        are not finite, and in that case their number, "not_finite".
      prediction: float [N, K, 3] from `locate`, one entry per person; N may be 0.
      extra: additional entries for the JSON; its "people" is a list of N dicts with further data of each person.
      image: uint8, or float in [0, 1], [H, W, 3].
    """
    prediction, invalid = finite.points(prediction)
    round_off = lambda numbers: [round(float(number), 3) for number in numbers]
    named = lambda points: dict(zip(self.keypoints.names, map(round_off, points), strict=True))
    persons = extra.get("people", [{}] * len(prediction))
    people = [person | {"keypoints": named(points)} for person, points in zip(persons, prediction, strict=True)]
    metadata = extra | {"people": people} | ({finite.KEY: invalid} if invalid else {})
    parts = {}
    if image is not None:
      image = as_bytes(image)
      unsure = [person for person, points in zip(persons, prediction, strict=True) if not (points[:, 2] > DRAWN).any()]
      image = visualize.boxes(image, [person["box"] for person in unsure if "box" in person])
      parts[".skeleton.png"] = lambda path: write_colors(path, self._drawn(image, prediction))
    return write_result(stem, parts, metadata)

  def _drawn(self, image: np.ndarray, people: Iterable[np.ndarray]) -> np.ndarray:
    info = self.keypoints
    return visualize.draw(image, list(people), info.names, info.skeleton, least=DRAWN)
