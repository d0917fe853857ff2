"""Predictor, the Python entry point."""

import dataclasses
import difflib
import itertools
import os
from collections.abc import Iterable, Iterator, KeysView, Sequence, ValuesView
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.checkpoints.checkpointer import is_workdir
from vpd_jax.config import loader, stored
from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError
from vpd_jax.evaluation import evaluate
from vpd_jax.experiment import Experiment
from vpd_jax.inference import images as images_lib
from vpd_jax.monitoring import progress
from vpd_jax.prediction import protocols
from vpd_jax.types import Batch, Fields, Outputs, ParamDict, Weights

Images = object | Iterable[object]  # see images_lib.as_image
BATCH_SIZE = 4  # images that are read at a time; `predict_each` reads more if a batch holds more


@dataclasses.dataclass(repr=False)
class Predictor:
  """A network with its weights, which maps images to numpy arrays.

  Use `Predictor.load`. `forward` is the bare network, `predict` the test-time protocol for images of any size.

  Attributes:
    config: the loaded config.
    experiment: the objects assembled from it.
    weights: parameters, frozen arrays and statistics, on the devices.
    origin: lines about the source of the weights.
  """

  config: ConfigDict
  experiment: Experiment
  weights: evaluate.Weights
  origin: list[str]

  @classmethod
  def load(
    cls,
    config: ConfigDict | str | None = None,
    weights: str | Path = "",
    *,
    workdir: str | Path = "",
    random_init: bool = False,
  ) -> "Predictor":
    """Builds the network and loads its weights.

    Args:
      config: a ConfigDict or the string of --config, e.g. "configs/nyu_depth.py:tiny"; a relative path is looked up in
        the working directory, then next to the package. None: that of the run in `workdir`.
      weights: a workdir, a released checkpoint (.pth), or converted weights; empty: `config.init`.
      workdir: of a run, whose newest checkpoint is loaded; instead of `weights`.
      random_init: initialize arrays that the weights do not contain at random; without weights, all arrays.

    Raises:
      ValueError: for a config or weights that cannot be used, or weights that do not fill the network; one line.
    """
    if workdir and str(weights):
      raise UserError(f"Predictor.load has weights={str(weights)!r} and workdir={str(workdir)!r}; give one of them.")
    if workdir and not is_workdir(workdir):
      raise UserError(f"workdir={str(workdir)!r} holds no checkpoint; give the workdir of a run.")
    weights = workdir or weights
    if config is None and not (str(weights) and is_workdir(weights)):
      raise UserError(
        "Predictor.load has no config: give one, like 'configs/nyu_depth.py', or workdir=RUN, whose own is taken."
      )
    config = loader.load(stored.config_string(str(weights)) if config is None else config)
    source = str(weights) or initialize.source_of(config)
    if not (source or random_init):
      raise UserError(
        "Predictor.load has no weights: give weights=WORKDIR or a released checkpoint, set config.init.pretrained, or "
        "give random_init=True for a randomly initialized network."
      )
    with progress.phase("assemble"):
      config = initialize.with_backbone_sizes(config, source)
      config = initialize.with_predicted_class(config)
      exp = experiment.assemble(config, training=False)
    mesh = sharding.make_mesh(1, 1, devices=jax.local_devices()[:1])
    with progress.phase("load weights"):
      loaded, lines = initialize.weights_on_mesh(config, exp, mesh, str(weights), complete=not random_init)
    return cls(config, exp, loaded, lines)

  def __post_init__(self):
    exp = self.experiment
    self._protocol = protocols.PROTOCOLS[exp.task.test_time_protocol](self.config, exp)
    self._forward = jax.jit(self.network)
    predictor = lambda weights, image: exp.spec.merge(*weights).method.class_predictor(image)
    self._classify = jax.jit(predictor) if exp.method.class_predictor else None
    attended = lambda weights, image: exp.spec.merge(*weights).method.class_attention({"image": image})
    self._attention = jax.jit(attended)
    self._side = int(self.config.data.crop[0])
    self._dtype = np.promote_types(experiment.dtype(self.config, "param_dtype"), np.float32)

  def __repr__(self) -> str:
    config, size = self.config, "x".join(map(str, self.config.data.crop))
    parameters = sum(x.size for x in self.experiment.spec.shapes.values()) / 1e6
    classes = f" ({len(self.experiment.classes)} classes)" if self.experiment.classes else ""
    return (
      f"<vpd_jax.Predictor: method {config.method.name!r}, task {config.task.name!r}, data set {config.data.name!r}"
      f"{classes}, crops of {size}, {parameters:.1f} M parameters; {'; '.join(self.origin[:1])}>"
    )

  @property
  def takes_class(self) -> bool:
    """Whether the method takes the class of an image, or predicts it."""
    return self.predicts_class or "class_id" in self.experiment.method.needs

  @property
  def predicts_class(self) -> bool:
    """Whether CLIP predicts the class if none is given."""
    return self._classify is not None

  @property
  def draws_attention(self) -> bool:
    """Whether there is an attention map of each class, and the task draws it."""
    return self.experiment.method.attends_to_classes and self.experiment.task.draws_attention

  @property
  def takes_sentence(self) -> bool:
    """Whether the method reads a sentence about each image."""
    return "sentence" in self.experiment.method.prepare_inputs

  @property
  def takes_boxes(self) -> bool:
    """Whether the task takes boxes of people."""
    return self.experiment.task.test_time_protocol == "crops"

  @property
  def input_size(self) -> tuple[int, int]:
    """The (height, width) of the network's input in `predict`."""
    return self._protocol.input_size

  @property
  def preprocessing(self) -> str:
    """A description of what `predict` does before and after the network."""
    return self._protocol.preprocessing

  def class_id(self, name: str) -> int:
    """The id of a class by its name, with spaces or underscores.

    Raises:
      ValueError: for an unknown name; lists all names.
    """
    key = name.strip().lower().replace(" ", "_")
    if key not in self.experiment.classes:
      matches = difflib.get_close_matches(key, self.experiment.classes, n=1, cutoff=0.75)
      hint = f"did you mean {matches[0]}? Known are" if matches else "choose one of"
      raise UserError(f"class {name!r} is unknown; {hint} {', '.join(self.experiment.classes)}.")
    return self.experiment.classes.index(key)

  def forward(
    self,
    images: Images,
    *,
    class_id: object = None,
    sentences: str | Sequence[str] | None = None,
    text_states: Any = None,
  ) -> dict[str, np.ndarray]:
    """The bare network in evaluation mode, without resizing, windows or flips.

        predictor.forward(np.zeros((1, 480, 640, 3), np.float32))["depth"]  # float32 [1, 480, 640]

    Args:
      images: an array [B, H, W, 3], uint8 or float in [0, 1], RGB; or as for `predict`, of equal size.
      class_id: int or name, or one per image; -1 or None for the class that CLIP predicts with `init.clip`, else for
        the mean of all class vectors.
      sentences: one per image, if the method reads sentences.
      text_states: float [B, N, D], the text encoder's output after its final norm, instead of sentences.

    Returns:
      The outputs of the head: {"depth": float32 [B, H, W] meters}, {"logits": float32 [B, H, W, K], "aux_logits": ..}
      or {"heatmaps": float32 [B, h, w, K]}.

    Raises:
      ValueError: for images of another shape or dtype, a class id out of range, missing sentences, and a class id or
        sentences for a method that does not use them.
    """
    batch = self.batch(images, class_id=class_id, sentences=sentences, text_states=text_states)
    return jax.device_get(self._forward(self.weights, jax.tree.map(jnp.asarray, batch)))

  def network(self, weights: Weights | tuple[ParamDict], batch: Batch) -> Outputs:
    """The pure function that `forward` compiles: from the result of `batch` to the outputs of the head."""
    return self.experiment.spec.merge(*weights)(batch, training=False)

  def batch(
    self,
    images: Images,
    *,
    class_id: object = None,
    sentences: str | Sequence[str] | None = None,
    text_states: Any = None,
  ) -> dict[str, np.ndarray]:
    """The inputs of the network for the arguments of `forward`; raises the same errors.

    Returns:
      "image" float [B, H, W, 3] in [0, 1]; if the method uses them, "class_id" int32 [B], -1 if none is given, and
      "tokens" int32 [B, N] or "text_states" float [B, N, D].
    """
    image_list, _ = _as_list(images)
    arrays = [images_lib.to_float(images_lib.as_image(image), self._dtype) for image in image_list]
    if len(sizes := sorted({array.shape[:2] for array in arrays})) != 1:
      raise UserError(f"images of sizes {sizes} make no batch; give images of one size, or use predict.")
    batch, images = {"image": np.stack(arrays)}, arrays
    if text_states is not None:
      batch["text_states"] = self._text_states(text_states, len(images), sentences)
      sentences = None
    inputs = self._inputs(len(images), class_id, sentences, None, complete=text_states is None)
    return batch | {name: np.stack([row[name] for row in inputs]) for name in (inputs[0] if inputs else ())}

  def predict(
    self,
    images: Images,
    class_id: object = None,
    *,
    sentences: str | Sequence[str] | None = None,
    boxes: Sequence[Any] | None = None,
  ) -> Any:
    """The test-time protocol of the config for images of any size; see prediction/protocols.py.

        predictor.predict("photo.jpg", "kitchen")["depth"]                      # float32 [H, W], meters
        [result["label"] for result in predictor.predict(["a.jpg", image_b])]   # int32 [H, W] each

    Args:
      images: a path, a PIL image or an array [H, W, 3], uint8 or float in [0, 1], RGB, see images_lib.as_image; or an
        iterable of these.
      class_id: int or name of a class, or one per image; -1 or None for the class that CLIP predicts with `init.clip`,
        else for the mean of all class vectors.
      sentences: one per image, if the method reads sentences.
      boxes: for poses, a list per image of [x, y, width, height] or [x, y, width, height, score]; None: one person
        per image, with the full image as box.

    Returns:
      A list with one dict per image, or the dict of a single image: {"depth": float32 [H, W] meters}, {"label": int32
      [H, W]}, {"mask": bool [H, W]}, or
      {"keypoints": float32 [N, K, 3] of x, y, score; "boxes" [N, 4]; "scores" [N]}; with "class_id" if the method uses
      one.

    Raises:
      ValueError: for an image of another shape or dtype, a class id out of range, missing sentences, and a class id,
        sentences or boxes without effect.
    """
    image_list, single = _as_list(images)
    if single and boxes is not None:
      boxes = [boxes]
    results = list(self.predict_each(image_list, class_id, sentences=sentences, boxes=boxes))
    return results[0] if single else results

  def predict_each(
    self,
    images: Iterable[object],
    class_id: object = None,
    *,
    sentences: str | Sequence[str] | None = None,
    boxes: Sequence[Any] | None = None,
  ) -> Iterator[Fields]:
    """As `predict`, but reads and yields few images at a time, at least `eval.batch_size`."""
    one_class = class_id is None or isinstance(class_id, int | str | np.integer)
    if not one_class or sentences is not None or boxes is not None:
      images = list(images)  # what is given for each image must have their number
    inputs = iter(self._inputs(len(images), class_id, sentences, boxes)) if isinstance(images, list) else None
    remaining, size = iter(images), max(BATCH_SIZE, self.config.eval.batch_size)
    while chunk := list(itertools.islice(remaining, size)):
      arrays = [images_lib.as_image(image) for image in chunk]
      rows = [*itertools.islice(inputs, size)] if inputs else self._inputs(len(chunk), class_id, None, None)
      if self._classify is not None:  # from the full image, once for all windows
        for image, row in zip(arrays, rows, strict=True):
          if row["class_id"] < 0:
            row["class_id"] = np.int32(self._classify_image(images_lib.to_float(image, self._dtype)))
      for result, row in zip(self._protocol(self.weights, arrays, rows), rows, strict=True):
        yield result | ({"class_id": row["class_id"]} if self.takes_class else {})

  def attention(self, images: Images) -> Any:
    """Attention of each position of an image to each class, for methods that attend to all classes.

    Args:
      images: as for `predict`; resized to the training crop, ignoring the aspect ratio.

    Returns:
      A list of float32 [h, w, K], or the array of a single image: h and w are the sides of the crop divided by the
      stride of the finest attention maps.

    Raises:
      ValueError: if the method has no such maps, or for an image of another shape or dtype.
    """
    if not self.experiment.method.attends_to_classes:
      raise UserError(f"{self._what} has no attention maps of classes.")
    size = tuple(self.config.data.crop)
    image_list, single = _as_list(images)
    arrays = [images_lib.to_float(images_lib.as_image(image), self._dtype) for image in image_list]
    resized = [images_lib.resize(array, size) for array in arrays]
    maps = [np.asarray(self._attention(self.weights, jnp.asarray(x[None])))[0].astype(np.float32) for x in resized]
    return maps[0] if single else maps

  def _inputs(self, count: int, class_id: Any, sentences: Any, boxes: Any, complete: bool = True) -> list[Fields]:
    """The inputs of each image besides its pixels, by name."""
    if class_id is not None and not self.takes_class:
      raise UserError(f"class_id has no effect on {self._what}; leave it out.")
    sentences = [sentences] if isinstance(sentences, str) and count == 1 else sentences
    for name, value, is_used in (("sentences", sentences, self.takes_sentence), ("boxes", boxes, self.takes_boxes)):
      if value is not None and not is_used:
        raise UserError(f"{name} have no effect on {self._what}; leave them out.")
      if value is not None and (isinstance(value, str) or len(value) != count):
        raise UserError(f"{name}: {1 if isinstance(value, str) else len(value)} for {count} images; give one each.")
    if self.takes_sentence and sentences is None and complete:
      raise UserError(f"{self._what} needs a sentence about each image; give sentences=[...].")
    inputs = [{} for _ in range(count)]
    ids = self._class_ids(class_id, count)
    if self.takes_class:
      for row, i in zip(inputs, ids, strict=True):
        row["class_id"] = np.int32(i)
    for row, text in zip(inputs, sentences or (), strict=False):
      row["tokens"] = self.experiment.method.prepare({"sentence": text})["tokens"]
    for i, (row, image_boxes) in enumerate(zip(inputs, () if boxes is None else boxes, strict=False)):
      row |= {"boxes": image_boxes, "image_name": f"image {i}"}
    return inputs

  @property
  def _what(self) -> str:
    return f"method {self.config.method.name!r} and task {self.config.task.name!r}"

  def _text_states(self, states: Any, count: int, sentences: Any) -> np.ndarray:
    if not self.takes_sentence:
      raise UserError(f"text_states have no effect on {self._what}; leave them out.")
    if sentences is not None:
      raise UserError("sentences and text_states are given; give one of them.")
    states, expected = np.asarray(states), (count, *(self.experiment.method.sentence_tokens or ()))
    if states.shape != expected or not np.issubdtype(states.dtype, np.floating):
      raise UserError(f"text_states are {states.dtype} {states.shape}; give float {expected}.")
    return states.astype(self._dtype)

  def _classify_image(self, image: np.ndarray) -> int:
    """The class that CLIP predicts for an image of any size; resized, so that one compilation serves all sizes."""
    resized = jnp.asarray(images_lib.resize(image, (self._side, self._side))[None])
    return int(cast(Any, self._classify)(self.weights, resized)[0])

  def _class_ids(self, class_id: object, count: int) -> np.ndarray:
    by_name = lambda value: self.class_id(value) if isinstance(value, str) else -1 if value is None else value
    if isinstance(class_id, list | tuple):
      class_id = [by_name(value) for value in class_id]
    ids = np.asarray(by_name(class_id))
    if ids.shape not in ((), (count,)) or (not np.issubdtype(ids.dtype, np.integer) and ids.size):
      raise UserError(f"class_id is {ids.dtype} {list(ids.shape)}; give one int, or one for each of {count} images.")
    ids = np.broadcast_to(ids.astype(np.int32), (count,))
    if ids.size and (ids.min() < -1 or ids.max() >= len(self.experiment.classes)):
      raise UserError(f"class_id {ids.tolist()} must lie between -1 (none) and {len(self.experiment.classes) - 1}.")
    return ids


def trained_weights(config: ConfigDict, workdir: str) -> str:
  """The argument `weights` of Predictor.load for a command: the workdir if it has a checkpoint, or else empty.

  Raises:
    ValueError: if the config has no weights either.
  """
  if not initialize.source_of(config, workdir):
    raise UserError(f"--workdir={workdir!r} holds no checkpoint and config.init.pretrained is empty; give one of them.")
  return workdir if is_workdir(workdir) else ""


def _as_list(images: Images) -> tuple[list[object], bool]:
  """The images as a list, and whether a single one was given, i.e. no iterable and no array [B, H, W, C]."""
  if isinstance(images, str | os.PathLike | Image.Image):
    return [images], True
  if isinstance(images, Sequence | Iterator | KeysView | ValuesView):  # not Iterable, which arrays are
    return list(images), False
  array = np.asarray(images)
  return ([array], True) if array.ndim < 4 else (list(array), False)
