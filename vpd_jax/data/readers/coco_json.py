"""COCO's JSON files of people: annotations with keypoints, and boxes of a detector.

An annotation file holds "images" (id, file_name, width, height), "annotations" (image_id, bbox as x, y, width, height,
keypoints as x, y, visibility for each, area, iscrowd), and "categories", one of which names the keypoints. A detection
file is a list of image_id, category_id, bbox, score.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vpd_jax.data.readers import image_files
from vpd_jax.errors import UserError
from vpd_jax.files import reading
from vpd_jax.types import Fields

LARGEST = 1e9  # beyond which no number is a place in a picture


class Annotations(NamedTuple):
  """The content of an annotation file, checked.

  Attributes:
    path: of the file, for messages; None where there is none.
    images: {"id", "file_name", "width", "height"} each, in the order of the file.
    people: annotations by image, in the order of the file; each has "bbox", "keypoints", "area", "iscrowd" and
      "num_keypoints", filled in where the file leaves the last three out.
    category: {"id", "name", "keypoints"}.
    others: number of annotations of other categories, which are left out.
  """

  path: Path | None
  images: list[Fields]
  people: list[list[Fields]]
  category: Fields
  others: int = 0


class Samples(NamedTuple):
  """The people of a split, one row each.

  Attributes:
    image: int32 [N], number of the picture.
    box: float32 [N, 4], x, y, width, height.
    box_score: float32 [N], 1 for an annotated box.
    keypoints: float32 [N, K, 3], x, y, and 2 visible, 1 hidden, 0 without label; all 0 for a detected box.
    notes: lines on what was left out.
  """

  image: np.ndarray
  box: np.ndarray
  box_score: np.ndarray
  keypoints: np.ndarray
  notes: list[str]


def keypoint_names(path: str | Path) -> tuple[str, ...]:
  """The names that the annotation file gives its keypoints.

  Raises:
    ValueError: no such file; no category with keypoints, or several.
  """
  return tuple(_category(reading.read_json(path), path)["keypoints"])


def annotations(path: str | Path, names: Sequence[str]) -> Annotations:
  """Reads an annotation file.

  Raises:
    ValueError: in one line, everything that is wrong: not an annotation file, other keypoints than `names`, entries
      without what is needed or of images that are not there (counted, the first ten named).
  """
  path, content = Path(path).expanduser(), reading.read_json(path)
  category = _category(content, path)
  if tuple(category["keypoints"]) != tuple(names):
    raise UserError(
      f"{path} has the keypoints {', '.join(category['keypoints'])}, but the config {', '.join(names)}; make them "
      "agree in number and order, or leave data.keypoints empty, which takes those of the file."
    )
  listed = [image if isinstance(image, dict) else {} for image in content["images"]]
  images: list[Fields] = [{key: image.get(key) for key in ("id", "file_name", "width", "height")} for image in listed]
  named = lambda image: _whole(image["id"]) and isinstance(image["file_name"], str) and image["file_name"]
  sized = lambda image: all(_whole(image[side]) and 0 < image[side] < LARGEST for side in ("width", "height"))
  wrong = [f"image {i}" for i, image in enumerate(images) if not (named(image) and sized(image))]
  ids = [image["id"] for image in images if _whole(image["id"])]
  if len(set(ids)) < len(ids):
    raise UserError(f"{path} lists {len(ids)} images with {len(set(ids))} different ids; each needs its own.")
  number = {image["id"]: i for i, image in enumerate(images) if _whole(image["id"])}
  people: list[list[Fields]] = [[] for _ in images]
  others = 0
  for i, entry in enumerate(content["annotations"]):
    if not isinstance(entry, dict):
      wrong.append(f"annotation {i}")
    elif entry.get("category_id", category["id"]) != category["id"]:
      others += 1
    elif _known(entry, number) and _numbers(entry.get("bbox"), 4) and _described(entry, len(names)):
      people[number[entry["image_id"]]].append(_completed(entry, len(names)))
    else:
      wrong.append(f"annotation {str(entry.get('id', i))[:50]}")
  if wrong:
    raise UserError(
      f"{path}: {len(wrong)} entries cannot be used: {_first(wrong)}; an image needs id, file_name, width and height, "
      f"an annotation the image_id of a listed image, a bbox of 4 and keypoints of {3 * len(names)} finite numbers; "
      "its area, if it says one, is a number, and iscrowd 0 or 1."
    )
  if others and others == len(content["annotations"]):
    raise UserError(
      f"{path}: none of {others} annotations is of category {category['id']}, which has the keypoints; their "
      f"category_id is {_counted(content['annotations'])}. Make them agree."
    )
  return Annotations(path, images, people, category, others)


def truth(found: Annotations, chosen: Sequence[int]) -> Fields:
  """What pycocotools scores against: a COCO file's content of the chosen images, without outlines of people."""
  entries = [entry for i in chosen for entry in found.people[i]]
  # Numbered anew, from 1: pycocotools takes an annotation of id 0 for none.
  own = lambda number: {"id": number + 1, "category_id": found.category["id"]}
  return {
    "images": [found.images[i] for i in chosen],
    "annotations": [entry | own(number) for number, entry in enumerate(entries)],
    "categories": [found.category],
  }


