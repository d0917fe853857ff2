"""--mode=predict: the predictions of a folder of pictures as files."""

import collections
import os
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vpd_jax.checkpoints.checkpointer import is_workdir
from vpd_jax.errors import UserError
from vpd_jax.files import reading
from vpd_jax.inference import image_io as pictures_lib
from vpd_jax.inference import top_down
from vpd_jax.prediction.predictor import Predictor

PICTURES_AT_ONCE = 4


def _check_output(output: str, folder: Path) -> Path:
  """The folder for the results, which can be made, and is not that of the pictures."""
  target = Path(output).expanduser()
  held = next(p for p in (target, *target.absolute().parents) if p.exists())
  if not output or not held.is_dir() or not os.access(held, os.W_OK):
    why = f": {held} is not a folder that can be written to" if output else ""
    raise UserError(f"--output={output!r} must name a folder{why}; give another, it is made where it does not exist.")
  if target.resolve() == folder.resolve():
    raise UserError(f"--output={output!r} is the folder of the pictures; give another, or results become pictures.")
  return target


class Wanted(NamedTuple):
  """One prediction of a picture.

  Attributes:
    stem: of the files that are written.
    given: further arguments of Predictor.predict for it, singular: "sentences", "boxes".
  """

  stem: str
  given: dict[str, Any]


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
) -> int:
  """--mode=predict: writes the prediction of every picture of a folder; returns how many there were.

  Files that are no pictures, by name and by content, are named and left alone.

  Args:
    config: of the run.
    workdir: whose checkpoint is read.
    source, output: folders.
    class_name: of all pictures.
    sentence: about all pictures.
    sentences: a file with sentences about each picture, see `read_sentences`.
    boxes: a file with boxes of each picture, see top_down.read_boxes.
    attention: also write where the network attends to each class, see Predictor.attention.

  Raises:
    ValueError: no such folder, or no picture in it; an unknown class; files of another form, or that name a picture
      which is not there; options without effect; after all others have been written, pictures that cannot be read, or
      whose boxes have no area in them.
  """
  folder = Path(source).expanduser()
  if not source or not folder.is_dir():
    raise UserError(f"--input={source!r} is not a folder; give one that holds pictures.")
  target = _check_output(output, folder)
  chosen = workdir if is_workdir(workdir) else config.init.run or config.init.pretrained
  if not chosen:
    raise UserError(f"--workdir={workdir!r} holds no checkpoint and config.init.pretrained is empty; give one of them.")
  paths = [p for name in reading.visible(os.listdir(folder)) if (p := folder / name).is_file()]
  pictures = [path for path in paths if pictures_lib.is_picture(path)]
  if not pictures:
    raise UserError(f"--input={source!r} holds no picture, only {len(paths)} other files; give a folder that does.")
  if sentence and sentences:
    raise UserError("--sentence and --sentences are given; give one of them.")
  said = read_sentences(sentences) if sentences else None
  found = top_down.read_boxes(boxes) if boxes else None
  for flag, content in (("sentences", said), ("boxes", found)):
    if missing := sorted(set(content or ()) - {path.name for path in pictures}):
      raise UserError(f"--{flag} names pictures that are not in {source}: {', '.join(missing[:10])}; correct it.")
  predictor = Predictor.load(config, weights=chosen)
  product = predictor.product
  for flag, value, taken in (
    ("class", class_name, predictor.takes_class),
    ("sentence", sentence, predictor.takes_sentence),
    ("sentences", sentences, predictor.takes_sentence),
    ("boxes", boxes, predictor.takes_boxes),
  ):
    if value and not taken:
      what = f"method {config.method.name!r} with task {config.task.name!r}"
      raise UserError(f"--{flag}={value!r} has no effect: {what} takes none; leave it out.")
  if attention and not getattr(product.method, "attends_to_classes", False):
    raise UserError(f"--attention has no effect: {config.method.name!r} has no map for each class; leave it out.")
  if predictor.takes_sentence and not (sentence or sentences):
    raise UserError('this task needs a sentence: give --sentence="..." about all pictures, or --sentences=FILE.json.')
  class_id = predictor.class_id(class_name) if class_name else None
  print("\n".join(predictor.origin), flush=True)
  if class_id is None and predictor.takes_class:
    predicted = "CLIP predicts the class of each picture, see the .json files"
    mean = "the mean of all class vectors stands in for the scene's (config.init.clip would predict it)"
    print(f"no --class given: {predicted if predictor.predicts_class else mean}", flush=True)
  for path in sorted(set(paths) - set(pictures)):
    print(f"skipped: {path.name} is not a picture we read", flush=True)
  given = [_given(path.name, predictor, sentence, said, found) for path in pictures]
  stems = result_names([(path.name, len(each)) for path, each in zip(pictures, given, strict=True)])
  damaged, waiting = [], []

  def flush():
    target.mkdir(parents=True, exist_ok=True)
    asked = waiting[0][2].given
    given = {name: [want.given[name] for _, _, want in waiting] for name in asked}
    results = predictor.predict([image for _, image, _ in waiting], class_id, **given)
    for (path, image, want), result in zip(waiting, results, strict=True):
      facts = {"source": path.name, "source_size": list(image.shape[:2])}
      if predictor.takes_class:
        number = int(result["class_id"])
        facts["class"] = "mean of all" if number < 0 else product.classes[number]
        facts["class_from"] = "--class" if class_name else "CLIP" if number >= 0 else "nowhere"
      if predictor.takes_sentence:
        facts["sentence"] = want.given["sentences"]
      if predictor.takes_boxes:
        pairs = zip(result["boxes"], result["scores"], strict=True)
        facts["people"] = [{"box": box.tolist(), "score": round(float(score), 4)} for box, score in pairs]
      if attention:
        maps = predictor.attention([image])[0]
        product.task.save_attention(target / want.stem, maps, result[product.task.result], image)
      product.task.save(target / want.stem, result[product.task.result], facts, image)
    waiting.clear()

  left_alone = 0
  for path, names, each in zip(pictures, stems, given, strict=True):
    wants = [Wanted(*pair) for pair in zip(names, each, strict=True)]
    left_alone += not wants
    try:
      image = pictures_lib.read_picture(path) if wants else None
      for want in wants:
        if image is not None and "boxes" in want.given:
          top_down.check_boxes(want.given["boxes"], image.shape[:2], path.name)
    except UserError as error:
      damaged.append(str(error))
      print(f"skipped: {error}", flush=True)
      continue
    for want in wants:
      waiting.append((path, image, want))
      if len(waiting) == PICTURES_AT_ONCE:
        flush()
  if waiting:
    flush()
  if left_alone:
    print(f"{left_alone} pictures of which --sentences says nothing are left alone", flush=True)
  done = len(pictures) - len(damaged) - left_alone
  print(f"{done} pictures written to {output}, {len(paths) - done} files skipped", flush=True)
  if damaged:
    told = "; ".join(message.rstrip(".") for message in damaged[:10])
    raise UserError(
      f"{len(damaged)} of {len(pictures)} pictures in {source} cannot be read: {told}. "
      f"The other {done} are done; mend or remove these."
    )
  return done


