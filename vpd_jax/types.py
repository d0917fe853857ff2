"""The data types that flow: Example -> Batch -> Features -> Outputs -> Rows, and the state of a run."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np
from etils import epath
from flax import nnx

from vpd_jax.errors import UserError

Array = jax.Array
Device = Any  # jax.Device, which is a variable to type checkers and no type
PyTree = Any  # nested containers of arrays, or of what stands for them: shapes, shardings
Fields = dict[str, Any]  # options by name, or an object of a JSON file
Options = Mapping[str, Any]  # the same, to be read only
Example = dict[str, Any]  # one image: "image" uint8 [H, W, 3], "depth" float32 [H, W] meters, ..., also texts
Batch = dict[str, Array]  # stacked, plus "real" bool [B]: False for rows that only fill the last batch
Outputs = dict[str, Array]  # what a head returns: "depth" | "logits", "aux_logits" | "heatmaps"
Rows = dict[str, np.ndarray]  # one measurement per example, [N, ...], on the host
# By full name, such as "method/unet/input_blocks/1/0/in_layers/2/kernel": arrays of devices or of the host, or what
# stands for them: shapes, shardings.
ParamDict = dict[str, Any]
Weights = tuple[ParamDict, ParamDict, ParamDict]  # trained, frozen, running statistics

MAP_EXTENTS = ("padded", "resized")


class Features(NamedTuple):
  """What a method hands to its neck, and a neck to its head.

  Attributes:
    maps: float [B, h, w, C] each, finest first; strides and widths are stated by method and neck.
    context: float [B, N, D], the tokens the UNet attended to in its last pass.
    image_size: static (H, W) of the image before any padding or resizing by the method.
  """

  maps: tuple[Array, ...]
  context: Array
  image_size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class MapInfo:
  """What a neck or head must know of the maps that come in.

  Attributes:
    widths, strides: of the maps, finest first.
    tokens: number and width of the tokens of Features.context.
    map_extent: what the maps show: "padded", the image and padding at its right and bottom; "resized", the image alone.

  Raises:
    ValueError: another word than these.
  """

  widths: tuple[int, ...]
  strides: tuple[int, ...]
  tokens: tuple[int, int] = (0, 0)
  map_extent: str = "padded"

  def __post_init__(self):
    if self.map_extent not in MAP_EXTENTS:
      raise UserError(f"map_extent={self.map_extent!r} is unknown; choose one of {MAP_EXTENTS}.")


class Branch(NamedTuple):
  """One pass of the batch through method, neck and head; the loss is the weighted sum over branches."""

  name: str
  weight: float


class Loss(NamedTuple):
  """Loss of one group of images.

  Attributes:
    value: float [], finite also where nothing is valid.
    weight: float [], 1, or 0 for a group that has nothing to learn from; the mean over groups is weighted by it.
    logs: further scalars for the log.
  """

  value: Array
  weight: Array
  logs: dict[str, Array]


class Buffer(nnx.Variable):
  """An array that belongs to the model and its checkpoints but is never trained, whatever the config says.

  Class vectors, and tensors of a release that no computation uses and that an export must write back.
  """


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and writes, and everything a checkpoint holds.

  Attributes:
    step: int32 [], number of finished steps.
    params: trained arrays by name.
    frozen: arrays that get no gradient and no decay: VAE, class vectors, tensors the release never trains.
    stats: running batch statistics.
    opt_state: of the optax chain, moments keyed like `params`.
    ema: running mean of `params`, or None.
  """

  step: Array
  params: ParamDict
  frozen: ParamDict
  stats: ParamDict
  opt_state: PyTree
  ema: ParamDict | None = None


