"""--mode=predict: writes the predictions of an image, or of a folder of images, as files."""

import collections
import itertools
import math
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from ml_collections import ConfigDict

from vpd_jax.errors import UserError, first_items
from vpd_jax.files import paths, reading
from vpd_jax.inference import camera, top_down
from vpd_jax.inference import images as images_lib
from vpd_jax.monitoring import progress
from vpd_jax.prediction.predictor import BATCH_SIZE, Predictor, trained_weights
from vpd_jax.types import ClassAttentionTask, DepthTask, Fields

FOCAL = "give the focal length in pixels of the images, a number above 0."


class Request(NamedTuple):
  """One prediction of an image.

  Attributes:
    path: of the image.
    stem: name of the files to write, without suffix.
    inputs: further arguments of Predictor.predict for this image, singular: "sentences", "boxes".
  """

  path: Path
  stem: str
  inputs: Fields


def run(
  config: ConfigDict,
  workdir: str,
  *,
  source: str,
  output: str,
  class_name: str = "",
  sentence: str = "",
  sentences: str = "",
  boxes: str = "",
  attention: bool = False,
  allow_damaged: bool = False,
  ply: bool = False,
  focal: float | None = None,
) -> int:
  """--mode=predict: writes the prediction of an image, or of every image of a folder, and returns their number.

  Files that are not images, by name and by content, are listed and skipped.

  Args:
    config: of the run.
    workdir: whose checkpoint is read.
    source: an image or a folder.
    output: a folder.
    class_name: class of all images.
    sentence: sentence for all images.
    sentences: a file with sentences for each image, see `read_sentences`.
    boxes: a file with boxes of each image, see top_down.read_boxes.
    attention: whether to also write attention maps of the classes, see Predictor.attention.
    allow_damaged: whether to tolerate images that cannot be read, unless none can.
    ply: whether to also write a colored point cloud of each image, for tasks that predict depth.
    focal: focal length of all images, in pixels; None to determine it by image, see inference/camera.py.

  Raises:
    ValueError: for a missing file or folder, or one without images, an unknown class, files in another format or with
      unknown image names, and options without effect. Unless `allow_damaged`, also for images that cannot be read or
      whose boxes have no area inside them, after all others have been written.
  """
  given = Path(source).expanduser()
  if not source:
    raise UserError("--mode=predict needs the images: give --input=FOLDER, or a single image.")
  single = given.is_file()
  if not (single or given.is_dir()):
    problem = "is neither a file nor a folder" if given.exists() else "does not exist"
    raise UserError(f"--input={source!r} {problem}; give an image, or a folder that contains images.")
  folder, names = (given.parent, [given.name]) if single else (given, reading.visible(os.listdir(given)))
  target = check_output(output, folder)
  weights = trained_weights(config, workdir)
  files = [path for name in names if (path := folder / name).is_file()]
  paths = [path for path in files if images_lib.is_image(path)]
  if single and not paths:
    raise UserError(f"--input={source!r} is not an image in a supported format; give one, or a folder of images.")
  if not paths:
    if files:
      hint = f"only {len(files)} other files, like {files[0].name}"
    else:
      hint = f"only folders, like {names[0]}, which are not searched" if names else "it is empty"
    raise UserError(f"--input={source!r} contains no image, {hint}; give a folder that does.")
  if sentence and sentences:
    raise UserError("--sentence and --sentences are given; give one of them.")
  listed = {
    "sentences": read_sentences(sentences) if sentences else None,
    "boxes": top_down.read_boxes(boxes) if boxes else None,
  }
  for flag, content in listed.items():
    if missing := sorted(set(content or ()) - {path.name for path in paths}):
      raise UserError(f"--{flag} names images that are not in {source}: {first_items(missing)}; correct it.")
  if focal is not None and not (ply and math.isfinite(focal) and focal > 0):
    raise UserError(f"--focal={focal}: {FOCAL if ply else 'only valid with --ply; leave it out.'}")
  predictor = Predictor.load(config, weights=weights)
  flags = {"class": class_name, "sentence": sentence, "sentences": sentences, "boxes": boxes}
  check_flags(config, predictor, flags, attention, ply)
  if class_name:
    predictor.class_id(class_name)
  say_origin(predictor, class_name)
  if predictor.takes_boxes:
    boxed = listed["boxes"]
    without = len(paths) - len(set(boxed or ()) & {path.name for path in paths})
    if boxed is None:
      progress.write("no --boxes given: every image is taken as one person (a detector is not included)")
    elif without:
      progress.write(f"{without} images without an entry in --boxes: no people are predicted there")
  for path in sorted(set(files) - set(paths)):
    progress.write(f"skipped: {path.name} is not an image in a supported format")
  requests = _requests(paths, predictor, sentence, listed)
  skipped = len(paths) - len({request.path for request in requests})
  damaged: list[str] = []
  readable, assumed = _read(requests, damaged), 0
  extras = {"class_name": class_name, "attention": attention, "ply": ply, "focal": focal}
  with progress.phase("predict", len(requests), "predictions") as predicted:
    while batch := list(itertools.islice(readable, BATCH_SIZE)):
      for _, metadata in write_results(predictor, batch, target, **extras):
        assumed += metadata.get("focal_length_from") == camera.ASSUMED
        predicted.advance()
  if assumed:
    progress.write(f"{assumed} images state no focal length ({camera.ASSUMED}); give --focal=PIXELS if it is known")
  if skipped:
    progress.write(f"{skipped} images without an entry in --sentences are skipped")
  done = len(paths) - len(damaged) - skipped
  progress.write(
    f"{done} images written to {output}, {len(files) - done - len(damaged)} files skipped, "
    f"{len(damaged)} images damaged"
  )
  if damaged and not (allow_damaged and done):
    reasons = first_items([message.rstrip(".") for message in damaged], "; ")
    raise UserError(
      f"{len(damaged)} of {len(paths)} images in {source} cannot be read: {reasons}. "
      f"The other {done} are done; fix or remove these, or give --allow_damaged."
    )
  return done