def _given(name: str, predictor: Predictor, sentence: str, said: Any, found: Any) -> list[dict[str, Any]]:
  """What is given for each prediction of a picture."""
  if predictor.takes_sentence:
    return [{"sentences": text} for text in ([sentence] if said is None else said.get(name, []))]
  return [{} if found is None else {"boxes": found.get(name, [])}]


def result_names(pictures: list[tuple[str, int]]) -> list[list[str]]:
  """Names of the results of each picture, no two alike, also where upper and lower case are not told apart.

  A result has the name of its image without the suffix, with _0, _1 .. where an image has several. Where results of two
  images would share a name: "a_jpg" for a.jpg, or else "a.jpg", then with the number of the image, then underscores.

  Args:
    pictures: name of the file, with a suffix, and how many results it has.
  """
  level = [0] * len(pictures)

  def named(i: int) -> list[str]:
    name, count = pictures[i]
    stems = (Path(name).stem, name.replace(".", "_"), name, f"{name}_{i}")
    stem = stems[min(level[i], 3)] + "_" * max(level[i] - 3, 0)
    return [f"{stem}_{number}" for number in range(count)] if count > 1 else [stem]

  while True:
    owners = collections.defaultdict(set)
    for i in range(len(pictures)):
      for name in named(i):
        owners[unicodedata.normalize("NFC", name).casefold()].add(i)
    shared = sorted({i for group in owners.values() if len(group) > 1 for i in group})
    if not shared:
      return [named(i)[:count] for i, (_, count) in enumerate(pictures)]
    for i in shared:
      level[i] += 1


def read_sentences(path: str) -> dict[str, list[str]]:
  """Sentences by the name of the picture, from a JSON list of {"image": name, "sentence": text or "sentences": [..]}.

  Raises:
    ValueError: missing, or of another form; names the file.
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
    raise UserError(f"--sentences={path!r} must hold a list of entries like {form}, all with a picture and words.")
  return result
