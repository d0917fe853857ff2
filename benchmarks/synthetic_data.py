"""Synthetic data sets in the layouts, formats and sizes of the real ones, for benchmarks of the input.

Images are smooth with added noise, and compress about as well as photographs.
"""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np

from vpd_jax.data.transforms.top_down import COCO

Size = tuple[int, int]


def image(rng: np.random.Generator, size: Size, noise: int = 10) -> np.ndarray:
  """uint8 [H, W, 3]."""
  coarse = rng.integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
  smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.int16)
  return np.clip(smooth + rng.integers(-noise, noise + 1, smooth.shape), 0, 255).astype(np.uint8)


def blobs(rng: np.random.Generator, size: Size, classes: int) -> np.ndarray:
  """uint8 [H, W], a dozen of the `classes` ids."""
  levels = cv2.resize(rng.random((8, 12), np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
  return rng.permutation(classes)[np.clip(levels * 12, 0, 11).astype(int)].astype(np.uint8)


def save(path: Path, content: np.ndarray) -> None:
  """Writes a JPEG of quality 92, or a PNG, depending on the suffix."""
  path.parent.mkdir(parents=True, exist_ok=True)
  cv2.imwrite(str(path), content, [cv2.IMWRITE_JPEG_QUALITY, 92] if path.suffix == ".jpg" else [])


def nyu(root: Path, count: int) -> None:
  """480 x 640 JPEG with dense 16-bit depth in millimeters, and the list of training."""
  rng, lines = np.random.default_rng(0), []
  for index in range(count):
    names = f"kitchen_0001/rgb_{index:05}.jpg", f"kitchen_0001/sync_depth_{index:05}.png"
    depth = cv2.resize(rng.uniform(500, 9500, (30, 40)).astype(np.float32), (640, 480))
    save(root / "sync" / names[0], image(rng, (480, 640)))
    save(root / "sync" / names[1], depth.astype(np.uint16))
    lines.append(" ".join(names))
  (root / "train_list.txt").write_text("\n".join(lines) + "\n")


def kitti(root: Path, count: int) -> None:
  """375 x 1242 PNG with depth of LiDAR at one pixel of twenty, and the list of training."""
  rng, lines, drive = np.random.default_rng(0), [], "2011_09_26_drive_0057_sync"
  for index in range(count):
    names = (
      f"2011_09_26/{drive}/image_02/data/{index:010}.png",
      f"{drive}/proj_depth/groundtruth/image_02/{index:010}.png",
    )
    points = rng.random((375, 1242)) < 0.05
    save(root / "raw_data" / names[0], image(rng, (375, 1242)))
    depth = np.where(points, rng.integers(512, 80 * 256, points.shape), 0)
    save(root / "data_depth_annotated/train" / names[1], depth.astype(np.uint16))
    lines.append(f"/raw_data/{names[0]} /data_depth_annotated/train/{names[1]}")
  (root / "train_list.txt").write_text("\n".join(lines) + "\n")


def ade20k(root: Path, count: int) -> None:
  """512 x 683 JPEG with gray PNG of 150 classes."""
  rng = np.random.default_rng(0)
  for index in range(count):
    name = f"training/ADE_train_{index:08}"
    save(root / "images" / f"{name}.jpg", image(rng, (512, 683)))
    save(root / "annotations" / f"{name}.png", blobs(rng, (512, 683), 151))


def cityscapes(root: Path, count: int) -> None:
  """1024 x 2048 PNG with label ids."""
  rng = np.random.default_rng(0)
  for index in range(count):
    name = f"train/aachen/aachen_{index:06}_000019"
    save(root / "leftImg8bit" / f"{name}_leftImg8bit.png", image(rng, (1024, 2048), noise=3))
    save(root / "gtFine" / f"{name}_gtFine_labelIds.png", blobs(rng, (1024, 2048), 34))


def refcoco(root: Path, count: int) -> None:
  """480 x 640 JPEG, an outlined object in each, three sentences about it."""
  rng, references, images, outlines = np.random.default_rng(0), [], [], []
  for index in range(count):
    name = f"COCO_train2014_{index:012}.jpg"
    save(root / "images/train2014" / name, image(rng, (480, 640)))
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    outline = np.stack([320 + 150 * np.cos(angles), 240 + 120 * np.sin(angles)], 1) + rng.uniform(-9, 9, (40, 2))
    sentences = [
      {"sent_id": 3 * index + i, "sent": text, "raw": text, "tokens": text.split()}
      for i, text in enumerate(("the red car", "car on the left", "the car next to a tree"))
    ]
    references.append(
      {
        **{"ref_id": index, "ann_id": index, "image_id": index, "category_id": 1, "split": "train"},
        **{"file_name": name, "sent_ids": [s["sent_id"] for s in sentences], "sentences": sentences},
      }
    )
    images.append({"id": index, "file_name": name, "height": 480, "width": 640})
    outlines.append({"id": index, "segmentation": [outline.ravel().tolist()]})
  (root / "refcoco").mkdir(parents=True)
  (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
  (root / "refcoco/instances.json").write_text(json.dumps({"images": images, "annotations": outlines}))


def coco_pose(root: Path, count: int) -> None:
  """480 x 640 JPEG, two people in each."""
  rng, images, people = np.random.default_rng(0), [], []
  for index in range(count // 2):
    images.append({"id": index, "file_name": f"{index:012}.jpg", "height": 480, "width": 640})
    save(root / "train2017" / images[-1]["file_name"], image(rng, (480, 640)))
    for _ in range(2):
      x, y, w, h = rng.uniform((0, 0, 60, 120), (400, 200, 200, 270)).tolist()
      points = np.stack([rng.uniform(x, x + w, 17), rng.uniform(y, y + h, 17), np.full(17, 2)], axis=1)
      people.append({"image_id": index, "category_id": 1, "bbox": [x, y, w, h], "keypoints": points.ravel().tolist()})
  category = {"id": 1, "name": "person", "keypoints": list(COCO.names)}
  (root / "annotations").mkdir()
  content = {"images": images, "annotations": people, "categories": [category]}
  (root / "annotations/person_keypoints_train2017.json").write_text(json.dumps(content))


WRITERS = {maker.__name__: maker for maker in (nyu, kitti, ade20k, cityscapes, refcoco, coco_pose)}
