"""Figures in procedural rooms: one person per room, 17 COCO keypoints, visible or hidden; no files.

A record is the first of the rooms index, index + count, index + 2 count, ... that shows enough of a figure, so no room
is used twice. Figures have no face, so only those seen from the front are used: from behind, left and right would be
ambiguous.
"""

import dataclasses

import numpy as np

from vpd_jax.data import captions, validation
from vpd_jax.data.datasets import rooms
from vpd_jax.data.datasets.pose import PoseDataset
from vpd_jax.data.readers import coco_json
from vpd_jax.data.rooms import render
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.errors import UserError, check_choice
from vpd_jax.types import Example, Fields, Source

MINIMUM = 6  # keypoints inside the image
NARROWEST = 16  # shorter side of the box in pixels, for an image of 120 rows
TRIES = 64
LEFT, RIGHT = (top_down_transforms.COCO.names.index(f"{side}_shoulder") for side in ("left", "right"))


@dataclasses.dataclass(eq=False, kw_only=True)
class RoomFigures(PoseDataset):
  """Crops of figures in procedural rooms.

  Args:
    size: (height, width) of an image.
    train_count, eval_count: number of figures in each split.
    seed: of the data set.
    captioned: whether Examples also have "sentence", the caption of the room, see rooms.caption.
    format: "files" renders rooms on demand, "tfds" reads them from prepared shards.
    root: folder of the shards, with format="tfds".
  """

  size: tuple[int, int] = (120, 160)
  crop: tuple[int, int] = (128, 96)
  train_count: int = 4096
  eval_count: int = 64
  seed: int = 0
  captioned: bool = False
  root: str = ""

  def __post_init__(self):
    rooms.check_root(self.root, self.format)
    self.size = validation.check_size("size", self.size)
    self.seed, self.counts = int(self.seed), rooms.check_counts(self.train_count, self.eval_count, self.seed)
    super().__post_init__()
    self.made_with = {"size": self.size, "seed": self.seed, **self.counts}
    if self.captioned:
      self.provides = self.provides | {"sentence"}
      self.made_with["captioned"] = True

  def describe(self, *, skip_unreadable: bool = False) -> list[str]:
    """Empty, see rooms.Rooms."""
    return []

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """See PoseDataset."""
    augment = super().train_transform
    return captions.keep_sentence(lambda rest: augment(rest, rng, position), example)

  def eval_transform(self, example: Example) -> Example:
    """See PoseDataset."""
    return captions.keep_sentence(super().eval_transform, example)

  def source(self, split: str) -> "Figures | reader.Shards":
    """The figures of "train" or "eval", rendered by `[]`, or read from shards."""
    if self.format == "tfds":
      return reader.Shards(self.root, "room_figures", split, made_with=self.made_with)
    return self._figures(split)

  def _figures(self, split: str) -> "Figures":
    check_choice("split", split, rooms.SPLITS)
    return Figures(self.seed, split, self.counts[split], self.size, captioned=self.captioned)

  def truth(self, split: str) -> Fields:
    """The ground truth, see coco_pose.CocoPose.truth; renders every room once."""
    source, height, width = self._figures(split), *self.size
    people = [source.person(index) for index in range(len(source))]
    images = [{"id": i, "file_name": f"room {i}", "height": height, "width": width} for i in range(len(people))]
    category = {"id": 1, "name": "person", "keypoints": list(self.classes)}
    for i, entry in enumerate(people):
      entry["image_id"] = i
    annotations = coco_json.Annotations(None, images, [[entry] for entry in people], category)
    return coco_json.truth(annotations, range(len(people)))


class Figures(Source):
  """Random access to the figures of one split, rendered on demand."""

  def __init__(self, seed: int, split: str, count: int, size: tuple[int, int], *, captioned: bool = False):
    self.seed, self.split, self.count, self.size, self.captioned = seed, split, count, size, captioned

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Example:
    """The input of top_down.Augmentation, and "sentence" if the figures are captioned."""
    if not 0 <= index < self.count:
      raise IndexError(f"index={index} is outside the {self.count} figures of {self.split!r}.")
    room, points, box = self._draw(int(index))
    return {
      "image": room.image,
      "keypoints": points,
      "box": box,
      "box_score": np.asarray(1, np.float32),
      "image_index": np.asarray(index, np.int32),
      "index": np.asarray(index, np.int32),
      **({"sentence": rooms.caption(room)} if self.captioned else {}),
    }

  def person(self, index: int) -> Fields:
    """The figure as an annotation in COCO format; its area is the visible one."""
    room, points, box = self._draw(index)
    return {
      "bbox": box.tolist(),
      "area": float(np.sum(room.labels == rooms.CLASSES.index("person"))),
      "iscrowd": 0,
      "keypoints": points.ravel().tolist(),
      "num_keypoints": int(np.sum(points[:, 2] > 0)),
    }

  def _draw(self, index: int) -> tuple[rooms.Room, np.ndarray, np.ndarray]:
    """Renders the room of a figure; returns the room, keypoints and box."""
    for number in range(index, index + TRIES * self.count, self.count):
      if not self._shows_front(number):
        continue
      room = rooms.draw(self.seed, self.split, number, self.size)
      points, box = rooms.keypoints(room), rooms.person_box(room)
      if np.sum(points[:, 2] > 0) >= MINIMUM and min(box[2:]) >= NARROWEST * self.size[0] / 120:
        return room, points, box
    raise UserError(
      f"none of {TRIES} rooms of {self.size[0]}x{self.size[1]} pixels shows a figure from the front; make size larger."
    )

  def _shows_front(self, number: int) -> bool:
    """Whether a room has a person facing the camera, by the order of the shoulders, without rendering it."""
    _, _, scene = rooms.build_scene(self.seed, self.split, number)
    if scene.joints is None:
      return False
    pixels, depth = render.project(scene.joints, scene.camera, self.size)
    return bool(min(depth[LEFT], depth[RIGHT]) > 0 and pixels[LEFT, 0] > pixels[RIGHT, 0])
