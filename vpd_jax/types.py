"""Data types of the pipeline, Example -> Batch -> Features -> Outputs -> Rows, and the training state."""

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

from vpd_jax.errors import UserError, check_choice

Array = jax.Array
Device = Any  # jax.Device, which type checkers do not accept as a type
PyTree = Any  # nested containers of arrays, or of their shapes or shardings
Fields = dict[str, Any]  # options by name, or an object of a JSON file
Options = Mapping[str, Any]  # the same, read-only
Example = dict[str, Any]  # one image: "image" uint8 [H, W, 3], "depth" float32 [H, W] meters, ..., also strings
Batch = dict[str, Array]  # stacked, plus "real" bool [B]: False for rows that pad the last batch
Outputs = dict[str, Array]  # what a head returns: "depth" | "logits", "aux_logits" | "heatmaps"
Rows = dict[str, np.ndarray]  # one measurement per example, [N, ...], on the host
# Arrays, shapes, or shardings by full name, such as "method/unet/input_blocks/1/0/in_layers/2/kernel".
ParamDict = dict[str, Any]
Weights = tuple[ParamDict, ParamDict, ParamDict]  # trained, frozen, running statistics

MAP_EXTENTS = ("padded", "resized")


class Features(NamedTuple):
  """Features from a method to its neck, and from a neck to its head.

  Attributes:
    maps: float [B, h, w, C] each, finest first; MapInfo describes their strides and widths.
    context: float [B, N, D], the tokens that the UNet attended to in its last pass.
    image_size: static (H, W) of the image before any padding or resizing by the method.
  """

  maps: tuple[Array, ...]
  context: Array
  image_size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class MapInfo:
  """Describes the feature maps that a neck or head receives.

  Attributes:
    widths, strides: of the maps, finest first.
    tokens: number and width of the tokens of Features.context.
    map_extent: what the maps cover: "padded", the image and padding at its right and bottom; "resized", the image only.

  Raises:
    ValueError: unknown `map_extent`.
  """

  widths: tuple[int, ...]
  strides: tuple[int, ...]
  tokens: tuple[int, int] = (0, 0)
  map_extent: str = "padded"

  def __post_init__(self):
    check_choice("map_extent", self.map_extent, MAP_EXTENTS)


class Branch(NamedTuple):
  """One pass of the batch through method, neck and head; the loss is the weighted sum over branches."""

  name: str
  weight: float


class Loss(NamedTuple):
  """Loss of one group of images.

  Attributes:
    value: float [], finite even if nothing is valid.
    weight: float [], 1, or 0 for a group without valid targets; the mean over groups is weighted by it.
    logs: additional scalars to log.
  """

  value: Array
  weight: Array
  logs: dict[str, Array]


class Buffer(nnx.Variable):
  """An array of the model and its checkpoints that is never trained, regardless of the config.

  Used for class vectors, and for unused tensors of a release that an export must write back.
  """


@flax.struct.dataclass
class TrainState:
  """The training state: everything that a step reads and writes, and that a checkpoint stores.

  Attributes:
    step: int32 [], number of finished steps.
    params: trained arrays by name.
    frozen: arrays without gradients and weight decay: VAE, class vectors, tensors that the release never trains.
    stats: running batch statistics.
    opt_state: of the optax chain, moments keyed like `params`.
    ema: exponential moving average of `params`, or None.
  """

  step: Array
  params: ParamDict
  frozen: ParamDict
  stats: ParamDict
  opt_state: PyTree
  ema: ParamDict | None = None


