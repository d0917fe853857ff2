"""Sentences about the objects of procedural rooms: as objects in training, one by one in evaluation."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from vpd_jax.data.readers import referring
from vpd_jax.types import Example, Source

Draw = Callable[[int], Any]  # index to a rooms.Room
Say = Callable[[Any], list[tuple[str, int]]]  # a room to (sentence, number of the object)


class RoomExpressions(Source):
  """Random access to rooms with all their sentences, or to single sentences; holds nothing but what defines them."""

  def __init__(self, draw: Draw, say: Say, count: int, *, single: bool):
    """
    Args:
      draw, say: see Draw and Say; plain functions or partials.
      count: of rooms.
      single: an item is one sentence, all rooms' in turn, and not one room. All rooms are drawn to count them.
    """
    self.draw, self.say, self.count = draw, say, count
    self.items = _all_sentences(draw, say, count) if single else None

  def __len__(self) -> int:
    return self.count if self.items is None else len(self.items)

  def __getitem__(self, index: int) -> Example:
    """The Example of an item.

    Returns:
      "image" uint8 [H, W, 3]; "instances" int32 [H, W], number of the object at each pixel; "sentences" str, one a
      line; "numbers" int32 [S], the objects they are about; "image_id" and "index" int32 [].
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index={index} is outside the {len(self)} records.")
    if self.items is not None:
      place, text, number = self.items[index]
      room, said = self.draw(place), [(text, number)]
    else:
      place = index
      room = self.draw(place)
      while not (said := self.say(room)):  # nothing to speak of: a room that no other index has
        place += self.count
        room = self.draw(place)
    return {
      **{"image": room.image, "instances": room.instances, "sentences": "\n".join(text for text, _ in said)},
      "numbers": np.array([number for _, number in said], np.int32),
      **{"image_id": np.asarray(place, np.int32), "index": np.asarray(index, np.int32)},
    }

  def sentences(self) -> list[str]:
    """All sentences of the evaluation; of the training none, for they are drawn only when asked for."""
    return [text for _, text, _ in self.items or ()]


@functools.lru_cache(maxsize=4)
def _all_sentences(draw: Draw, say: Say, count: int) -> tuple[tuple[int, str, int], ...]:
  return tuple((place, text, number) for place in range(count) for text, number in say(draw(place)))


def training(example: Example, rng: np.random.Generator, transforms: referring.Transforms) -> Example:
  """One of the sentences with the mask of its object, see referring.Transforms.training."""
  return transforms.training(_of_one(example, int(rng.integers(len(example["numbers"])))), rng)


def evaluation(example: Example, transforms: referring.Transforms) -> Example:
  """The sentence, or one of the room's by the example's index, see referring.Transforms.evaluation."""
  rng = np.random.default_rng(int(example["index"]))
  return transforms.evaluation(_of_one(example, int(rng.integers(len(example["numbers"])))))


def _of_one(example: Example, choice: int) -> Example:
  mask = (example["instances"] == example["numbers"][choice]).astype(np.uint8)
  kept = {key: example[key] for key in ("image", "image_id", "index")}
  return {**kept, "mask": mask, "sentences": example["sentences"].split("\n")[choice]}
