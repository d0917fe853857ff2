"""Procedural rooms with metric depth, rendered on demand; no files.

A room depends only on (seed, split, index), so all processes render the same room. Depth is planar depth along the
optical axis, as in NYU Depth v2, at most 10 m; 0 marks missing values, as of a sensor: window panes and small holes.
The camera has NYU's field of view and a random position and orientation in a room of random size.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import numpy as np

from vpd_jax.data import captions, validation
from vpd_jax.data.datasets import nyu
from vpd_jax.data.readers import referring
from vpd_jax.data.rooms import expressions, render
from vpd_jax.data.rooms import scene as room_scene
from vpd_jax.data.shards import reader
from vpd_jax.data.transforms import depth as depth_transforms
from vpd_jax.data.transforms import segmentation as segmentation_transforms
from vpd_jax.errors import UserError, check_choice
from vpd_jax.types import Dataset, DatasetInfo, Example, Options, Source

CLASSES = room_scene.CLASSES  # of "label"; all pixels are labeled
SPLITS = ("train", "eval")  # the index is part of the random seed: no room is in both
KEYS = {  # of an Example, by task; records lack segmentation_transforms.ADDED
  "depth": frozenset({"image", "depth", "class_id", "index"}),
  "segmentation": frozenset({"image", "label", "index"}) | segmentation_transforms.ADDED,
  "referring": referring.PROVIDES,
}
TASKS = tuple(KEYS)
MAX_DEPTH = 10.0  # meters
DEPTH_SCALE = 1000.0  # units per meter that `cut_depth="released"` wraps, as in NYU's files
GAMMA = 1 / 2.2
MENTIONED = 0.004  # minimum area of an object with a sentence, as a fraction of the image
MOST_OBJECTS = 8  # in a caption
LIMB = 0.2  # meters that a visible keypoint may be behind the surface


@dataclasses.dataclass(eq=False, kw_only=True)
class Rooms(Dataset):
  """Procedural rooms.

  Args:
    task: "depth", "segmentation" into the 19 classes of what is drawn, or "referring": sentences about its objects.
    size: (height, width) of an image.
    crop: (height, width) of a training example; for "referring" the size to which all images are resized.
    train_count: rooms in the training split.
    eval_count: rooms in the evaluation split; for "referring" with all their sentences.
    seed: of the data set.
    cut_depth: for depth, "released", "scaled" or "off", see depth_transforms.vertical_cut_depth.
    ratio_range: for segmentation, (lowest, highest) factor of the random rescaling; () is (1, 1).
    color_jitter: whether to apply color augmentation; "referring" has none.
    captioned: for depth and segmentation, whether Examples also have "sentence", see `caption`.
    cache, cache_folder: for "referring", see referring.ReferringDataset.
    format: "files" renders rooms on demand, "tfds" reads them from prepared shards.
    root: folder of the shards, with format="tfds".

  Attributes:
    provides: keys of an Example: "image" uint8 [H, W, 3] RGB, "index" int32 []; for depth "depth" float32 [H, W]
      meters (0 is missing) and "class_id" int32 [] into `classes`; for segmentation "label" uint8 [H, W] into
      `classes`, "valid_size" int32 [2], see segmentation_transforms.Augmentation; for referring the
      keys of referring.PROVIDES, see ReferringDataset.
    classes: for depth NYU's 27 scene classes in VPD's order; the five of room_scene.SCENES occur, each with its own
      furniture. For segmentation CLASSES, for referring empty.
    made_with: the options that the records depend on; those of shards must be equal.
  """

  task: str = "depth"
  size: tuple[int, int] = (96, 128)
  crop: tuple[int, int] = (96, 96)
  train_count: int = 4096
  eval_count: int = 64
  seed: int = 0
  cut_depth: str = "off"
  ratio_range: tuple[float, float] | tuple[()] = ()
  color_jitter: bool = True
  captioned: bool = False
  cache: str = "off"
  cache_folder: str = ""
  format: str = "files"
  root: str = ""

  provides = KEYS["depth"]
  classes = nyu.CLASSES

  def __post_init__(self):
    task = self.task
    self.classes = self.info({"task": task}).classes
    self.provides = KEYS[task] | ({"sentence"} if self.captioned else frozenset())
    if task != "segmentation" and self.ratio_range:
      raise UserError(f"data.ratio_range={self.ratio_range} has no effect where data.task={task!r}; leave it empty.")
    if task != "depth" and self.cut_depth != "off":
      raise UserError(f"data.cut_depth={self.cut_depth!r} has no effect where data.task={task!r}; set it to 'off'.")
    if task != "referring" and (self.cache, self.cache_folder) != ("off", ""):
      raise UserError(f"data.cache={self.cache!r} has no effect where data.task={task!r}; set it to 'off'.")
    if task == "referring" and self.captioned:
      raise UserError("data.captioned=True has no effect where data.task='referring'; set it to False.")
    self.encoder_cache = referring.check_cache(self.cache, self.cache_folder) if task == "referring" else None
    check_choice("cut_depth", self.cut_depth, depth_transforms.CUT_DEPTH)
    check_root(self.root, self.format)
    self.size, self.crop = validation.check_size("size", self.size), validation.check_size("crop", self.crop)
    if task != "referring" and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
      raise UserError(f"crop={self.crop} does not fit into size={self.size}; make data.crop smaller.")
    self.counts, self.seed = check_counts(self.train_count, self.eval_count, self.seed), int(self.seed)
    self.made_with = {"task": task, "size": self.size, "seed": self.seed, **self.counts}
    if self.captioned:
      self.made_with["captioned"] = True
    ratios = cast(tuple[float, float], tuple(self.ratio_range) or (1.0, 1.0))
    self.augmentation = segmentation_transforms.Augmentation(
      self.crop, self.size, ratios, color_jitter=self.color_jitter
    )
    self.resizing = referring.Transforms(self.crop, self.size)

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """See types.Dataset.

    Raises:
      ValueError: for an unknown task.
    """
    task = options.get("task", "depth")
    check_choice("task", task, TASKS, owner="the rooms")
    classes = {"depth": nyu.CLASSES, "segmentation": CLASSES, "referring": ()}[task]
    return DatasetInfo(classes=classes, only_resizes=task == "referring")

  def describe(self, *, skip_unreadable: bool = False) -> list[str]:
    """Empty, since it would render all rooms of "eval"."""
    return []

  @reader.read_once
  def source(self, split: str) -> "DrawnRooms | expressions.RoomExpressions | reader.Shards":
    """The rooms of "train" or "eval", rendered by `[]` or read from shards; for "referring" the sentences of "eval"."""
    check_choice("split", split, SPLITS)
    if self.format == "tfds":
      return reader.Shards(self.root, "rooms", split, made_with=self.made_with)
    if self.task == "referring":
      drawing = functools.partial(draw, self.seed, split, size=self.size)
      return expressions.RoomExpressions(drawing, sentences, self.counts[split], single=split == "eval")
    return DrawnRooms(self.seed, split, self.counts[split], self.size, self.provides - segmentation_transforms.ADDED)

  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example:
    """The augmentation of the task's release, see depth_transforms.depth_training and segmentation_transforms."""
    if self.task == "segmentation":
      return captions.keep_sentence(lambda rest: self.augmentation.training(rest, rng), example)
    if self.task == "referring":
      return expressions.training(example, rng, self.resizing)
    augment = functools.partial(
      depth_transforms.depth_training,
      rng=rng,
      position=position,
      crop=self.crop,
      cut_depth=self.cut_depth,
      depth_scale=DEPTH_SCALE,
      max_depth=MAX_DEPTH,
      color_jitter=self.color_jitter,
    )
    return captions.keep_sentence(augment, example)

  def eval_transform(self, example: Example) -> Example:
    """The full image; for "referring" resized, with the mask of one sentence."""
    if self.task == "referring":
      return expressions.evaluation(example, self.resizing)
    return captions.keep_sentence(self.augmentation.evaluation, example) if self.task == "segmentation" else example


