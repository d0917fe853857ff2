"""Pictures that EXIF data turn, in a folder that is a data set of one's own of every kind."""

import json

import cv2
import numpy as np
from PIL import Image

from vpd_jax.data.datasets import depth_list, keypoint_list, mask_folder, refer_list

SIZE, COUNT, TURNED = (24, 40), 6, (1, 4)  # pictures of which two are turned


def picture(number):
  return cv2.resize(np.random.default_rng(number).integers(0, 256, (3, 5, 3), np.uint8), SIZE[::-1])


def write(root, orientation):
  """The same pictures for every data set; number 0, 1 .. as .png, which loses nothing."""
  for folder in ("images", "masks", "depth"):
    (root / folder).mkdir(parents=True)
  for number in range(COUNT):
    exif = Image.Exif()
    exif[0x0112] = orientation if number in TURNED else 1
    Image.fromarray(picture(number)).save(root / f"images/{number}.png", exif=exif)
    mask = np.zeros(SIZE, np.uint8)
    mask[2:8, 3:9] = 1
    cv2.imwrite(str(root / f"masks/{number}.png"), mask)
    cv2.imwrite(str(root / f"depth/{number}.png"), mask.astype(np.uint16) * 2000 + 1000)
  names = [f"{number}.png" for number in range(COUNT)]
  (root / "train_list.txt").write_text("\n".join(f"images/{name} depth/{name}" for name in names))
  entries = [{"image": f"images/{name}", "mask": f"masks/{name}", "sentences": ["it"]} for name in names]
  (root / "sentences.json").write_text(json.dumps(entries))
  images = [{"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in enumerate(names)]
  person = {"category_id": 1, "bbox": [3, 2, 6, 6], "keypoints": [4, 3, 2, 7, 6, 2]}
  people = [person | {"id": i + 1, "image_id": i} for i in range(COUNT)]
  categories = [{"id": 1, "name": "it", "keypoints": ["a", "b"]}]
  (root / "train.json").write_text(json.dumps({"images": images, "annotations": people, "categories": categories}))
  return root


MADE = {  # each with the key of what belongs to the picture
  "masks": (lambda root, exif: mask_folder.MaskFolder(root=root, classes=("no", "yes"), exif=exif), "label"),
  "depth": (
    lambda root, exif: depth_list.DepthList(root=root, factor=1e3, max_depth=9.0, crop=(8, 8), exif=exif),
    "depth",
  ),
  "sentences": (lambda root, exif: refer_list.ReferList(root=root, crop=(8, 8), exif=exif), "mask"),
  "keypoints": (lambda root, exif: keypoint_list.KeypointList(root=root, crop=(64, 64), exif=exif), "keypoints"),
}
MADE = {name: ((lambda root, exif, make=make: make(str(root), exif)), key) for name, (make, key) in MADE.items()}