def annotated(found: Annotations, chosen: Sequence[int]) -> Samples:
  """The people of the chosen images who are no crowd, have a labeled keypoint and a box inside the image.

  `image` counts within `chosen`.

  Source: mmpose 0.x datasets/datasets/top_down/topdown_coco_dataset.py _load_coco_keypoint_annotation_kernel.
  """
  rows, without, empty = [], 0, 0
  for place, i in enumerate(chosen):
    for entry in found.people[i]:
      box = clipped(entry["bbox"], found.images[i]["width"], found.images[i]["height"])
      if entry["iscrowd"]:
        continue
      if not entry["num_keypoints"]:
        without += 1
      elif box is None or entry["area"] <= 0:
        empty += 1
      else:
        rows.append((place, box, entry["keypoints"]))
  notes = [f"{found.others} annotations of other categories are left out"] if found.others else []
  notes += [f"{without} people without a labeled keypoint are left out"] if without else []
  notes += [f"{empty} boxes without an area inside their image are left out"] if empty else []
  count = len(found.category["keypoints"])
  return Samples(
    np.array([row[0] for row in rows], np.int32),
    np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
    np.ones(len(rows), np.float32),
    np.array([row[2] for row in rows], np.float32).reshape(-1, count, 3),
    notes,
  )


def detected(
  path: str | Path, found: Annotations, chosen: Sequence[int], *, others: str, threshold: float, category: int = -1
) -> Samples:
  """The boxes of a detector in the chosen images. `image` counts within `chosen`.

  Args:
    path: of the detection file.
    found: the annotations; only their images and category count.
    chosen: numbers of images.
    others: what boxes of images that are not chosen do: "error", or "skip".
    threshold: boxes whose score is not above it are left out.
    category: the category_id of people in that file; -1: as in the annotations.

  Raises:
    ValueError: no detection file, entries without what is needed, boxes of other images, or none of people.

  Source: mmpose 0.x topdown_coco_dataset.py _load_coco_person_detection_results.
  """
  content = reading.read_json(path)
  if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
    raise UserError(f"{path} must be a list of detections: image_id, category_id, bbox, score.")
  number = {found.images[i]["id"]: place for place, i in enumerate(chosen)}
  category = found.category["id"] if category < 0 else category
  foreign = [entry for entry in content if entry.get("category_id") != category]
  if foreign and len(foreign) == len(content):
    raise UserError(
      f"{path}: none of {len(content)} detections is of category {category}; their category_id is {_counted(foreign)}. "
      "Set data.person_category to the one of people: many programs count from 0."
    )
  rows, wrong, unknown, low, empty = [], [], [], 0, 0
  for i, entry in enumerate(content):
    if entry.get("category_id") != category:
      continue
    if not (_numbers(entry.get("bbox"), 4) and _numbers([entry.get("score")], 1) and _whole(entry.get("image_id"))):
      wrong.append(str(i))
    elif entry["image_id"] not in number:
      unknown.append(entry["image_id"])
    elif entry["score"] <= threshold:
      low += 1
    else:
      image = found.images[chosen[number[entry["image_id"]]]]
      inside = touches(entry["bbox"], image["width"], image["height"])
      empty += not inside
      rows += [(number[entry["image_id"]], entry["bbox"], entry["score"])] if inside else []
  if wrong:
    raise UserError(
      f"{path}: {len(wrong)} detections cannot be used: numbers {_first(wrong)}; each needs image_id, a whole number, "
      "a bbox of 4 finite numbers and a score."
    )
  if unknown and others == "error":
    raise UserError(
      f"{path}: {len(unknown)} detections are of {len(set(unknown))} images that {found.path} does not list: "
      f"{_first(sorted(set(unknown), key=str))}; take the detections of this split, or set data.complete=False to "
      "leave them out."
    )
  choice = f"people are category {category}, see data.person_category"
  notes = [f"{len(foreign)} detections of categories {_counted(foreign)} are left out, {choice}"] if foreign else []
  notes += [f"{len(unknown)} detections of images outside the split are left out"] if unknown else []
  notes += [f"{low} detections with a score of {threshold:g} or below are left out"] if low else []
  notes += [f"{empty} detected boxes without an area inside their image are left out"] if empty else []
  empties = sorted(set(range(len(chosen))) - {row[0] for row in rows})
  notes += [f"{len(empties)} images have no detection and count as such"] if empties else []
  return Samples(
    np.array([row[0] for row in rows], np.int32),
    np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
    np.array([row[2] for row in rows], np.float32),
    np.zeros((len(rows), len(found.category["keypoints"]), 3), np.float32),
    notes,
  )