def check_root(root: str, format: str) -> None:
  """Raises ValueError for an unknown format, or a folder without effect."""
  check_choice("format", format, reader.FORMATS)
  if format == "files" and root:
    raise UserError(f"root={str(root)!r} has no effect: rooms are drawn; leave it empty, or set data.format='tfds'.")


def check_counts(train: int, evaluation: int, seed: int) -> dict[str, int]:
  """Records by split; raises ValueError if these or the seed are not integers in the valid range."""
  for option, number, minimum in (("train_count", train, 1), ("eval_count", evaluation, 1), ("seed", seed, 0)):
    if int(number) != number or number < minimum:
      raise UserError(f"{option}={number} must be a whole number of at least {minimum}.")
  return {"train": int(train), "eval": int(evaluation)}


class DrawnRooms(Source):
  """Random access to the rooms of one split, rendered on demand."""

  def __init__(self, seed: int, split: str, count: int, size: tuple[int, int], keys: frozenset[str]):
    self.seed, self.split, self.count, self.size, self.keys = seed, split, count, size, keys

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < self.count:
      raise IndexError(f"index={index} is outside the {self.count} rooms of {self.split!r}.")
    room = draw(self.seed, self.split, int(index), self.size)
    class_id = np.asarray(nyu.CLASSES.index(room.scene), np.int32)
    example = {"image": room.image, "depth": room.depth, "label": room.labels, "class_id": class_id}
    example["index"] = np.asarray(index, np.int32)
    if "sentence" in self.keys:
      example["sentence"] = caption(room)
    return {key: value for key, value in example.items() if key in self.keys}

  def picture(self, index: int) -> str:
    """A name such as "train/12", since there is no file."""
    return f"{self.split}/{index}"