def write_results(
  predictor: Predictor,
  batch: Sequence[tuple[Request, np.ndarray]],
  target: Path,
  *,
  class_name: str = "",
  attention: bool = False,
  ply: bool = False,
  focal: float | None = None,
) -> Iterator[tuple[list[Path], Fields]]:
  """Writes the predictions of a few images; yields the files and the metadata of each.

  Args:
    predictor: its method and task must support the options, see `check_flags`.
    batch: requests and their images, uint8 [H, W, 3].
    target: output folder, created if it does not exist.
    class_name, attention, ply, focal: as in `run`.
  """
  target.mkdir(parents=True, exist_ok=True)
  task, class_id = predictor.experiment.task, predictor.class_id(class_name) if class_name else None
  inputs = {name: [request.inputs[name] for request, _ in batch] for name in batch[0][0].inputs}
  results = predictor.predict_each([image for _, image in batch], class_id, **inputs)
  for (request, image), result in zip(batch, results, strict=True):
    stem, prediction, files = target / request.stem, result[task.result], []
    metadata = _metadata(predictor, request, image, result, class_name)
    if attention:
      maps = predictor.attention([image])[0]
      files.append(cast(ClassAttentionTask, task).save_attention(stem, maps, prediction, image))
    if ply:
      length = camera.Focal(focal, "--focal") if focal else camera.of_photo(request.path, image.shape[:2])
      files.append(cast(DepthTask, task).save_point_cloud(stem, prediction, image, length))
      metadata |= {"focal_length_pixels": length.pixels, "focal_length_from": length.source}
    yield [*files, *task.save(stem, prediction, metadata, image)], metadata


def check_output(output: str, folder: Path | None = None) -> Path:
  """The output folder, which must be writable or creatable, and must not be `folder`, that of the images."""
  target = paths.local(output, "--output")
  if not output:
    raise UserError("--mode=predict needs a place for the results: give --output=FOLDER.")
  if not paths.is_writable(target):
    raise UserError(
      f"--output={output!r} must name a folder: {paths.nearest_existing(target)} is not a folder that can be written "
      "to; give another, it is created if it does not exist."
    )
  if folder and target.resolve() == folder.resolve():
    raise UserError(
      f"--output={output!r} is the folder of the images; give another; otherwise results would be read as input images."
    )
  return target


def say_origin(predictor: Predictor, class_name: str) -> None:
  """Prints the origin of the weights, and the default if no class is given."""
  progress.write("\n".join(predictor.origin))
  if predictor.takes_class and not class_name:
    predicted = "CLIP predicts the class of each image, see the .json files"
    mean = "using the mean of all class vectors (set config.init.clip to predict the class)"
    progress.write(f"no --class given: {predicted if predictor.predicts_class else mean}")


def check_flags(config: ConfigDict, predictor: Predictor, flags: Mapping[str, str], attention: bool, ply: bool) -> None:
  """Raises for flags without effect on this method and task, and for a missing sentence."""
  takes = {"class": predictor.takes_class, "boxes": predictor.takes_boxes}
  what = f"method {config.method.name!r} with task {config.task.name!r}"
  for flag, value in flags.items():
    if value and not takes.get(flag, predictor.takes_sentence):
      raise UserError(f"--{flag}={value!r} has no effect: {what} takes none; leave it out.")
  if attention and not predictor.draws_attention:
    raise UserError(f"--attention has no effect: {what} draws no map for each class; leave it out.")
  if ply and not predictor.experiment.task.measures_depth:
    raise UserError(f"--ply has no effect: task {config.task.name!r} predicts no depth; leave it out.")
  if predictor.takes_sentence and not (flags["sentence"] or flags.get("sentences")):
    remedy = 'give --sentence="the red car" about all' + ", or --sentences=FILE.json" * ("sentences" in flags)
    raise UserError(f"the method needs a sentence about each image: {remedy}.")


