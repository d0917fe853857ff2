"""Records of people: an image file and one person, from files or from prepared shards.

Images with several people are read once per person.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpd_jax.data.readers import coco_json, image_files
from vpd_jax.errors import UserError
from vpd_jax.types import Example, Fields, Source

# Features of a record, see shards/writer.py:FEATURES. "person" is JSON, which preserves the numbers exactly.
STORED = {"image": "picture", "image_path": "text", "person": "text", "image_index": "int32", "index": "int32"}


class PersonSource(Source):
  """Random access to the people of a split; images are read by `[]`.

  Attributes:
    notes: lines on what was skipped, for the start of a run.
  """

  def __init__(self, folder: Path, images: Sequence[Fields], samples: coco_json.Samples, exif: str | None = None):
    """
    Args:
      folder: that the image names are relative to.
      images: {"file_name", "width", "height"} of the images of the split.
      samples: the people.
      exif: see image_files.EXIF; None for published data.
    """
    self.folder, self.notes, self.exif = folder, samples.notes, exif
    self.names = [image["file_name"] for image in images]
    self.sizes = np.array([[image["height"], image["width"]] for image in images], np.int32).reshape(-1, 2)
    self.image, self.box, self.box_score, self.keypoints = samples[:4]

  def __len__(self) -> int:
    return len(self.image)

  def picture(self, index: int) -> str:
    """See Source."""
    return self.names[self.image[index]]

  def record(self, index: int) -> image_files.Record:
    """The record of a person, see STORED, with the unmodified image file."""
    image_index = int(self.image[index])
    person = {
      "box": self.box[index].tolist(),
      "box_score": float(self.box_score[index]),
      "keypoints": self.keypoints[index].tolist(),
      "size": self.sizes[image_index].tolist(),
    }
    return {
      "image": image_files.read_bytes(self.folder / self.names[image_index]),
      "image_path": self.names[image_index],
      "person": json.dumps(person),
      "image_index": np.int32(image_index),
      "index": np.int32(index),
    }

  def __getitem__(self, index: int) -> Example:
    return decode(self.record(index), self.folder, exif=self.exif)

  def summary(self) -> str:
    """The number of people."""
    return f"{len(self)} people"


def decode(record: image_files.Record, folder: Path | None = None, *, exif: str | None = None) -> Example:
  """Decodes a record to an Example, the input of top_down.Augmentation; `exif` see image_files.EXIF.

  Raises:
    ValueError: if the image is missing, damaged, or of another size than annotated; names it.
  """
  path = record["image_path"] if folder is None else folder / record["image_path"]
  image, person = image_files.decode_image(record["image"], path, exif), json.loads(record["person"])
  if image.shape[:2] != tuple(person["size"]):
    sizes = ["{}x{}".format(*size) for size in (image.shape[:2], person["size"])]
    hint = image_files.exif_hint(image, np.empty(person["size"]), exif)
    raise UserError(
      f"{path} is {sizes[0]}, but the annotations say {sizes[1]}; it was resized or turned after it was "
      f"annotated{hint}."
    )
  return {
    "image": image,
    "keypoints": np.array(person["keypoints"], np.float32),
    "box": np.array(person["box"], np.float32),
    "box_score": np.float32(person["box_score"]),
    "image_index": np.asarray(record["image_index"], np.int32),
    "index": np.asarray(record["index"], np.int32),
  }


def open_split(
  folder: Path,
  annotations: coco_json.Annotations,
  chosen: Sequence[int],
  samples: coco_json.Samples,
  source: str,
  exif: str | None = None,
) -> PersonSource:
  """The people of the chosen images, after a check that all image files exist.

  Args:
    folder: of the images.
    annotations: of the split.
    chosen: indices of images.
    samples: their people.
    source: where to obtain the images, for messages.
    exif: see image_files.EXIF; None for published data.

  Raises:
    ValueError: if there are no people, or images are missing (all are counted).
  """
  if not len(samples.image):
    left_out = "; ".join(samples.notes) or "there are no annotations"
    raise UserError(f"{annotations.path} gives no person to look at in {len(chosen)} images: {left_out}.")
  images = [annotations.images[i] for i in chosen]
  file_names = sorted({images[index]["file_name"] for index in samples.image.tolist()})
  image_files.require_files(folder, file_names, source)
  if exif is not None:
    samples = samples._replace(
      notes=[*samples.notes, *image_files.exif_notes((folder / name for name in file_names), exif)]
    )
  return PersonSource(folder, images, samples, exif)
