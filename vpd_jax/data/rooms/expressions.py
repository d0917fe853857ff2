"""Sentences about the objects of procedural rooms: by room in training, one at a time in evaluation."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vpd_jax.data.readers import referring
from vpd_jax.types import Example, Source

Draw = Callable[[int], Any]  # (index) -> rooms.Room
Say = Callable[[Any], list[tuple[str, int]]]  # (room) -> [(sentence, number of the object)]


class RoomExpressions(Source):
  """Random access to rooms with all their sentences, or to single sentences, rendered on demand."""

  def __init__(self, draw: Draw, say: Say, count: int, *, single: bool):
    """
    Args:
      draw, say: see Draw and Say; must be picklable.
      count: number of rooms.
      single: whether an item is one sentence instead of one room; all rooms are then rendered to count them.
    """
    self.draw, self.say, self.count = draw, say, count
    self.items = [(index, *said) for index in range(count) for said in say(draw(index))] if single else None

  def __len__(self) -> int:
    return self.count if self.items is None else len(self.items)

  def __getitem__(self, index: int) -> Example:
    """The Example of an item.

    Returns:
      "image" uint8 [H, W, 3]; "instances" int32 [H, W], number of the object at each pixel; "sentences" str, one per
      line; "numbers" int32 [S], the objects they are about; "image_id" and "index" int32 [].
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index={index} is outside the {len(self)} records.")
    if self.items is not None:
      room_index, text, number = self.items[index]
      room, labeled_sentences = self.draw(room_index), [(text, number)]
    else:
      room_index = index
      room = self.draw(room_index)
      while not (labeled_sentences := self.say(room)):  # no object to describe: try a room that no other index uses
        room_index += self.count
        room = self.draw(room_index)
    return {
      **{
        "image": room.image,
        "instances": room.instances,
        "sentences": "\n".join(text for text, _ in labeled_sentences),
      },
      "numbers": np.array([number for _, number in labeled_sentences], np.int32),
      **{"image_id": np.asarray(room_index, np.int32), "index": np.asarray(index, np.int32)},
    }

  def sentences(self) -> list[str]:
    """All sentences of the evaluation; empty for training, where rooms are rendered on demand."""
    return [text for _, text, _ in self.items or ()]


def training(example: Example, rng: np.random.Generator, transforms: referring.Transforms) -> Example:
  """A random sentence with the mask of its object, see referring.Transforms.training."""
  return transforms.training(_of_one(example, int(rng.integers(len(example["numbers"])))), rng)


def evaluation(example: Example, transforms: referring.Transforms) -> Example:
  """A sentence of the room, chosen by the index of the example, see referring.Transforms.evaluation."""
  rng = np.random.default_rng(int(example["index"]))
  return transforms.evaluation(_of_one(example, int(rng.integers(len(example["numbers"])))))


def _of_one(example: Example, choice: int) -> Example:
  mask = (example["instances"] == example["numbers"][choice]).astype(np.uint8)
  common = {key: example[key] for key in ("image", "image_id", "index")}
  return {**common, "mask": mask, "sentences": example["sentences"].split("\n")[choice]}