def _requests(
  paths: Sequence[Path], predictor: Predictor, sentence: str, listed: Mapping[str, Fields | None]
) -> list[Request]:
  """The predictions of all images: one per sentence if the method reads sentences, else one per image."""
  sentences, boxes = listed["sentences"], listed["boxes"]

  def inputs(name: str) -> list[Fields]:
    others = {} if boxes is None else {"boxes": boxes.get(name, [])}
    if predictor.takes_sentence:
      return [{"sentences": text, **others} for text in ([sentence] if sentences is None else sentences.get(name, []))]
    return [others]

  inputs_of = [inputs(path.name) for path in paths]
  stems = result_names([(path.name, len(each)) for path, each in zip(paths, inputs_of, strict=True)])
  return [
    Request(path, *pair)
    for path, names, each in zip(paths, stems, inputs_of, strict=True)
    for pair in zip(names, each, strict=True)
  ]


def _read(requests: Sequence[Request], damaged: list[str]) -> Iterator[tuple[Request, np.ndarray]]:
  """Requests with their image, which is read once; errors of images are printed and added to `damaged`."""
  for path, group in itertools.groupby(requests, lambda request: request.path):
    of_image = list(group)
    try:
      image = images_lib.read_image(path)
      for request in of_image:
        if "boxes" in request.inputs:
          top_down.check_boxes(request.inputs["boxes"], image.shape[:2], path.name)
    except UserError as error:
      damaged.append(str(error))
      progress.write(f"skipped: {error}")
      continue
    yield from ((request, image) for request in of_image)


def _metadata(
  predictor: Predictor, request: Request, image: np.ndarray, result: Mapping[str, np.ndarray], class_name: str
) -> Fields:
  """The content of the .json file of a prediction, without the entries of the task."""
  metadata: Fields = {"source": request.path.name, "source_size": list(image.shape[:2])}
  if predictor.takes_class:
    number = int(result["class_id"])
    metadata["class"] = "mean of all" if number < 0 else predictor.experiment.classes[number]
    metadata["class_from"] = "--class" if class_name else "CLIP" if number >= 0 else "mean of all classes"
  if predictor.takes_sentence:
    metadata["sentence"] = request.inputs["sentences"]
  if predictor.takes_boxes:
    pairs = zip(result["boxes"], result["scores"], strict=True)
    metadata["people"] = [{"box": box.tolist(), "score": round(float(score), 4)} for box, score in pairs]
  return metadata


def result_names(images: list[tuple[str, int]]) -> list[list[str]]:
  """Unique names for the results of each image, also on file systems that ignore case.

  A result is named after its image without the suffix, plus _0, _1 .. if an image has several. If the results of two
  images would share a name, the name is the first unique one of "a_jpg", "a.jpg", and "a.jpg" with the image index and
  underscores.

  Args:
    images: file name, with suffix, and number of results of each image.
  """
  level = [0] * len(images)

  def named(i: int) -> list[str]:
    name, count = images[i]
    stems = (Path(name).stem, name.replace(".", "_"), name, f"{name}_{i}")
    stem = stems[min(level[i], 3)] + "_" * max(level[i] - 3, 0)
    return [f"{stem}_{number}" for number in range(count)] if count > 1 else [stem]

  while True:
    owners = collections.defaultdict(set)
    for i in range(len(images)):
      for name in named(i):
        owners[unicodedata.normalize("NFC", name).casefold()].add(i)
    shared = sorted({i for group in owners.values() if len(group) > 1 for i in group})
    if not shared:
      return [named(i)[:count] for i, (_, count) in enumerate(images)]
    for i in shared:
      level[i] += 1


def read_sentences(path: str) -> dict[str, list[str]]:
  """Reads sentences by image name, from a JSON list of {"image": name, "sentence": text or "sentences": [..]}.

  Raises:
    ValueError: for a missing file or another format; names the file.
  """
  entries = reading.read_json(path, called=f"--sentences={path!r}")
  result: dict[str, list[str]] = {}
  for entry in entries if isinstance(entries, list) else ():
    texts: list[Any] = entry.get("sentences", [entry.get("sentence")]) if isinstance(entry, dict) else [None]
    if not (isinstance(entry, dict) and isinstance(entry.get("image"), str) and isinstance(texts, list)):
      texts = [None]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
      result.clear()
      break
    result.setdefault(entry["image"], []).extend(texts)
  if not result:
    form = '{"image": "1.jpg", "sentence": "the red car"}'
    raise UserError(f"--sentences={path!r} must hold a list of entries like {form}, all with an image and a sentence.")
  return result
