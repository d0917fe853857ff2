"""The functions behind the page: networks by task, and the files of a prediction."""

import functools
import json
import math
import re
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.data.datasets import rooms
from vpd_jax.errors import UserError
from vpd_jax.files import image_decoding
from vpd_jax.inference import images as images_lib
from vpd_jax.inference import top_down
from vpd_jax.prediction import predict_folder
from vpd_jax.prediction.predictor import Predictor, trained_weights
from vpd_jax.tasks.depth import point_cloud, visualize
from vpd_jax.types import DepthTask, Fields

TASKS = ("depth", "segmentation", "referring", "pose")
ROOMS = {task: f"configs/rooms.py:{task},tiny" for task in TASKS}
UNTRAINED = (
  "These weights are random, so the results mean nothing. `python -m vpd_jax.main --config={string}` trains this "
  "network in some minutes, and the page finds it when it is started again in the same folder."
)
SHOWN = (
  ".color.png",
  ".overlay.png",
  ".skeleton.png",
)  # suffixes of the image to show, among the files of a prediction
MAX_PIXELS = 50_000_000  # of an image
MAX_POINTS = 200_000  # of the point cloud in the browser
PREVIEW = 1024  # pixels, longer side
DRAWN_SEED = 2_000_000_000  # for rooms that are in no training set
NUMBER = r"-?\d+(?:\.\d+)?"


class Network:
  """The network of a task, loaded on first use.

  Attributes:
    task: its name.
    notice: a remark on the weights, may be empty.
    draws: whether the data are the rooms, so that an input can be drawn.
  """

  def __init__(self, config: ConfigDict, workdir: str = "", string: str = ""):
    """Uses the weights of a run, or else those of `config.init`; for the rooms, random ones if there are none.

    Args:
      config: of the network.
      workdir: of the run.
      string: the value of --config, for the notice on random weights.

    Raises:
      ValueError: if there are no weights, and the data are not the rooms.
    """
    self.task, self._config, self._lock = config.task.name, config, threading.Lock()
    self.draws = config.data.name in ("rooms", "room_figures")
    random = self.draws and not initialize.source_of(config, workdir)
    self._weights = "" if random else trained_weights(config, workdir)
    self.notice = UNTRAINED.format(string=string) if random else ""

  @property
  def predictor(self) -> Predictor:
    with self._lock:
      return self._loaded

  @functools.cached_property
  def _loaded(self) -> Predictor:
    return Predictor.load(self._config, weights=self._weights, random_init=bool(self.notice))


def networks(config: ConfigDict | None, workdir: str = "", string: str = "") -> dict[str, Network]:
  """The networks of the page by task: that of a config, or else the tiny ones of the rooms for all tasks.

  Without a config, the weights are those of the default workdirs of `--mode=train`.
  """
  if config is not None:
    network = Network(config, workdir, string)
    return {network.task: network}
  return {task: Network(loader.load(words), loader.workdir(words), words) for task, words in ROOMS.items()}


class Inputs(NamedTuple):
  """The inputs of a prediction besides the image.

  Attributes:
    sentence, class_name: as in predict_folder.run; empty for none.
    boxes: text, see `read_boxes`.
    attention, ply, focal: as in predict_folder.run; focal=0 for none.
  """

  sentence: str = ""
  class_name: str = ""
  boxes: str = ""
  attention: bool = False
  ply: bool = False
  focal: float = 0.0


class Result(NamedTuple):
  """A prediction.

  Attributes:
    shown: the image to show.
    files: all files that predict writes.
    facts: content of the .json file.
    depth: the .npy file of the depth, if any.
    cloud: a smaller point cloud for the browser, if requested.
  """

  shown: Path
  files: list[Path]
  facts: Fields
  depth: Path | None
  cloud: Path | None


def read_picture(path: str | None) -> np.ndarray:
  """Reads an uploaded image, uint8 [H, W, 3].

  Raises:
    ValueError: if there is none, or the file is not an image, damaged or too large.
  """
  if not path:
    raise UserError("there is no picture yet; drop one on the page.")
  name = Path(path).name
  if not images_lib.is_image(Path(path)):
    raise UserError(f"{name} is not a picture in a supported format; give a JPEG, PNG, WebP, TIFF or the like.")
  with image_decoding.faults(name, remedy=""), Image.open(path) as header:
    width, height = header.size
  if width * height > MAX_PIXELS:
    raise UserError(f"{name} has {width} x {height} pixels; the page takes up to {MAX_PIXELS / 1e6:g} million.")
  return images_lib.read_image(Path(path))


def preview(image: np.ndarray) -> np.ndarray:
  """The image, resized so that its longer side is at most PREVIEW."""
  scale = min(1.0, PREVIEW / max(image.shape[:2]))
  height, width = (max(1, round(side * scale)) for side in image.shape[:2])
  return images_lib.resize(image, (height, width))