class Method(Protocol):
  """Maps image and prompt to features; one per paper.

  A method class is constructed from a `MethodSetup` and the method's own options.

  Attributes:
    needs: keys of a Batch that it reads besides "image"; it also accepts precomputed "latents" instead of the image.
    prepare_inputs: keys of an Example that `prepare` reads and the network does not.
    prepare_outputs: those among `needs` that `prepare` adds, which data sets do not have to provide.
    map_info: of its maps.
    sentence_tokens: (N, D) of the encoded sentence of each image, None if it reads no sentence.
    class_predictor: images to the ids of their classes, int [B]; None if it predicts none.
    sentence_summary: sentences to a line for the start-up report; None if it reads none.
    attends_to_classes: whether it has an attention map for each class, see `class_attention(batch)`.
    samples_latents: whether the latents of an image are sampled with a new key each time.
    notes: lines for the start-up report.
    text_options: options of the config's section that are read where texts are prepared, not by the constructor.
    training_only: top-level parts that are not needed, and not built, for evaluation.
    prepare: host transform that runs after that of the data set; picklable, since it is sent to the data workers.
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
  def sentence_summary(self) -> Callable[[Iterable[str]], str] | None: ...
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
  # len(branches) * B rows, branch by branch; the key is used for sampling.
  def __call__(self, batch: Batch, *, training: bool, key: Array | None = None) -> Features: ...


class Keypoints(NamedTuple):
  """The K keypoints of a data set.

  Attributes:
    names: by index.
    pairs: indices that a horizontal flip swaps.
    skeleton: pairs of indices that are connected by a bone.
    sigmas: standard deviation of annotators for a person of area 1, in COCO's object keypoint similarity.
    upper: indices of the upper body, for the half-body augmentation; empty disables it.
  """

  names: tuple[str, ...]
  pairs: tuple[tuple[int, int], ...]
  skeleton: tuple[tuple[int, int], ...]
  sigmas: tuple[float, ...]
  upper: tuple[int, ...]


class Published(NamedTuple):
  """Properties of a complete copy of a data set.

  Attributes:
    counts: records by split.
    size: (height, width) of every image, or None if sizes vary.
    ranges: smallest and largest possible value by key of an Example, ignoring 0 where it marks missing values.
  """

  counts: dict[str, int]
  size: tuple[int, int] | None
  ranges: dict[str, tuple[float, float]]


class Cache(NamedTuple):
  """Options of the cache of frozen encoders, see evaluation/encoder_cache.py."""

  kind: str  # "off", "memory" or "disk"
  folder: str  # for "disk"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """Properties of a data set that follow from its options alone, without reading any file.

  Attributes:
    classes: names by class id; for pose data sets, names of the keypoints.
    palette: colors of the classes, RGB; empty if the data set defines none.
    label_ids: ids of the classes on the benchmark's server; empty if there is none.
    keypoints: of a pose data set, else None.
    udp: coordinate convention of the crops, see tasks/pose/heatmaps.py.
    only_resizes: whether images are only resized, so that their latents can be cached, see encoder_cache.EncoderCache.
    window: (height, width) of the part of an image, at its lower end, that is used for training; None: all of it.
  """

  classes: tuple[str, ...] = ()
  palette: tuple[tuple[int, int, int], ...] = ()
  label_ids: tuple[int, ...] = ()
  keypoints: Keypoints | None = None
  udp: bool = True
  only_resizes: bool = False
  window: tuple[int, int] | None = None

  def cut_top(self, size: tuple[int, int]) -> int:
    """Rows to crop from the top of an image of (height, width) so that its scale matches that of training.

    An image at most a tenth larger than `window` loses the rows above it; otherwise it would be shrunk, e.g. a frame of
    KITTI by 6 %. All columns are kept. 0 for any other image.
    """
    height, width = self.window or (0, 0)
    return size[0] - height if height <= size[0] <= 1.1 * height and width <= size[1] <= 1.1 * width else 0


class Source(Protocol):
  """The records of one split, picklable for worker processes; unreadable records raise a UserError with the file name.

  Attributes:
    notes: lines for the start-up report, e.g. about excluded records.
  """

  notes: Sequence[str] = ()

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Example: ...

  def record(self, index: int) -> Fields:
    """The fields of a record that shards store, see Dataset.stored; by default the complete Example."""
    return self[index]

  def picture(self, index: int) -> str:
    """The file name of a record's image, relative to the data set, used to look up captions."""
    raise UserError("images of this data set have no file names; choose another one, or leave data.captions out.")

  def label(self, index: int) -> np.ndarray:
    """The label map only, uint8 [H, W]; sources of files can avoid reading the image."""
    return self[index]["label"]

  def sentences(self) -> list[str]:
    """All sentences if they are known without generating or reading all records; else an empty list."""
    return []

  def summary(self) -> str:
    """The size of the split, for the start-up report."""
    return f"{len(self)} images"


class Dataset(Protocol):
  """Images with their ground truth: the base class of data/datasets/.

  Attributes:
    provides: keys of an Example after the transforms that a batch may contain.
    classes: names by class id, see DatasetInfo.
    stored: fields of a record of `source`, by key, see shards/writer.py:FEATURES; None: complete Examples.
    made_with: the options on which the records depend, and so those of shards; None: default of an option.
    published: properties of a complete copy, as far as known.
    encoder_cache: cache of the frozen encoders; None if images are not encoded in advance.
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
    """The properties implied by the options of a config's section `data`; missing options have their defaults."""
    ...

  def source(self, split: str) -> Source: ...  # "train" or "eval"
  def train_transform(self, example: Example, rng: np.random.Generator, position: int) -> Example: ...
  def eval_transform(self, example: Example) -> Example: ...

  def notes(self, split: str) -> list[str]:
    """Lines for the start-up report: the notes of the source, and a warning about another size than published."""
    source, expected = self.source(split), self.published.counts.get(split)
    warning = f"WARNING: the published split has {expected}; scores are not comparable"
    return [*source.notes, *([] if expected in (None, len(source)) else [warning])]

  def describe(self, *, skip_unreadable: bool = False) -> list[str]:
    """A line per split for the start-up report: its size and notes; unreadable records are an error or skipped."""
    return [f"{s}: {'; '.join([self.source(s).summary(), *self.notes(s)])}" for s in ("train", "eval")]

  def truth(self, split: str) -> Fields:
    """Ground truth of the split as a whole, for tasks that need more than the batches; other data sets raise."""
    raise NotImplementedError(f"{type(self).__name__} has no ground truth of the {split!r} split as a whole.")