class Method(Protocol):
  """Image and prompt to features; one per paper.

  A method is made by its class from one `MethodSetup` and its own options.

  Attributes:
    needs: keys of a Batch it reads besides "image"; it takes ready "latents" in place of encoding the image.
    prepare_inputs: keys of an Example that `prepare` reads and the network does not.
    prepare_outputs: those among `needs` that `prepare` adds, so that no data set need provide them.
    map_info: of its maps.
    sentence_tokens: (N, D) of the states of each image's sentence, None where it reads no sentence.
    class_predictor: images to the ids of their classes, int [B]; None where it predicts none.
    sentence_census: sentences to a line for the start of a run; None where it reads none.
    attends_to_classes: whether it has attention maps, one for each class; these are given by `class_attention(batch)`.
    samples_latents: whether the latents of an image are drawn, anew for each key, instead of computed.
    notes: lines for the log at the start of a run.
    text_options: options of the config's section that are read where texts are prepared, not by the constructor.
    training_only: top-level parts that evaluation does without; `build` leaves them out there.
    prepare: host transform that runs after the data set's own; picklable, since it travels to the data workers.
  """

  needs: frozenset[str]
  prepare_inputs: frozenset[str]
  prepare_outputs: frozenset[str]
  samples_latents: bool
  map_info: MapInfo
  sentence_tokens: tuple[int, int] | None
  text_options: ClassVar[tuple[str, ...]]

  @property
  def class_predictor(self) -> Callable[[Array], Array] | None: ...
  @property
  def sentence_census(self) -> Callable[[Iterable[str]], str] | None: ...
  @property
  def attends_to_classes(self) -> bool: ...
  @property
  def notes(self) -> tuple[str, ...]: ...
  @property
  def training_only(self) -> tuple[str, ...]: ...
  @property
  def prepare(self) -> Callable[[Example], Example]: ...

  def branches(self, training: bool) -> tuple[Branch, ...]: ...
  def latents(self, batch: Batch, key: Array | None = None) -> Array: ...  # of the images, [B, h, w, 4], unscaled
  def text_states(self, batch: Batch) -> Array: ...  # of sentences, float [B, N, D]; see `sentence_tokens`
  # len(branches) * B rows, branch by branch; the key is for what is drawn.
  def __call__(self, batch: Batch, *, training: bool, key: Array | None = None) -> Features: ...


class Keypoints(NamedTuple):
  """The K keypoints of a data set.

  Attributes:
    names: by number.
    pairs: numbers that a mirror image swaps.
    skeleton: numbers between which a bone is drawn.
    sigmas: deviation of an annotator for a person of area 1, in COCO's object keypoint similarity.
    upper: numbers of the upper body, for the half-body augmentation; empty: there is none.
  """

  names: tuple[str, ...]
  pairs: tuple[tuple[int, int], ...]
  skeleton: tuple[tuple[int, int], ...]
  sigmas: tuple[float, ...]
  upper: tuple[int, ...]


class Published(NamedTuple):
  """What a complete copy of a data set holds.

  Attributes:
    counts: records by split.
    size: (height, width) of every picture, or None where sizes vary.
    ranges: smallest and largest possible value by key of an Example; where 0 marks a missing value it does not count.
  """

  counts: dict[str, int]
  size: tuple[int, int] | None
  ranges: dict[str, tuple[float, float]]


