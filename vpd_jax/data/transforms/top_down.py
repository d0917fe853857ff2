"""Top-down keypoint transforms on the host: keypoint definitions, crops of boxes, augmentation.

A box is represented by a center and an extent in image pixels: the extent is the padded box with the aspect ratio of
the crop, i.e. 200 times the "scale" of the releases. Points are (x, y), as in COCO files; sizes are (H, W).

Source: mmpose 0.x datasets/pipelines/top_down_transform.py, core/post_processing/post_transforms.py; Huang et al. 2020,
https://arxiv.org/abs/1911.07524 (UDP).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import cv2
import numpy as np

from vpd_jax.data import validation
from vpd_jax.data.rooms.figure import KEYPOINTS
from vpd_jax.errors import UserError
from vpd_jax.types import Example, Fields, Keypoints

PADDING = 1.25
HALF_BODY_PADDING = 1.5
JITTERS = ("once", "always", "off")
# The release compares a standard normal number, not a uniform one, with 0.5: P(N(0, 1) < 0.5).
UPPER_SHARE = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
UNKNOWN_SIGMA = 0.05  # default for names that COCO does not have
PROVIDES = frozenset({"image", "keypoints", "center", "extent", "box_score", "image_index", "index"})

# Source: COCO keypoint annotations, `categories[0]`, numbers from 0 here; pycocotools cocoeval.py kpt_oks_sigmas.
COCO = Keypoints(
  KEYPOINTS,
  tuple((left, left + 1) for left in range(1, 17, 2)),
  (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),
    *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
  ),
  (0.026, *(s for s in (0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089) for _ in range(2))),
  tuple(range(11)),
)


def keypoints_from_names(
  names: Sequence[str],
  *,
  pairs: Sequence[tuple[str, str]] = (),
  skeleton: Sequence[tuple[str, str]] = (),
  sigmas: Sequence[float] = (),
  upper: Sequence[str] = (),
) -> Keypoints:
  """Custom keypoints, defined by their names.

  Args:
    names: of the keypoints, in the order of the files.
    pairs: names that mirroring swaps; empty for those that differ in "left" and "right".
    skeleton: pairs of names that are connected when drawn.
    sigmas: one per keypoint, or one for all; empty for COCO's sigmas by name, UNKNOWN_SIGMA for other names.
    upper: names of the upper body; empty for no half-body augmentation.

  Raises:
    ValueError: one line that lists all problems.
  """
  names, problems = tuple(names), []
  if not names or not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
    raise UserError(f"data.keypoints={names!r} must be different names, in the order of the files' keypoints.")
  index_of = {name: k for k, name in enumerate(names)}
  if not pairs:
    mirrored = {name: name.replace("left", "right") for name in names if "left" in name}
    pairs = [(name, other) for name, other in mirrored.items() if other in index_of]
  for field, groups in (("pairs", pairs), ("skeleton", skeleton)):
    problems += [f"{field} has {group!r}, not two names" for group in groups if len(group) != 2]
  for field, used_names in (("pairs", sum(map(tuple, pairs), ())), ("skeleton", sum(map(tuple, skeleton), ())),
                       ("upper", upper)):  # fmt: skip
    unknown = sorted({str(name) for name in used_names if name not in index_of})
    problems += [f"{field} names {', '.join(unknown)}, which data.keypoints does not"] if unknown else []
  duplicates = sorted({name for pair in pairs for name in pair if sum(name in p for p in pairs) > 1})
  problems += [f"pairs names {', '.join(duplicates)} more than once"] if duplicates else []
  coco_sigmas = dict(zip(COCO.names, COCO.sigmas, strict=True))
  deviations = tuple(sigmas) or tuple(coco_sigmas.get(name, UNKNOWN_SIGMA) for name in names)
  deviations = deviations * len(names) if len(deviations) == 1 else deviations
  if len(deviations) != len(names) or not all(s > 0 for s in deviations):
    problems.append(f"sigmas={tuple(sigmas)} must be 1 or {len(names)} numbers above 0")
  if problems:
    raise UserError(f"data: {'; '.join(problems)}.")
  to_indices = lambda groups: cast(Any, tuple(tuple(index_of[name] for name in group) for group in groups))
  return Keypoints(names, to_indices(pairs), to_indices(skeleton), deviations, to_indices([upper])[0])


def box_to_center_scale(
  box: np.ndarray, crop: tuple[int, int], *, padding: float = PADDING, jitter: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Center and extent of a box, float64 [2] each, (x, y) in image pixels.

  Args:
    box: x, y, width, height; the last two are above 0.
    crop: (H, W); the extent is enlarged to its aspect ratio.
    padding: factor on the extent.
    jitter: float [2] in [0, 1), shifts the center by up to a fifth of the box in each direction; None for no shift.

  Source: mmpose 0.x datasets/datasets/base/kpt_2d_sview_rgb_img_top_down_dataset.py _xywh2cs.
  """
  x, y, width, height = (float(number) for number in box)
  center, extent = np.array([x + width / 2, y + height / 2]), np.array([width, height])
  if jitter is not None:
    center = center + 0.4 * (jitter - 0.5) * extent
  return center, padding * to_aspect(extent, crop)


