"""COCO's JSON files of people: keypoint annotations and detections.

An annotation file contains "images" (id, file_name, width, height), "annotations" (image_id, bbox as x, y, width,
height, keypoints as x, y, visibility for each, area, iscrowd), and "categories", one of which names the keypoints. A
detection file is a list of image_id, category_id, bbox, score.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vpd_jax.errors import UserError, first_items
from vpd_jax.files import reading
from vpd_jax.types import Fields

LARGEST = 1e9  # the upper bound of valid coordinates


class Annotations(NamedTuple):
  """The validated content of an annotation file.

  Attributes:
    path: of the file, for messages; None if there is none.
    images: {"id", "file_name", "width", "height"} each, in the order of the file.
    people: annotations by image, in the order of the file; each has "bbox", "keypoints", "area", "iscrowd" and
      "num_keypoints"; the last three are added if they are missing.
    category: {"id", "name", "keypoints"}.
    others: number of annotations of other categories, which are skipped.
  """

  path: Path | None
  images: list[Fields]
  people: list[list[Fields]]
  category: Fields
  others: int = 0


class Samples(NamedTuple):
  """The people of a split, one row each.

  Attributes:
    image: int32 [N], index of the image.
    box: float32 [N, 4], x, y, width, height.
    box_score: float32 [N], 1 for an annotated box.
    keypoints: float32 [N, K, 3], x, y, and 2 visible, 1 hidden, 0 unlabeled; all 0 for a detected box.
    notes: lines on what was skipped.
  """

  image: np.ndarray
  box: np.ndarray
  box_score: np.ndarray
  keypoints: np.ndarray
  notes: list[str]


def keypoint_names(path: str | Path) -> tuple[str, ...]:
  """The keypoint names of an annotation file.

  Raises:
    ValueError: for a missing file, or if not exactly one category has keypoints.
  """
  return tuple(_category(reading.read_json(path), path)["keypoints"])


def annotations(path: str | Path, names: Sequence[str]) -> Annotations:
  """Reads an annotation file.

  Raises:
    ValueError: for another type of file, other keypoints than `names`, and incomplete entries or entries of unknown
      images (counted, the first ten named); one line.
  """
  path, content = Path(path).expanduser(), reading.read_json(path)
  category = _category(content, path)
  if tuple(category["keypoints"]) != tuple(names):
    raise UserError(
      f"{path} has the keypoints {', '.join(category['keypoints'])}, but the config {', '.join(names)}; make them "
      "agree in number and order, or leave data.keypoints empty, which takes those of the file."
    )
  entries = [image if isinstance(image, dict) else {} for image in content["images"]]
  images: list[Fields] = [{key: image.get(key) for key in ("id", "file_name", "width", "height")} for image in entries]
  has_name = lambda image: _is_int(image["id"]) and isinstance(image["file_name"], str) and image["file_name"]
  has_size = lambda image: all(_is_int(image[side]) and 0 < image[side] < LARGEST for side in ("width", "height"))
  invalid = [f"image {i}" for i, image in enumerate(images) if not (has_name(image) and has_size(image))]
  ids = [image["id"] for image in images if _is_int(image["id"])]
  if len(set(ids)) < len(ids):
    raise UserError(f"{path} lists {len(ids)} images with {len(set(ids))} different ids; each needs its own.")
  index_of = {image["id"]: i for i, image in enumerate(images) if _is_int(image["id"])}
  people: list[list[Fields]] = [[] for _ in images]
  others = 0
  for i, entry in enumerate(content["annotations"]):
    if not isinstance(entry, dict):
      invalid.append(f"annotation {i}")
    elif entry.get("category_id", category["id"]) != category["id"]:
      others += 1
    elif _has_image(entry, index_of) and _numbers(entry.get("bbox"), 4) and _is_usable(entry, len(names)):
      people[index_of[entry["image_id"]]].append(_completed(entry, len(names)))
    else:
      invalid.append(f"annotation {str(entry.get('id', i))[:50]}")
  if invalid:
    raise UserError(
      f"{path}: {len(invalid)} entries cannot be used: {first_items(invalid)}; an image needs id, "
      "file_name, width and height, an annotation the image_id of a listed image, a bbox of 4 and keypoints of "
      f"{3 * len(names)} finite numbers; its area, if any, is a number, and iscrowd 0 or 1."
    )
  if others and others == len(content["annotations"]):
    raise UserError(
      f"{path}: none of {others} annotations is of category {category['id']}, which has the keypoints; their "
      f"category_id is {_counted(content['annotations'])}. Make them agree."
    )
  return Annotations(path, images, people, category, others)


def truth(coco: Annotations, chosen: Sequence[int]) -> Fields:
  """The ground truth for pycocotools: the content of a COCO file for the chosen images, without outlines."""
  entries = [entry for i in chosen for entry in coco.people[i]]
  # Renumbered from 1, because pycocotools treats the annotation id 0 as missing.
  numbered = lambda number: {"id": number + 1, "category_id": coco.category["id"]}
  return {
    "images": [coco.images[i] for i in chosen],
    "annotations": [entry | numbered(number) for number, entry in enumerate(entries)],
    "categories": [coco.category],
  }


def annotated(coco: Annotations, chosen: Sequence[int]) -> Samples:
  """The people of the chosen images, without crowds, unlabeled people and boxes outside the image.

  `image` is an index into `chosen`.

  Source: mmpose 0.x datasets/datasets/top_down/topdown_coco_dataset.py _load_coco_keypoint_annotation_kernel.
  """
  rows, unlabeled, empty = [], 0, 0
  for index, i in enumerate(chosen):
    for entry in coco.people[i]:
      box = clipped(entry["bbox"], coco.images[i]["width"], coco.images[i]["height"])
      if entry["iscrowd"]:
        continue
      if not entry["num_keypoints"]:
        unlabeled += 1
      elif box is None or entry["area"] <= 0:
        empty += 1
      else:
        rows.append((index, box, entry["keypoints"]))
  notes = [f"{coco.others} annotations of other categories are left out"] if coco.others else []
  notes += [f"{unlabeled} people without a labeled keypoint are left out"] if unlabeled else []
  notes += [f"{empty} boxes without an area inside their image are left out"] if empty else []
  count = len(coco.category["keypoints"])
  return Samples(
    np.array([image for image, _, _ in rows], np.int32),
    np.array([box for _, box, _ in rows], np.float32).reshape(-1, 4),
    np.ones(len(rows), np.float32),
    np.array([keypoints for _, _, keypoints in rows], np.float32).reshape(-1, count, 3),
    notes,
  )


def detected(
  path: str | Path,
  coco: Annotations,
  chosen: Sequence[int],
  *,
  others: str,
  threshold: float,
  category: int = -1,
  remedy: str,
) -> Samples:
  """The detected boxes in the chosen images. `image` is an index into `chosen`.

  Args:
    path: of the detection file.
    coco: the annotations; only their images and category are used.
    chosen: indices of images.
    others: what to do with boxes of other images: "error", or "skip".
    threshold: boxes with scores below it are skipped.
    category: the category_id of people in that file; -1: as in the annotations.
    remedy: what to do about boxes of other images.

  Raises:
    ValueError: for another type of file, incomplete entries, boxes of other images, or no boxes of people.

  Source: mmpose 0.x topdown_coco_dataset.py _load_coco_person_detection_results.
  """
  content = reading.read_json(path)
  if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
    raise UserError(f"{path} must be a list of detections: image_id, category_id, bbox, score.")
  index_of = {coco.images[i]["id"]: index for index, i in enumerate(chosen)}
  category = coco.category["id"] if category < 0 else category
  other_categories = [entry for entry in content if entry.get("category_id") != category]
  if other_categories and len(other_categories) == len(content):
    raise UserError(
      f"{path}: none of {len(content)} detections is of category {category}; their category_id is "
      f"{_counted(other_categories)}. Set data.person_category to the one of people: many programs count from 0."
    )
  rows, invalid, unknown, below_threshold, empty = [], [], [], 0, 0
  for i, entry in enumerate(content):
    if entry.get("category_id") != category:
      continue
    if not (_numbers(entry.get("bbox"), 4) and _numbers([entry.get("score")], 1) and _is_int(entry.get("image_id"))):
      invalid.append(str(i))
    elif entry["image_id"] not in index_of:
      unknown.append(entry["image_id"])
    elif entry["score"] < threshold:
      below_threshold += 1
    else:
      image = coco.images[chosen[index_of[entry["image_id"]]]]
      is_visible = touches(entry["bbox"], image["width"], image["height"])
      empty += not is_visible
      rows += [(index_of[entry["image_id"]], entry["bbox"], entry["score"])] if is_visible else []
  if invalid:
    raise UserError(
      f"{path}: {len(invalid)} detections cannot be used: numbers {first_items(invalid)}; each needs "
      "image_id, a whole number, a bbox of 4 finite numbers and a score."
    )
  if unknown and others == "error":
    raise UserError(
      f"{path}: {len(unknown)} detections are of {len(set(unknown))} images that {coco.path} does not list: "
      f"{first_items(sorted(set(unknown), key=str))}; {remedy}."
    )
  choice = f"people are category {category}, see data.person_category"
  notes = (
    [f"{len(other_categories)} detections of categories {_counted(other_categories)} are left out, {choice}"]
    if other_categories
    else []
  )
  notes += [f"{len(unknown)} detections of images outside the split are left out"] if unknown else []
  notes += [f"{below_threshold} detections with a score below {threshold:g} are left out"] if below_threshold else []
  notes += [f"{empty} detected boxes without an area inside their image are left out"] if empty else []
  without_detection = sorted(set(range(len(chosen))) - {image for image, _, _ in rows})
  notes += [f"{len(without_detection)} images have no detection and count as such"] if without_detection else []
  return Samples(
    np.array([image for image, _, _ in rows], np.int32),
    np.array([box for _, box, _ in rows], np.float32).reshape(-1, 4),
    np.array([score for _, _, score in rows], np.float32),
    np.zeros((len(rows), len(coco.category["keypoints"]), 3), np.float32),
    notes,
  )


def touches(box: Sequence[float], width: int, height: int) -> bool:
  """Whether a box has an area and overlaps its image."""
  x, y, w, h = box
  return w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0


def clipped(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float] | None:
  """Clips a box to its image; None if nothing is left.

  Source: mmpose 0.x topdown_coco_dataset.py, where a box of w pixels extends from x to x + w - 1, and one that starts
  outside the image is shifted inside before it is clipped.
  """
  if not touches(box, width, height):
    return None
  x, y, w, h = (float(number) for number in box)
  left, top = max(0.0, x), max(0.0, y)
  right, bottom = min(width - 1, left + max(0.0, w - 1)), min(height - 1, top + max(0.0, h - 1))
  return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def _category(content: object, path: str | Path) -> Fields:
  """The category with keypoints, which must be unique."""
  parts = ("images", "annotations", "categories")
  if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
    raise UserError(f"{path} is not an annotation file: it needs the lists {', '.join(parts)}.")
  categories = [
    category for category in content["categories"] if isinstance(category, dict) and category.get("keypoints")
  ]
  if len(categories) != 1:
    raise UserError(
      f"{path} has {len(categories)} categories with keypoints; one is needed, whose 'keypoints' are their names "
      "(person_keypoints_*.json has it, instances_*.json does not)."
    )
  names = categories[0]["keypoints"]
  if not _is_int(categories[0].get("id")) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise UserError(
      f"{path}: the category with keypoints needs an id, a whole number, and 'keypoints', a list of names."
    )
  return {key: categories[0][key] for key in ("id", "name", "keypoints", "skeleton") if key in categories[0]}


def _has_image(entry: Fields, index_of: dict[int, int]) -> bool:
  """Whether an entry is of a listed image."""
  return _is_int(entry.get("image_id")) and entry["image_id"] in index_of


def _is_usable(entry: Fields, count: int) -> bool:
  """Whether the keypoints (optional for a crowd), the area and the iscrowd of an annotation are valid."""
  crowd, area = entry.get("iscrowd"), entry.get("area")
  if crowd not in (None, 0, 1) or not (area is None or _numbers([area], 1)):
    return False
  return bool(crowd and "keypoints" not in entry) or _numbers(entry.get("keypoints"), 3 * count)


def _completed(entry: Fields, count: int) -> Fields:
  """The annotation with optional fields added: the area of the box, the number of labeled keypoints."""
  points = entry.get("keypoints", [0] * 3 * count)
  return {
    "image_id": entry["image_id"],
    "bbox": entry["bbox"],
    "area": entry["bbox"][2] * entry["bbox"][3] if entry.get("area") is None else entry["area"],
    "iscrowd": int(bool(entry.get("iscrowd"))),
    "keypoints": points,
    "num_keypoints": sum(visible > 0 for visible in points[2::3]),
  }


def _numbers(values: object, count: int) -> bool:
  """Whether this is a list of `count` numbers in the valid range."""
  if not isinstance(values, list | tuple) or len(values) != count:
    return False
  is_number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
  return all(is_number(value) and -LARGEST < value < LARGEST for value in values)  # False for NaN


def _is_int(value: object) -> bool:
  """Whether this is an integer, as an id."""
  return isinstance(value, int) and not isinstance(value, bool)


def _counted(entries: Sequence[Fields]) -> str:
  """The category ids with their counts, as in "0 (5), 3 (1)", the most frequent first."""
  counts = collections.Counter(str(entry.get("category_id"))[:20] for entry in entries)
  return first_items([f"{name} ({count})" for name, count in counts.most_common()])
