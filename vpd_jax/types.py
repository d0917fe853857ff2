"""The data types that flow: Example -> Batch -> Features -> Outputs -> Rows, and the state of a run."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np
from flax import nnx

Array = jax.Array
Device = Any  # jax.Device, which is a variable to type checkers and no type
Example = dict[str, Any]  # one image: "image" uint8 [H, W, 3], "depth" float32 [H, W] metres, ..., also texts
Batch = dict[str, Array]  # stacked, plus "real" bool [B]: False for rows that only fill the last batch
Outputs = dict[str, Array]  # what a head returns: "depth" | "logits", "aux_logits" | "heatmaps"
Rows = dict[str, np.ndarray]  # one measurement per example, [N, ...], on the host
# By full name, such as "method/unet/input_blocks/1/0/in_layers/2/kernel": arrays of devices or of the host, or what
# stands for them: shapes, shardings.
ParamDict = dict[str, Any]


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
      raise ValueError(f"map_extent={self.map_extent!r} is unknown; choose one of {MAP_EXTENTS}.")


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
  opt_state: Any
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
    attends_to_classes: whether it has attention maps, one for each class; these are given by `class_attention(batch)`.
    notes: lines for the log at the start of a run.
    text_options: options of the config's section that are read where texts are prepared, not by the constructor.
    training_only: top-level parts that evaluation does without; `build` leaves them out there.
    prepare: host transform that runs after the data set's own; picklable, since it travels to the data workers.
  """

  needs: frozenset[str]
  prepare_inputs: frozenset[str]
  prepare_outputs: frozenset[str]
  map_info: MapInfo
  sentence_tokens: tuple[int, int] | None
  text_options: ClassVar[tuple[str, ...]]

  @property
  def attends_to_classes(self) -> bool: ...
  @property
  def notes(self) -> tuple[str, ...]: ...
  @property
  def training_only(self) -> tuple[str, ...]: ...
  @property
  def prepare(self) -> Callable[[Example], Example]: ...

  def branches(self, training: bool) -> tuple[Branch, ...]: ...
  def latents(self, batch: Batch) -> Array: ...  # of the images, float [B, h, w, 4], unscaled
  def text_states(self, batch: Batch) -> Array: ...  # of sentences, float [B, N, D]; see `sentence_tokens`
  def __call__(self, batch: Batch, *, training: bool) -> Features: ...  # len(branches) * B rows, branch by branch


class Task(Protocol):
  """What is learned and how it is scored. All methods are pure; nothing here knows the network.

  A task whose predictions are no maps of the picture also has `mirrored(prediction)`, which turns that of a mirrored
  image into that of the image; one with results for a benchmark's server has `write_results(path, rows, ..)`.
  """

  needs: frozenset[str]  # keys of a Batch
  eval_needs: frozenset[str]  # further ones that only `measure` reads
  output: dict[str, Any]  # what every head of this task must be told: maximum depth, number of classes
  result: str  # name of a prediction, for Python users
  best: tuple[str, str]  # the score that chooses the best checkpoint, and "min" or "max"
  way: str  # how pictures are cut and put together at test time, one of protocols.WAYS
  needs_truth: bool  # `summarize` and `baselines` also take `truth`, what the data set's method of that name gives

  def loss(self, outputs: Outputs, batch: Batch) -> Loss: ...  # one group of images
  def predict(self, outputs: Outputs) -> Array: ...  # depth | label scores | heatmaps
  def measure(self, prediction: Array, batch: Batch) -> dict[str, Array]: ...  # [B, ...] each
  def summarize(self, rows: Rows) -> dict[str, float]: ...  # host, numpy
  def baselines(self, train: Iterable[Example], evaluation: Iterable[Example]) -> dict[str, float]: ...  # of `best`
  def panel(self, example: Example, prediction: np.ndarray) -> np.ndarray: ...  # uint8 [H, W', 3]
  def save(
    self, stem: Path, prediction: np.ndarray, facts: dict[str, Any], image: np.ndarray | None = None
  ) -> list[Path]: ...  # files of one picture
