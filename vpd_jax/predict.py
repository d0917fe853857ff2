"""Predictor, the door for Python users, and --mode=predict over a folder of pictures."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vpd_jax import assemble, config_file, evaluate, inference, labelling, sharding, start
from vpd_jax import pictures as pictures_lib
from vpd_jax.assemble import Product
from vpd_jax.checkpoint import is_workdir

PICTURES_AT_ONCE = 4


@dataclasses.dataclass
class Predictor:
  """A network with its weights, for float images in and numpy arrays out.

  Use `Predictor.load`. `forward` is the bare network, `predict` the published test-time procedure on any pictures.

  Attributes:
    config: what was loaded.
    product: the objects it stands for.
    weights: parameters, frozen arrays and statistics, on the devices.
    origin: lines that say where the weights came from.
  """

  config: ConfigDict
  product: Product
  weights: evaluate.Weights
  origin: list[str]

  @classmethod
  def load(cls, config: ConfigDict | str, weights: str | Path = "") -> "Predictor":
    """Builds the network and fills it.

    Args:
      config: a ConfigDict or the string of --config, e.g. "configs/nyu_depth.py:tiny"; a relative path is looked up in
        the working directory, then beside the package.
      weights: a workdir of ours, a released checkpoint (.pth), or converted weights; empty: `config.init`.

    Raises:
      ValueError: in one line, for a config or weights that cannot be used.
    """
    config = config_file.load(config)
    config = start.complete(config, str(weights) or config.init.run or config.init.pretrained)
    config = start.predicting_class(config)
    product = assemble.assemble(config, training=False)
    mesh = sharding.make_mesh(1, 1, devices=jax.local_devices()[:1])
    filled, lines = start.weights_on_mesh(config, product, mesh, str(weights), complete=bool(str(weights)))
    return cls(config, product, filled, lines)

  def __post_init__(self):
    product, words = self.product, self.config.eval.test_time
    if product.task.any_size:
      self._labelling = labelling.Labelling(
        evaluate.make_scores(product),
        labelling.parse(words),
        at_once=self.config.eval.batch_size,
        small=self.config.eval.small,
      )
      self._decide = jax.jit(product.task.decide)
    else:
      flip, self._windows = inference.parse(words)
      self._predict = jax.jit(evaluate.make_predict(product, ("flip",) if flip else (), "full"))
    self._forward = jax.jit(lambda weights, batch: product.parts.merge(*weights)(batch, training=False))
    predictor = lambda weights, image: product.parts.merge(*weights).method.class_predictor(image)
    self._classify = jax.jit(predictor) if hasattr(product.method, "class_predictor") else None
    self._side = int(self.config.data.crop[0])
    cut_top = getattr(assemble.DATASETS[self.config.data.name], "cut_top", None)
    self._cut_top = (lambda picture: cut_top(self.config.data, picture.shape[:2])) if cut_top else lambda picture: 0
    self._dtype = np.promote_types(assemble.dtype(self.config, "param_dtype"), np.float32)

  @property
  def takes_class(self) -> bool:
    """Whether the method is told the class of an image, or predicts it."""
    return self.predicts_class or "class_id" in self.product.method.needs

  @property
  def predicts_class(self) -> bool:
    """Whether CLIP tells the class where nobody does."""
    return self._classify is not None

  def class_id(self, name: str) -> int:
    """Number of a class by its name, spaces or underscores alike.

    Raises:
      ValueError: unknown name; lists all.
    """
    wanted = name.strip().lower().replace(" ", "_")
    if wanted not in self.product.classes:
      raise ValueError(f"class {name!r} is unknown; choose one of {', '.join(self.product.classes)}.")
    return self.product.classes.index(wanted)

  def forward(self, images: Any, *, class_id: Any = None) -> dict[str, np.ndarray]:
    """The bare network in evaluation mode: no resizing, no windows, no mirroring.

    Args:
      images: float [B, H, W, 3] in [0, 1], RGB.
      class_id: int or int [B], -1 for the mean of all class vectors; None is -1.

    Returns:
      What the head returns, e.g. {"depth": float32 [B, H, W] metres}.

    Raises:
      ValueError: images of another shape or type; a class id out of range.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not np.issubdtype(images.dtype, np.floating):
      raise ValueError(f"images are {images.dtype} {images.shape}; give float [B, H, W, 3] in [0, 1].")
    batch = self._batch(images.astype(self._dtype), self._class_ids(class_id, len(images)))
    return jax.device_get(self._forward(self.weights, batch))

  def predict(self, images: Sequence[Any], class_id: Any = None) -> list[dict[str, np.ndarray]]:
    """The test-time procedure of the config on pictures of any sizes.

    Labels: sliding windows and scales, see labelling.py. Depth: a picture is resized so that its shorter side is the
    training crop; square windows are shifted along the longer side (at least as many as cover it), mirrored too where
    the config says so, and averaged; the result is resized back. Rows that the data set takes off its own frames
    (KITTI's highest) are NaN.

    Args:
      images: uint8 [H, W, 3], or float in [0, 1], each.
      class_id: int, or one per image; None for the mean of all class vectors.

    Returns:
      One dict per image, e.g. {"depth": float32 [H, W] metres} or {"label": int32 [H, W]}.

    Raises:
      ValueError: an image of another shape or type; a class id out of range.
    """
    pictures = [pictures_lib.unit(image, self._dtype) for image in images]
    ids = self._class_ids(class_id, len(pictures))
    if self._classify is not None:  # from the whole picture, once for all of its windows
      ids = np.array([self._classified(p) if i < 0 else i for p, i in zip(pictures, ids, strict=True)], np.int32)
    if self.product.task.any_size:
      # Bytes stay bytes until they are resized, as in the evaluation.
      given = zip(map(np.asarray, images), pictures, strict=True)
      return self._labelled([image if image.dtype == np.uint8 else picture for image, picture in given])
    tops = [self._cut_top(picture) for picture in pictures]
    fitted = [pictures_lib.fit(picture[top:], self._side) for picture, top in zip(pictures, tops, strict=True)]
    corners = [inference.offsets(f.shape[:2], self._windows, coverage="full") for f in fitted]
    cut = [inference.cut(f[None], c) for f, c in zip(fitted, corners, strict=True)]
    rows = (
      np.concatenate([np.full(len(c), i, np.int32) for c, i in zip(corners, ids, strict=True)]) if pictures else None
    )
    predicted = iter(self._windowed(np.concatenate(cut), rows) if pictures else ())
    results = []
    for picture, top, f, c in zip(pictures, tops, fitted, corners, strict=True):
      merged = inference.merge(np.stack([next(predicted) for _ in c]), c, f.shape[:2])[0]
      whole = np.full((*picture.shape[:2], *merged.shape[2:]), np.nan, np.float32)
      whole[top:] = pictures_lib.resized(merged, picture[top:].shape[:2])
      results.append({self.product.task.result: whole})
    if self.takes_class:
      results = [result | {"class_id": np.int32(i)} for result, i in zip(results, ids, strict=True)]
    return results

  def _labelled(self, pictures: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The label of every pixel of pictures of any sizes, one after the other."""
    views = (self._labelling.views({"image": picture}) for picture in pictures)
    results = []
    for picture, scores in zip(pictures, self._labelling(self.weights, views), strict=True):
      height, width = picture.shape[:2]
      results.append({self.product.task.result: np.asarray(self._decide(scores))[:height, :width]})
    return results

  def _windowed(self, windows: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """Predictions of square windows, in calls of one static size; the last call is filled up."""
    most = max(self._windows, self.config.eval.batch_size)
    size = min(most, 1 << (len(windows) - 1).bit_length())  # few sizes, so few programs
    results = []
    for begin in range(0, len(windows), size):
      index = np.minimum(np.arange(begin, begin + size), len(windows) - 1)
      results.append(np.asarray(self._predict(self.weights, self._batch(windows[index], ids[index]))))
    return np.concatenate(results)[: len(windows)]

  def _classified(self, picture: np.ndarray) -> int:
    """The class that CLIP tells from a picture of any size, squeezed to one size for one program."""
    return int(
      self._classify(self.weights, jnp.asarray(pictures_lib.resized(picture, (self._side, self._side))[None]))[0]
    )

  def _batch(self, images: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    return {"image": jnp.asarray(images), "class_id": jnp.asarray(ids)}

  def _class_ids(self, class_id: Any, count: int) -> np.ndarray:
    ids = np.broadcast_to(np.asarray(-1 if class_id is None else class_id, np.int32), (count,))
    if ids.size and (ids.min() < -1 or ids.max() >= len(self.product.classes)):
      raise ValueError(f"class_id {ids.tolist()} must lie between -1 (the mean) and {len(self.product.classes) - 1}.")
    return ids


def _check_output(output: str, folder: Path) -> Path:
  """The folder for the results, which can be made, and is not that of the pictures."""
  target = Path(output).expanduser()
  held = next(p for p in (target, *target.absolute().parents) if p.exists())
  if not output or not held.is_dir() or not os.access(held, os.W_OK):
    why = f": {held} is not a folder that can be written to" if output else ""
    raise ValueError(f"--output={output!r} must name a folder{why}; give another, it is made where it does not exist.")
  if target.resolve() == folder.resolve():
    raise ValueError(f"--output={output!r} is the folder of the pictures; give another, or results become pictures.")
  return target


def run(config: ConfigDict, workdir: str, *, source: str, output: str, class_name: str = "") -> int:
  """--mode=predict: writes the prediction of every picture of a folder; returns how many there were.

  Files that are no pictures, by name and by content, are named and left alone.

  Raises:
    ValueError: no such folder, or no picture in it; an unknown class; after all others have been written, pictures that
      cannot be read.
  """
  folder = Path(source).expanduser()
  if not source or not folder.is_dir():
    raise ValueError(f"--input={source!r} is not a folder; give one that holds pictures.")
  target = _check_output(output, folder)
  chosen = workdir if is_workdir(workdir) else config.init.run or config.init.pretrained
  if not chosen:
    raise ValueError(
      f"--workdir={workdir!r} holds no checkpoint and config.init.pretrained is empty; give one of them."
    )
  paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
  pictures = [path for path in paths if pictures_lib.is_picture(path)]
  if not pictures:
    raise ValueError(f"--input={source!r} holds no picture, only {len(paths)} other files; give a folder that does.")
  predictor = Predictor.load(config, weights=chosen)
  if class_name and not predictor.takes_class:
    raise ValueError(f"--class={class_name!r} has no effect: {config.method.name!r} takes no class; leave it out.")
  class_id = predictor.class_id(class_name) if class_name else None
  print("\n".join(predictor.origin), flush=True)
  if class_id is None and predictor.takes_class:
    predicted = "CLIP predicts the class of each picture, see the .json files"
    mean = "the mean of all class vectors stands in for the scene's (config.init.clip would predict it)"
    print(f"no --class given: {predicted if predictor.predicts_class else mean}", flush=True)
  for path in sorted(set(paths) - set(pictures)):
    print(f"skipped: {path.name} is no picture", flush=True)
  names = [p.stem for p in pictures]
  damaged, waiting = [], []

  def flush():
    target.mkdir(parents=True, exist_ok=True)
    for (path, image), result in zip(waiting, predictor.predict([i for _, i in waiting], class_id), strict=True):
      stem = target / (path.stem if names.count(path.stem) == 1 else path.name.replace(".", "_"))
      facts = {"source": path.name, "source_size": list(image.shape[:2])}
      if predictor.takes_class:
        number = int(result["class_id"])
        facts["class"] = "mean of all" if number < 0 else predictor.product.classes[number]
        facts["class_from"] = "--class" if class_name else "CLIP" if number >= 0 else "nowhere"
      predictor.product.task.save(stem, result[predictor.product.task.result], facts, image)
    waiting.clear()

  for path in pictures:
    try:
      waiting.append((path, pictures_lib.read_picture(path)))
    except ValueError as error:
      damaged.append(str(error))
      print(f"skipped: {error}", flush=True)
    if len(waiting) == PICTURES_AT_ONCE:
      flush()
  if waiting:
    flush()
  done = len(pictures) - len(damaged)
  print(f"{done} pictures written to {output}, {len(paths) - done} files skipped", flush=True)
  if damaged:
    raise ValueError(
      f"{len(damaged)} of {len(pictures)} pictures in {source} cannot be read: {'; '.join(damaged[:10])}. "
      f"The other {done} are done; mend or remove these."
    )
  return done