class Task(Protocol):
  """The loss, predictions and metrics of a task. All methods are pure and independent of the network."""

  needs: frozenset[str]  # keys of a Batch
  eval_needs: frozenset[str]  # additional ones that only `measure` reads
  output: Fields  # arguments of every head of this task: maximum depth, number of classes
  result: str  # key of a prediction in the Python API
  best_metric: str  # which selects the best checkpoint
  best_mode: str  # "min" or "max"
  test_time_protocol: str  # how images are split and merged at test time, one of prediction/protocols.py
  class_names: tuple[str, ...] = ()  # of `per_class`
  measures_depth: bool = False  # whether it is a DepthTask
  draws_attention: bool = False  # whether it is a ClassAttentionTask
  output_descriptions: Mapping[str, str] = MappingProxyType({})  # of the head's outputs by name, and of "result"
  needs_truth: bool  # `summarize` and `baselines` also take `truth`, see Dataset.truth

  def __init__(self, **options: Any): ...

  @classmethod
  def dataset_options(cls, info: DatasetInfo, name: str) -> Fields:
    """Constructor arguments determined by the data set of that name; UserError if it lacks required properties."""
    del info, name
    return {}

  def loss(self, outputs: Outputs, batch: Batch) -> Loss: ...  # one group of images
  def predict(self, outputs: Outputs) -> Array: ...  # depth | label scores | heatmaps
  def measure(self, prediction: Array, batch: Batch) -> dict[str, Array]: ...  # [B, ...] each
  def summarize(self, rows: Rows, *args: Any, **kwargs: Any) -> dict[str, float]: ...  # on the host
  def baselines(
    self, train: Iterable[Example], evaluation: Iterable[Example], *args: Any, **kwargs: Any
  ) -> dict[str, float]: ...  # of `best_metric`
  def panel(self, example: Example, prediction: np.ndarray) -> np.ndarray: ...  # uint8 [H', W', 3]
  def save(self, stem: Path, prediction: np.ndarray, extra: Fields, image: np.ndarray | None = None) -> list[Path]: ...

  def panels(self, examples: Sequence[Example], predictions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`panel` of each example; tasks that map values to colors use one scale for all of them."""
    return [self.panel(example, prediction) for example, prediction in zip(examples, predictions, strict=True)]

  def mirrored(self, prediction: Array) -> Array:
    """Converts the prediction of a flipped image to that of the image; by default flips maps [B, H, W, ...]."""
    return prediction[:, :, ::-1]

  def per_class(self, rows: Rows) -> dict[str, np.ndarray]:
    """Scores float64 [K] by name, NaN for classes that do not occur; empty for a task without classes."""
    del rows
    return {}

  def write_results(self, path: epath.Path, rows: Rows, *args: Any, **kwargs: Any) -> epath.Path | None:
    """Writes the submission file of the benchmark, if it has one."""
    return None


class WindowedTask(Task, Protocol):
  """A task whose images are split into windows, and of which only a region may be scored."""

  def region(self, size: tuple[int, int]) -> tuple[int, int, int, int]: ...  # top, bottom, left, right; half open


class DecidingTask(Task, Protocol):
  """A task that classifies every pixel, after resizing the scores if necessary."""

  def decide(self, scores: Array) -> Array: ...  # [..., H, W, K] to [..., H, W]


class ClassAttentionTask(Task, Protocol):
  """A task that draws the attention map of each class."""

  def save_attention(self, stem: Path, attention: np.ndarray, prediction: np.ndarray, image: np.ndarray) -> Path: ...


class DepthTask(Task, Protocol):
  """A task that predicts the depth of every pixel; focal lengths are (pixels, source of the value)."""

  def colored(self, depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray: ...  # uint8 [H, W, 3]
  def save_point_cloud(self, stem: Path, depth: np.ndarray, image: np.ndarray, focal: tuple[float, str]) -> Path: ...


class TopDownTask(Task, Protocol):
  """A task that predicts keypoints in the crop of a person, and maps them to the image."""

  keypoints: Keypoints
  udp: bool

  def locate(self, prediction: Array, center: Array, extent: Array) -> Array: ...
  def rescored(self, box_scores: np.ndarray, joint_scores: np.ndarray) -> np.ndarray: ...