class Room(NamedTuple):
  """A rendered room.

  Attributes:
    scene: one of room_scene.SCENES.
    image: uint8 [H, W, 3], RGB.
    depth: float32 [H, W], meters along the optical axis, as from a sensor; 0 is missing.
    labels: uint8 [H, W] into CLASSES.
    instances: int32 [H, W], number of the object, 0 for walls, floor and ceiling.
    names: (color, class) of each object, number 1 first, visible or not.
    joints: float32 [17, 3], (x, y) in pixels and planar depth in meters of the COCO keypoints, or None.
    surface: float32 [H, W], depth without gaps, meters.
  """

  scene: str
  image: np.ndarray
  depth: np.ndarray
  labels: np.ndarray
  instances: np.ndarray
  names: list[tuple[str, str]]
  joints: np.ndarray | None
  surface: np.ndarray


def build_scene(seed: int, split: str, index: int) -> tuple[np.random.Generator, str, room_scene.Scene]:
  """The room (seed, split, index): the generator for its further random choices, its kind, and its scene."""
  rng = np.random.default_rng((seed, SPLITS.index(split), index))
  kind = room_scene.SCENES[rng.integers(len(room_scene.SCENES))]
  return rng, kind, room_scene.build(rng, kind)


def draw(seed: int, split: str, index: int, size: tuple[int, int], *, turn: float = 0.0) -> Room:
  """Renders the room (seed, split, index) at `size` = (height, width); `turn` moves the camera around, in radians."""
  rng, kind, scene = build_scene(seed, split, index)
  scene = scene._replace(camera=render.turned(scene.camera, turn))
  rays = render.cast_rays(scene.camera, size)
  surface, seen = render.draw(scene.parts, scene.camera, rays)
  radiance = render.shade(scene.parts, scene.camera, scene.light, rays, surface, seen)
  labels, instances = scene.parts.labels[seen], scene.parts.instances[seen]
  joints = None
  if scene.joints is not None:
    pixels, depth = render.project(scene.joints, scene.camera, size)
    joints = np.concatenate([pixels, depth[:, None]], 1).astype(np.float32)
  measured = np.where(holes(rng, labels), np.float32(0), surface)
  return Room(kind, photograph(rng, radiance), measured, labels, instances, scene.names, joints, surface)