def read_boxes(text: str) -> list[list[float]]:
  """Parses boxes of people, one per line: x, y, width and height in pixels.

  Raises:
    ValueError: for a line in another format.
  """
  boxes = []
  for line in filter(str.strip, text.splitlines()):
    numbers = re.fullmatch(rf"\s*{NUMBER}(?:[\s,;]+{NUMBER}){{3}}\s*", line) and re.findall(NUMBER, line)
    if not numbers:
      raise UserError(f"the box {line.strip()!r} is not x, y, width and height in pixels, like 20, 10, 80, 200.")
    boxes.append([float(number) for number in numbers])
  return boxes


def predict(predictor: Predictor, path: str | None, folder: Path, inputs: Inputs) -> Result:
  """Writes the files of a prediction to a new folder inside `folder`.

  Inputs that the network does not take are ignored: the page hides them, with what was entered for another task.

  Raises:
    ValueError: as `read_picture`, and for a missing sentence, an unknown class or invalid boxes.
  """
  image = read_picture(path)
  extras: Fields = {}
  if predictor.takes_sentence:
    if not (sentence := " ".join(inputs.sentence.split())):
      raise UserError("the network needs a sentence about the picture, like: the red box.")
    extras["sentences"] = sentence
  if predictor.takes_boxes and (boxes := read_boxes(inputs.boxes)):
    top_down.check_boxes(boxes, image.shape[:2], "the page")
    extras["boxes"] = boxes
  ply = inputs.ply and predictor.experiment.task.measures_depth
  focal = inputs.focal if ply else 0.0
  if focal and not (math.isfinite(focal) and focal > 0):
    raise UserError(f"the focal length is {focal}; {predict_folder.FOCAL}")
  folder.mkdir(parents=True, exist_ok=True)
  target, source = Path(tempfile.mkdtemp(dir=folder)), Path(cast(str, path))
  request = predict_folder.Request(source, source.stem, extras)
  options = {"class_name": inputs.class_name, "attention": inputs.attention and predictor.draws_attention}
  options |= {"ply": ply, "focal": focal or None}
  ((files, _),) = predict_folder.write_results(predictor, [(request, image)], target, **options)
  facts = json.loads(files[-1].read_text())
  find = lambda *ends: next((file for file in files if file.name.endswith(ends)), None)
  depth, cloud = find(".npy"), None
  if depth and ply:
    cloud = _small_cloud(target / "cloud" / "turned.ply", np.load(depth), image, facts["focal_length_pixels"])
  return Result(find(*SHOWN) or files[0], files, facts, depth, cloud)


def _small_cloud(path: Path, depth: np.ndarray, image: np.ndarray, focal: float) -> Path:
  """A point cloud of every n-th pixel in the convention of viewers: y up, camera looking along -z."""
  step = math.ceil(math.sqrt(depth.size / MAX_POINTS))
  return point_cloud.write_ply(path, depth[::step, ::step], image[::step, ::step], focal / step, y_up=True)


def depth_at(depth: Path, column: int, row: int) -> str:
  """Describes the depth at a pixel of the colored image, which has a color bar on its right."""
  meters = np.load(depth, mmap_mode="r")
  meters = float(meters[row, column]) if row < meters.shape[0] and column < meters.shape[1] else math.nan
  return f"**{meters:.2f} m** at column {column}, row {row}" if math.isfinite(meters) else "no depth here"


def recolored(predictor: Predictor, depth: Path, nearest: float, farthest: float) -> np.ndarray:
  """The colored depth and its color bar for another range, uint8 [H, W', 3].

  Raises:
    ValueError: for an invalid range.
  """
  if not nearest < farthest:
    raise UserError(f"colors from {nearest:g} m to {farthest:g} m are no range; move the first below the second.")
  picture = cast(DepthTask, predictor.experiment.task).colored(np.load(depth), nearest, farthest)
  return visualize.with_bar(picture, nearest, farthest)


def drawn_room(predictor: Predictor, folder: Path, index: int) -> tuple[Path, str, str]:
  """Draws a room as PNG, with a matching sentence and boxes: (path, sentence, boxes).

  The sentence is an expression for the task referring, else the caption.

  It is larger than the training images if the network resizes its input.

  Args:
    predictor: of the rooms.
    folder: for the file.
    index: of the room; for pose, the first index from here on with a visible person.
  """
  people, task, size = predictor.takes_boxes, predictor.experiment.task, tuple(predictor.config.data.size)
  if task.test_time_protocol != "sliding":
    height, width = size
    size = max(height, 480), max(height, 480) * width // height
  room, box = None, np.zeros(4)
  while room is None or (people and not box[2:].all()):
    room = rooms.draw(DRAWN_SEED, "eval", index, size)
    box, index = rooms.person_box(room), index + 1
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"room_{index}.png"
  Image.fromarray(room.image).save(path)
  expressions = [text for text, _ in rooms.sentences(room)] or ["the floor"]
  sentence = expressions[0] if predictor.config.task.name == "referring" else rooms.caption(room)
  return path, sentence, ", ".join(f"{side:g}" for side in box) if box[2:].all() else ""