def to_aspect(extent: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
  """(width, height) enlarged along one axis to the aspect ratio of (H, W)."""
  width, height = extent
  aspect = crop[1] / crop[0]
  return np.array([max(width, height * aspect), max(height, width / aspect)])


def warp_matrix(
  center: np.ndarray, extent: np.ndarray, rotation: float, crop: tuple[int, int], *, udp: bool = True
) -> np.ndarray:
  """The affine map float64 [2, 3] from (x, y, 1) of the image to (x, y) of the crop.

  Args:
    center, extent: of the person.
    rotation: degrees. With and without `udp`, the directions are opposite, as in the release.
    crop: (H, W).
    udp: whether to align the first and last pixels of extent and crop, with one factor per axis; False for the classic
      map, whose only factor is that of the widths.
  """
  cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
  size = np.array(crop[::-1], np.float64)
  if udp:
    linear = ((size - 1) / extent)[:, None] * np.array([[cos, -sin], [sin, cos]])
    offset = (size - 1) / 2
  else:
    linear = size[0] / extent[0] * np.array([[cos, sin], [-sin, cos]])
    offset = size / 2
  return np.concatenate([linear, (offset - linear @ center)[:, None]], axis=1)


def warp_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Applies an affine map [2, 3] to float [..., 2]."""
  return points @ matrix[:, :2].T + matrix[:, 2]


def warp_image(image: np.ndarray, matrix: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
  """The crop uint8 [H, W, 3] of an image, bilinear, with black outside the image."""
  return cv2.warpAffine(image, matrix, crop[::-1], flags=cv2.INTER_LINEAR)


def mirrored(points: np.ndarray, width: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
  """Keypoints float [K, 3] (x, y, visibility) of the mirrored image, left and right swapped. Unlabeled ones stay 0."""
  order = np.arange(len(points))
  for left, right in pairs:
    order[[left, right]] = right, left
  result = points[order].copy()
  result[:, 0] = width - 1 - result[:, 0]
  return result * (result[:, 2:] > 0)


def half_body(
  points: np.ndarray, upper: Sequence[int], crop: tuple[int, int], *, prefer_upper: bool
) -> tuple[np.ndarray, np.ndarray] | None:
  """Center and extent of the upper or lower half of a body; None if neither has a box.

  Args:
    points: float [K, 3], x, y, visibility.
    upper: indices of the upper half.
    crop: (H, W).
    prefer_upper: which half is tried first; the other one is used if it has two visible points or fewer.

  Source: mmpose 0.x datasets/pipelines/top_down_transform.py TopDownHalfBodyTransform. Coinciding points are skipped
  here; the release divides by 0.
  """
  of_upper = np.isin(np.arange(len(points)), upper)
  visible = points[:, 2] > 0
  above, below = points[visible & of_upper, :2], points[visible & ~of_upper, :2]
  if prefer_upper and len(above) > 2:
    chosen = above
  else:
    chosen = below if len(below) > 2 else above
  if len(chosen) < 2 or not np.ptp(chosen, axis=0).any():
    return None
  return chosen.mean(axis=0), HALF_BODY_PADDING * to_aspect(np.ptp(chosen, axis=0), crop)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """From a person in an image to a crop, for training and evaluation.

  Attributes:
    crop: (H, W).
    keypoints: of the data set.
    udp: see warp_matrix.
    padding: see box_to_center_scale.
    center_jitter: shifts 30 % of the centers in training: "once" samples by record, equally in every epoch (as
      released, where the data set is built once), "always" in every epoch, "off" never.
    flip, half_body, rotation_chance: probabilities.
    half_body_joints: half-body augmentation requires more visible keypoints than this.
    upper_share: probability of trying the upper half first.
    scale: s of the factor clip(1 + s n, 1 - s, 1 + s), n standard normal.
    rotation: r of the angle clip(r n, -2 r, 2 r), degrees, n standard normal.
  """

  crop: tuple[int, int]
  keypoints: Keypoints
  udp: bool = True
  padding: float = PADDING
  center_jitter: str = "once"
  flip: float = 0.5
  half_body: float = 0.3
  half_body_joints: int = 8
  upper_share: float = UPPER_SHARE
  scale: float = 0.5
  rotation: float = 40.0
  rotation_chance: float = 0.6

  def __post_init__(self):
    problems = []
    validation.check_size("crop", self.crop)
    if any(side % 4 or side < 8 for side in self.crop):
      problems.append(
        f"crop={self.crop} must have sides of multiples of 4, at least 8: heatmaps have a quarter of them"
      )
    probabilities = {"flip": self.flip, "half_body": self.half_body, "upper_share": self.upper_share}
    for field, value in (probabilities | {"rotation_chance": self.rotation_chance}).items():
      if not 0 <= value <= 1:
        problems.append(f"{field}={value} must lie between 0 and 1")
    if not 0 <= self.scale < 1:
      problems.append(f"scale={self.scale} must be at least 0 and below 1")
    if self.padding <= 0:
      problems.append(f"padding={self.padding} must be above 0")
    if self.center_jitter not in JITTERS:
      problems.append(f"center_jitter={self.center_jitter!r} is unknown; choose one of {JITTERS}")
    if problems:
      raise UserError(f"data: {'; '.join(problems)}.")

  def training(self, example: Example, rng: np.random.Generator) -> Example:
    """A random crop, see `_cropped` for its keys.

    Args:
      example: "image" uint8 [H', W', 3], "keypoints" float32 [K, 3] (x, y in the image; 2 visible, 1 hidden, 0
        unlabeled), "box" float32 [4], "box_score" float32 [], "image_index" and "index" int32 [].
      rng: for this example and epoch.
    """
    image, points, center, extent = self._start(example, rng)
    if rng.random() < self.flip:
      width = image.shape[1]
      image, points = cv2.flip(image, 1), mirrored(points, width, self.keypoints.pairs)
      center = np.array([width - 1 - center[0], center[1]])
    visible = np.count_nonzero(points[:, 2] > 0)
    if self.keypoints.upper and visible > self.half_body_joints and rng.random() < self.half_body:
      prefer_upper = rng.random() < self.upper_share
      half = half_body(points, self.keypoints.upper, self.crop, prefer_upper=prefer_upper)
      center, extent = half or (center, extent)
    extent = extent * np.clip(1 + self.scale * rng.standard_normal(), 1 - self.scale, 1 + self.scale)
    angle = np.clip(self.rotation * rng.standard_normal(), -2 * self.rotation, 2 * self.rotation)
    rotation = float(angle) if rng.random() < self.rotation_chance else 0.0
    return self._cropped(example, image, points, center, extent, rotation)

  def evaluation(self, example: Example) -> Example:
    """The crop of the box, without augmentation."""
    center, extent = box_to_center_scale(example["box"], self.crop, padding=self.padding)
    return self._cropped(example, example["image"], example["keypoints"].astype(np.float64), center, extent, 0.0)

  def _start(self, example: Example, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Image, keypoints, jittered center, extent."""
    jitter = None
    if self.center_jitter != "off":
      source = np.random.default_rng(int(example["index"])) if self.center_jitter == "once" else rng
      chance, *offset = source.random(3)
      jitter = np.array(offset) if chance < 0.3 else None
    center, extent = box_to_center_scale(example["box"], self.crop, padding=self.padding, jitter=jitter)
    return example["image"], example["keypoints"].astype(np.float64), center, extent

  def _cropped(
    self, example: Example, image: np.ndarray, points: np.ndarray, center: np.ndarray, extent: np.ndarray, angle: float
  ) -> Example:
    """The transformed Example, with the keys of PROVIDES.

    "image" uint8 [H, W, 3], the crop; "keypoints" float32 [K, 3], x and y in its pixels, and 1 if labeled, visible or
    not, else all 0; "center" and "extent" float32 [2]; "box_score", "image_index", "index" unchanged.
    """
    matrix = warp_matrix(center, extent, angle, self.crop, udp=self.udp)
    placed = np.concatenate([warp_points(points[:, :2], matrix), np.ones((len(points), 1))], axis=1)
    result: Fields = {
      "image": warp_image(np.ascontiguousarray(image), matrix, self.crop),
      "keypoints": (placed * (points[:, 2:] > 0)).astype(np.float32),
      "center": center.astype(np.float32),
      "extent": extent.astype(np.float32),
    }
    return result | {key: example[key] for key in ("box_score", "image_index", "index")}