class Cache(NamedTuple):
  """What is kept of the frozen networks' work on pictures and sentences, see evaluation/encoder_cache.py."""

  kind: str  # "off", "memory" or "disk"
  folder: str  # for "disk"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a data set by its options alone, before any of its files is there.

  Attributes:
    classes: their names, by class id; for keypoints the names of these.
    palette: their colors, RGB; empty: the data set has none.
    label_ids: their numbers as a test server takes them; empty: there is none.
    keypoints: of a data set for pose, else None.
    udp: how crops lie on their pictures, see tasks/pose/heatmaps.py.
    only_resizes: whether a picture is always seen alike, so that it can be encoded ahead, see encoder_cache.planned.
    window: (height, width) of the part of a picture, at its lower end, that is trained on; None: all of it.
  """

  classes: tuple[str, ...] = ()
  palette: tuple[tuple[int, int, int], ...] = ()
  label_ids: tuple[int, ...] = ()
  keypoints: Keypoints | None = None
  udp: bool = True
  only_resizes: bool = False
  window: tuple[int, int] | None = None

  def cut_top(self, size: tuple[int, int]) -> int:
    """Rows to take off a picture of (height, width) so that the network sees it at the scale it was trained on.

    A picture at most a tenth larger than `window` loses the rows above it, and would otherwise be shrunk: a frame of
    KITTI by 6 %. Every column stays. 0 for any other picture.
    """
    height, width = self.window or (0, 0)
    return size[0] - height if height <= size[0] <= 1.1 * height and width <= size[1] <= 1.1 * width else 0


class Source(Protocol):
  """The records of one split, picklable for worker processes; one that cannot be read is a UserError with its file.

  Attributes:
    notes: lines for the start of a run, such as what was left out.
  """

  notes: Sequence[str] = ()

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Example: ...

  def record(self, index: int) -> Fields:
    """What shards store of a record, see Dataset.stored; by default the whole Example."""
    return self[index]

  def picture(self, index: int) -> str:
    """The name of a record's picture, with its folders as the data set has them, by which captions are found."""
    raise UserError(
      "the pictures of this data set have no names, by which captions are found; choose another data set, or leave "
      "data.captions out."
    )

  def label(self, index: int) -> np.ndarray:
    """The label map alone, uint8 [H, W]; a source of files need not read the picture for it."""
    return self[index]["label"]

  def sentences(self) -> list[str]:
    """All sentences, where they are known without drawing or reading all; else none."""
    return []

  def summary(self) -> str:
    """How much there is, for the start of a run; empty where nothing is said."""
    return ""


class Dataset(Protocol):
  """Pictures with their ground truth: the base of every class in data/datasets/.

  Attributes:
    provides: keys of an Example after the transforms, of which a batch may be made.
    classes: their names, by class id, see DatasetInfo.
    stored: what a record of `source` holds, by key, see shards/writer.py KINDS; None: whole Examples.
    made_with: the options on which the records depend; shards must have been made with the same.
    published: what a complete copy holds, as far as it is known.
    encoder_cache: what is kept of the work of frozen networks; None where pictures are not encoded ahead.
  """

  provides: frozenset[str]
  classes: tuple[str, ...] = ()
  stored: ClassVar[Mapping[str, str] | None] = None
  made_with: Options = MappingProxyType({})
  published: Published = Published({}, None, {})
  encoder_cache: Cache | None = None

  def __init__(self, **options: Any): ...

  @classmethod
  def info(cls, options: Options) -> DatasetInfo:
    """What follows from the options of a config's section `data`, those left out having their defaults."""
    ...

  def source(self, split: str) -> Source: ...  # "train" or "eval"
  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example: ...
  def eval_transform(self, example: Example) -> Example: ...

  def describe(self) -> list[str]:
    """A line per split for the start of a run: how much there is, and its notes; shards have none."""
    sources = {split: self.source(split) for split in ("train", "eval")}
    parts = {split: [*filter(None, (source.summary(), *source.notes))] for split, source in sources.items()}
    return [f"{split}: {'; '.join(lines)}" for split, lines in parts.items() if lines]

  def truth(self, split: str) -> Fields:
    """What is scored against beside the batches, for tasks that need it; a data set for another task has none."""
    raise NotImplementedError(f"{type(self).__name__} has no ground truth of the {split!r} split as a whole.")