def touches(box: Sequence[float], width: int, height: int) -> bool:
  """Whether a box has an area and some of it lies inside its image."""
  x, y, w, h = box
  return w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0


def clipped(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float] | None:
  """A box cut to its image; None where nothing of it is inside.

  Source: mmpose 0.x topdown_coco_dataset.py, where a box of w pixels reaches from x to x + w - 1, and one that begins
  before the image is moved in before it is cut.
  """
  if not touches(box, width, height):
    return None
  x, y, w, h = (float(number) for number in box)
  left, top = max(0.0, x), max(0.0, y)
  right, bottom = min(width - 1, left + max(0.0, w - 1)), min(height - 1, top + max(0.0, h - 1))
  return (left, top, right - left, bottom - top) if right > left and bottom > top else None


def _category(content: object, path: str | Path) -> Fields:
  """The one category that has keypoints."""
  parts = ("images", "annotations", "categories")
  if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
    raise UserError(f"{path} is no annotation file: it needs the lists {', '.join(parts)}.")
  named = [category for category in content["categories"] if isinstance(category, dict) and category.get("keypoints")]
  if len(named) != 1:
    raise UserError(
      f"{path} has {len(named)} categories with keypoints; one is needed, whose 'keypoints' are their names "
      "(person_keypoints_*.json has it, instances_*.json has not)."
    )
  names = named[0]["keypoints"]
  if not _whole(named[0].get("id")) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise UserError(
      f"{path}: the category with keypoints needs an id, a whole number, and 'keypoints', a list of names."
    )
  return {key: named[0][key] for key in ("id", "name", "keypoints", "skeleton") if key in named[0]}


def _known(entry: Fields, number: dict[int, int]) -> bool:
  """Whether an entry is of an image that is there."""
  return _whole(entry.get("image_id")) and entry["image_id"] in number


def _described(entry: Fields, count: int) -> bool:
  """Whether the annotation's keypoints can be used, which a crowd may leave out, its area, its iscrowd."""
  crowd, area = entry.get("iscrowd"), entry.get("area")
  if crowd not in (None, 0, 1) or not (area is None or _numbers([area], 1)):
    return False
  return bool(crowd and "keypoints" not in entry) or _numbers(entry.get("keypoints"), 3 * count)


def _completed(entry: Fields, count: int) -> Fields:
  """The annotation with what files may leave out: the area of the box, the number of labeled keypoints."""
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
  """Whether this is a list of that many numbers that float32 holds."""
  if not isinstance(values, list | tuple) or len(values) != count:
    return False
  number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
  return all(number(value) and -LARGEST < value < LARGEST for value in values)  # NaN is not


def _whole(value: object) -> bool:
  """Whether this is a whole number, as ids are."""
  return isinstance(value, int) and not isinstance(value, bool)


def _counted(entries: Sequence[Fields]) -> str:
  """Their category_id and how often, as in "0 (5), 3 (1)", the most frequent first."""
  counts = collections.Counter(str(entry.get("category_id"))[:20] for entry in entries)
  return _first([f"{name} ({count})" for name, count in counts.most_common()])


def _first(items: Sequence[object]) -> str:
  return ", ".join(map(str, items[: image_files.SHOWN])) + (", ..." if len(items) > image_files.SHOWN else "")
