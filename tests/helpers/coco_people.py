"""Files of COCO's form with a few people, for tests."""

import json

import cv2
import numpy as np

from vpd_jax.data.transforms.top_down import COCO

SIZE = (90, 120)
CATEGORY = {"supercategory": "person", "id": 1, "name": "person", "keypoints": list(COCO.names), "skeleton": [[16, 14]]}


def pose(box, seed, hidden=()):
  """51 numbers: 17 keypoints inside a box, those of `hidden` without label."""
  rng = np.random.default_rng(seed)
  x, y, w, h = box
  points = np.stack(
    [x + w * rng.uniform(0.05, 0.95, 17), y + h * rng.uniform(0.05, 0.95, 17), np.full(17, 2.0)], axis=1
  )
  points[5, 2] = 1
  points[list(hidden)] = 0
  return np.round(points, 1).ravel().tolist()


def person(number, image_id, box, **changes):
  entry = {"id": number, "image_id": image_id, "category_id": 1, "bbox": list(box), "iscrowd": 0}
  entry |= {"area": box[2] * box[3] * 0.6, "keypoints": pose(box, number), "segmentation": [[1, 2, 3, 4, 5, 6]]}
  entry |= changes
  entry["num_keypoints"] = sum(v > 0 for v in entry["keypoints"][2::3])
  return entry


def image(number):
  return {"id": number, "file_name": f"{number:012}.jpg", "height": SIZE[0], "width": SIZE[1]}


def content():
  """Four pictures. 30: two people. 20: nobody. 70: one with keypoints, one without, a crowd, two impossible boxes.
  10: one person whose box reaches over the border."""
  entries = [
    person(1, 30, (10, 10, 40, 60)),
    person(2, 30, (60, 20, 30, 50), keypoints=pose((60, 20, 30, 50), 2, hidden=(0, 1, 16))),
    person(3, 70, (20, 5, 50, 80)),
    person(4, 70, (80, 5, 20, 30), keypoints=[0] * 51),
    person(5, 70, (70, 40, 40, 40), iscrowd=1, keypoints=[0] * 51),
    person(6, 70, (-60, 10, 40, 40)),
    person(7, 70, (30, 10, 0, 40), area=1.0),
    person(8, 10, (-10, 30, 60, 80), keypoints=pose((2, 32, 40, 50), 8)),
  ]
  return {"info": {}, "images": [image(n) for n in (30, 20, 70, 10)], "annotations": entries, "categories": [CATEGORY]}


def detections():
  """Two for each person of 30, one in 20 where nobody is, none in 10, one without area and one outside in 70."""
  boxes = [(30, (9, 11, 42, 58), 0.9), (30, (12, 9, 38, 62), 0.8), (30, (61, 19, 29, 52), 0.7)]
  boxes += [(20, (5, 5, 50, 50), 0.3), (70, (19, 6, 52, 78), 0.95), (70, (10, 10, 0, 30), 0.6)]
  boxes += [(70, (-50, 10, 40, 30), 0.5)]
  made = [{"image_id": i, "category_id": 1, "bbox": list(box), "score": score} for i, box, score in boxes]
  return [*made, {"image_id": 30, "category_id": 3, "bbox": [1, 1, 5, 5], "score": 0.99}]


def write(root, train=None, evaluation=None, found=None):
  """The folder of COCO as users have it."""
  parts = {
    "train2017": content() if train is None else train,
    "val2017": content() if evaluation is None else evaluation,
  }
  (root / "annotations").mkdir(parents=True)
  (root / "person_detection_results").mkdir()
  rng = np.random.default_rng(0)
  for split, part in parts.items():
    (root / split).mkdir()
    (root / f"annotations/person_keypoints_{split}.json").write_text(json.dumps(part))
    for entry in part["images"]:
      picture = cv2.resize(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), SIZE[::-1])
      cv2.imwrite(str(root / split / entry["file_name"]), picture)
  path = root / "person_detection_results/COCO_val2017_detections_AP_H_56_person.json"
  path.write_text(json.dumps(detections() if found is None else found))
  return root
