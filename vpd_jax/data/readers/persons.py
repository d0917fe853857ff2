"""People in pictures as records: a picture file and one person of it, from files or from prepared shards.

Pictures with several people are read once for each of them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpd_jax.data.readers import coco_json, image_files
from vpd_jax.errors import UserError
from vpd_jax.types import Example, Fields, Source

# Of a record, by key; the kinds are those of builders.KINDS. "person" is JSON: numbers in text lose nothing.
STORED = {"image": "picture", "image_path": "text", "person": "text", "image_index": "int32", "index": "int32"}


class PersonSource(Source):
  """Random access to the people of a split; a picture is read with `[]`.

  Attributes:
    notes: lines on what was left out, for the start of a run.
  """

  def __init__(self, folder: Path, images: Sequence[Fields], samples: coco_json.Samples, exif: str | None = None):
    """
    Args:
      folder: the pictures' names start from.
      images: {"file_name", "width", "height"} of the split's pictures.
      samples: the people.
      exif: see files.EXIF; None for published data.
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
    """What is stored of a person, see STORED: the picture's file as it is."""
    picture = int(self.image[index])
    person = {
      "box": self.box[index].tolist(),
      "box_score": float(self.box_score[index]),
      "keypoints": self.keypoints[index].tolist(),
      "size": self.sizes[picture].tolist(),
    }
    return {
      "image": image_files.read_bytes(self.folder / self.names[picture]),
      "image_path": self.names[picture],
      "person": json.dumps(person),
      "image_index": np.int32(picture),
      "index": np.int32(index),
    }

  def __getitem__(self, index: int) -> Example:
    return decode(self.record(index), self.folder, exif=self.exif)

  def summary(self) -> str:
    """How many people there are."""
    return f"{len(self)} people"


def decode(record: image_files.Record, folder: Path | None = None, *, exif: str | None = None) -> Example:
  """The Example of a record, what keypoints.Augmentation begins with; `exif` see files.EXIF.

  Raises:
    ValueError: the picture is missing, damaged, or of another size than the annotations say; names it.
  """
  path = record["image_path"] if folder is None else folder / record["image_path"]
  image, person = image_files.decode_image(record["image"], path, exif), json.loads(record["person"])
  if image.shape[:2] != tuple(person["size"]):
    sizes = ["{}x{}".format(*size) for size in (image.shape[:2], person["size"])]
    hint = image_files.turned_hint(image, np.empty(person["size"]), exif)
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
  found: coco_json.Annotations,
  chosen: Sequence[int],
  samples: coco_json.Samples,
  source: str,
  exif: str | None = None,
) -> PersonSource:
  """The people of the chosen images, whose files are all there.

  Args:
    folder: of the pictures.
    found: the annotations.
    chosen: numbers of images.
    samples: their people.
    source: where pictures are obtained, for messages.
    exif: see files.EXIF; None for published data.

  Raises:
    ValueError: nobody is left, or pictures are missing (all are counted).
  """
  if not len(samples.image):
    left_out = "; ".join(samples.notes) or "there are no annotations"
    raise UserError(f"{found.path} gives no person to look at in {len(chosen)} images: {left_out}.")
  images = [found.images[i] for i in chosen]
  needed = sorted({images[picture]["file_name"] for picture in samples.image.tolist()})
  image_files.require_files(folder, needed, source)
  if exif is not None:
    samples = samples._replace(
      notes=[*samples.notes, *image_files.exif_notes((folder / name for name in needed), exif)]
    )
  return PersonSource(folder, images, samples, exif)
