"""One picture of what runs on the procedural rooms have learned: image, truth, prediction and error, a room a row.

python scripts/contact_sheet.py --workdirs runs/quickstart/depth runs/quickstart/segmentation --output=sheet.png
"""

import argparse

import cv2
import numpy as np
from PIL import Image

from vpd_jax import experiment
from vpd_jax.errors import Parser, UserError, one_line
from vpd_jax.files import atomic, paths
from vpd_jax.prediction.predictor import Predictor
from vpd_jax.tasks import colormaps, drawing, label_images
from vpd_jax.tasks.depth import visualize

TASKS = ("depth", "segmentation")
WRONG, RIGHT = (200, 30, 30), (235, 235, 235)
LARGEST_ERROR = 1.0  # meters, the last color
MARGIN = 6  # pixels


def rows(workdir: str, count: int) -> tuple[list[str], list[list[np.ndarray]]]:
  """Titles, and the pictures uint8 [H, W, 3] of each of the first `count` rooms of the evaluation."""
  predictor = Predictor.load(workdir=workdir)
  config, task = predictor.config, predictor.experiment.task
  if config.data.name != "rooms" or config.task.name not in TASKS:
    raise UserError(f"{workdir} is a run of {config.task.name} on {config.data.name}; give one of {TASKS} on rooms.")
  source = experiment.dataset(config, predictor.experiment).source("eval")
  examples = [source[index] for index in range(min(count, len(source)))]
  classes = [int(example["class_id"]) for example in examples] if predictor.takes_class else None
  sentences = [example["sentence"] for example in examples] if predictor.takes_sentence else None
  found = predictor.predict([example["image"] for example in examples], classes, sentences=sentences)
  if config.task.name == "depth":
    titles = ["image", "depth, truth", "depth, predicted", f"error, 0 to {LARGEST_ERROR:g} m"]
    return titles, [_depth(e["image"], e["depth"], f["depth"]) for e, f in zip(examples, found, strict=True)]
  titles = ["image", "classes, truth", "classes, predicted", "error: red"]
  paint = lambda label: label_images.paint(label, task.palette)
  return titles, [
    [e["image"], paint(e["label"]), paint(f["label"]), _wrong(e["label"], f["label"])]
    for e, f in zip(examples, found, strict=True)
  ]


def _depth(image: np.ndarray, truth: np.ndarray, depth: np.ndarray) -> list[np.ndarray]:
  span = colormaps.depth_span([truth]) or (0.0, 1.0)
  predicted, known, error = visualize.painted(depth, truth, span, LARGEST_ERROR)
  return [image, known, predicted, error]


def _wrong(truth: np.ndarray, label: np.ndarray) -> np.ndarray:
  return np.where((truth != label)[..., None], np.uint8(WRONG), np.uint8(RIGHT))


def sheet(parts: list[tuple[list[str], list[list[np.ndarray]]]], scale: int) -> np.ndarray:
  """The pictures of all parts, each enlarged `scale` times, below a line of titles for every part: uint8 [H, W, 3]."""
  height, width = parts[0][1][0][0].shape[:2]

  def cell(picture: np.ndarray) -> np.ndarray:
    enlarged = cv2.resize(picture, (scale * width, scale * height), interpolation=cv2.INTER_NEAREST)
    return np.pad(enlarged, ((0, MARGIN), (MARGIN // 2, MARGIN // 2), (0, 0)), constant_values=255)

  lines = []
  for titles, rooms in parts:
    columns = [np.concatenate([cell(picture) for picture in column]) for column in zip(*rooms, strict=True)]
    lines.append(drawing.row(list(zip(titles, columns, strict=True))))
  return np.concatenate(lines)


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdirs", nargs="+", required=True, help="of runs of configs/rooms.py, depth or segmentation")
  parser.add_argument("--output", required=True, help="PNG to write")
  parser.add_argument("--count", type=int, default=3, help="rooms of each run")
  parser.add_argument("--scale", type=int, default=2, help="pixels of the sheet for one of the image")
  options = parser.parse_args()
  if min(options.count, options.scale) < 1:
    parser.error(f"--count={options.count} and --scale={options.scale} must be at least 1")
  try:
    output = paths.local(options.output, "--output")
    made = sheet([rows(workdir, options.count) for workdir in options.workdirs], options.scale)
  except UserError as error:
    raise SystemExit(f"contact_sheet: {one_line(error)}") from error
  atomic.write(output, lambda path: Image.fromarray(made).save(path, "PNG"))
  print(output)


if __name__ == "__main__":
  main()