def photograph(rng: np.random.Generator, radiance: np.ndarray) -> np.ndarray:
  """Converts linear radiance [H, W, 3] to uint8, with slight blur, gamma and noise."""
  soft = radiance.copy()
  soft[:, 1:-1] += 0.2 * (radiance[:, 2:] + radiance[:, :-2] - 2 * radiance[:, 1:-1])
  image = np.clip(soft, 0, 1) ** np.float32(GAMMA)
  noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 4))
  return np.clip(image * 255 + noise + np.float32(0.5), 0, 255).astype(np.uint8)


def holes(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
  """Mask bool [H, W] of missing depth: window panes, single pixels and a few small patches."""
  missing = (labels == CLASSES.index("window")) | (rng.random(labels.shape, np.float32) < 0.005)
  height, width = labels.shape
  for _ in range(rng.integers(0, 4)):
    y, x = rng.integers(height), rng.integers(width)
    missing[y : y + 1 + height // 16, x : x + 1 + width // 16] = True
  return missing


def sentences(room: Room) -> list[tuple[str, int]]:
  """Referring expressions (text, instance), each of which describes exactly one visible object.

  "the red box" if no other red box is visible, else "the red box on the left" and "... on the right" for the outermost.
  """
  columns, numbers = np.broadcast_to(np.arange(room.image.shape[1]), room.labels.shape), room.instances.ravel()
  areas = np.bincount(numbers, minlength=len(room.names) + 1)
  middles = np.bincount(numbers, columns.ravel(), minlength=len(room.names) + 1) / np.maximum(areas, 1)
  alike: dict[tuple[str, str], list[int]] = {}
  for number, name in enumerate(room.names, start=1):
    if areas[number]:
      alike.setdefault(name, []).append(number)
  result = []
  for (color, name), members in alike.items():
    text, order = f"the {color} {name}", sorted(members, key=lambda number: middles[number])
    if len(members) == 1:
      result.append((text, members[0]))
    else:
      result += [(f"{text} on the left", order[0]), (f"{text} on the right", order[-1])]
  return [(text, number) for text, number in result if areas[number] >= MENTIONED * room.labels.size]


def caption(room: Room) -> str:
  """A sentence with the scene and the largest visible objects, such as "a bedroom with a red bed and a white lamp".

  It names no positions, so that it stays right when the image is cut or flipped. At most MOST_OBJECTS objects, the
  largest first; those that are alike are named once.
  """
  areas = np.bincount(room.instances.ravel(), minlength=len(room.names) + 1)[1:]
  visible = [number for number in np.argsort(-areas, kind="stable") if areas[number] >= MENTIONED * room.labels.size]
  objects = list(dict.fromkeys(_with_article(" ".join(room.names[number])) for number in visible))[:MOST_OBJECTS]
  scene = _with_article(room.scene)
  if not objects:
    return scene
  *others, last = objects
  return f"{scene} with {', '.join(others)} and {last}" if others else f"{scene} with {last}"


def _with_article(words: str) -> str:
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def keypoints(room: Room) -> np.ndarray:
  """COCO keypoints float32 [17, 3] of the figure: x, y in pixels, and 2 visible, 1 hidden, 0 outside (then all 0)."""
  result = np.zeros((17, 3), np.float32)
  if room.joints is None:
    return result
  height, width = room.labels.shape
  for row, (x, y, depth) in zip(result, room.joints, strict=True):
    if 0 <= x < width and 0 <= y < height and depth > render.NEAR:
      row[:] = x, y, 2 if room.surface[int(y), int(x)] > depth - LIMB else 1
  return result


def person_box(room: Room) -> np.ndarray:
  """Box float32 [4] around the visible part of the figure: x, y, width, height in pixels; zeros if none is visible."""
  rows, columns = np.nonzero(room.labels == CLASSES.index("person"))
  if not len(rows):
    return np.zeros(4, np.float32)
  left, top = columns.min(), rows.min()
  return np.array([left, top, columns.max() + 1 - left, rows.max() + 1 - top], np.float32)