class Task(Protocol):
  """What is learned and how it is scored. All methods are pure; nothing here knows the network."""

  needs: frozenset[str]  # keys of a Batch
  eval_needs: frozenset[str]  # further ones that only `measure` reads
  output: Fields  # what every head of this task must be told: maximum depth, number of classes
  result: str  # name of a prediction, for Python users
  best: tuple[str, str]  # the score that chooses the best checkpoint, and "min" or "max"
  test_time_protocol: str  # how pictures are cut and put together at test time, one of prediction/protocols.py
  class_names: tuple[str, ...] = ()  # of `per_class`
  measures_depth: bool = False  # whether it is a DepthTask
  described: Mapping[str, str] = MappingProxyType({})  # the head's outputs by name, and what makes the "result" of them
  needs_truth: bool  # `summarize` and `baselines` also take `truth`, what the data set's method of that name gives

  def __init__(self, **options: Any): ...

  @classmethod
  def facts(cls, info: DatasetInfo, name: str) -> Fields:
    """Arguments of the constructor that the data set of that name gives; UserError where it lacks what is needed."""
    del info, name
    return {}

  def loss(self, outputs: Outputs, batch: Batch) -> Loss: ...  # one group of images
  def predict(self, outputs: Outputs) -> Array: ...  # depth | label scores | heatmaps
  def measure(self, prediction: Array, batch: Batch) -> dict[str, Array]: ...  # [B, ...] each
  # On the host, numpy; where `needs_truth`, of the rows and the truth.
  def summarize(self, rows: Rows, *args: Any, **kwargs: Any) -> dict[str, float]: ...
  def baselines(
    self, train: Iterable[Example], evaluation: Iterable[Example], *args: Any, **kwargs: Any
  ) -> dict[str, float]: ...  # of `best`
  def panel(self, example: Example, prediction: np.ndarray) -> np.ndarray: ...  # uint8 [H', W', 3]
  def save(self, stem: Path, prediction: np.ndarray, facts: Fields, image: np.ndarray | None = None) -> list[Path]: ...

  def panels(self, examples: Sequence[Example], predictions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`panel` of each example; a task whose colors stand for numbers gives all of them one scale."""
    return [self.panel(example, prediction) for example, prediction in zip(examples, predictions, strict=True)]

  def mirrored(self, prediction: Array) -> Array:
    """The prediction of a mirrored image as that of the image; by default of maps [B, H, W, ...]."""
    return prediction[:, :, ::-1]

  def per_class(self, rows: Rows) -> dict[str, np.ndarray]:
    """Scores float64 [K] by name, NaN for a class that does not occur; empty for a task without classes."""
    del rows
    return {}

  def write_results(self, path: epath.Path, rows: Rows, *args: Any, **kwargs: Any) -> epath.Path | None:
    """Writes the file that a benchmark's server takes, where there is one."""
    return None


class WindowedTask(Task, Protocol):
  """One whose pictures are cut into windows, of which a part alone may be scored."""

  def region(self, size: tuple[int, int]) -> tuple[int, int, int, int]: ...  # top, bottom, left, right; half open


class DecidingTask(Task, Protocol):
  """One that decides for every pixel, where scores may be resized before."""

  def decide(self, scores: Array) -> Array: ...  # [..., H, W, K] to [..., H, W]


class ClassAttentionTask(Task, Protocol):
  """One that draws where the network attends to each class."""

  def save_attention(self, stem: Path, attention: np.ndarray, prediction: np.ndarray, image: np.ndarray) -> Path: ...


class DepthTask(Task, Protocol):
  """One whose prediction is the depth of every pixel; a focal length is in pixels, with where it is from."""

  def colored(self, depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray: ...  # uint8 [H, W, 3]
  def save_point_cloud(self, stem: Path, depth: np.ndarray, image: np.ndarray, focal: tuple[float, str]) -> Path: ...


class TopDownTask(Task, Protocol):
  """One that finds keypoints in the crop of a person, and these on the picture."""

  keypoints: Keypoints
  udp: bool

  def locate(self, prediction: Array, center: Array, extent: Array) -> Array: ...
  def rescored(self, box_scores: np.ndarray, joint_scores: np.ndarray) -> np.ndarray: ...
