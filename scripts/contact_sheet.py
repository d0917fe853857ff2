"""One picture of what runs on the procedural rooms have learned: image, truth, prediction and error, a room a row.

python scripts/contact_sheet.py --workdirs runs/quickstart/depth runs/quickstart/segmentation --output=sheet.png
"""

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vpd_jax import experiment
from vpd_jax.errors import Parser, UserError, one_line
from vpd_jax.files import atomic
from vpd_jax.prediction.predictor import Predictor
from vpd_jax.tasks import colormaps, label_images

TASKS = ("depth", "segmentation")
WRONG, RIGHT = (200, 30, 30), (235, 235, 235)
LARGEST_ERROR = 1.0  # meters, the last color
MARGIN, TITLE = 6, 22  # pixels


def rows(workdir: str, count: int) -> tuple[list[str], list[list[np.ndarray]]]:
  """Titles, and the pictures uint8 [H, W, 3] of each of the first `count` rooms of the evaluation."""
  predictor = Predictor.load(workdir=workdir)
  config, task = predictor.config, predictor.experiment.task
  if config.data.name != "rooms" or config.task.name not in TASKS:
    raise UserError(f"{workdir} is a run of {config.task.name} on {config.data.name}; give one of {TASKS} on rooms.")
  source = experiment.dataset(config, predictor.experiment).source("eval")
  examples = [source[index] for index in range(min(count, len(source)))]
  classes = [int(example["class_id"]) for example in examples] if predictor.takes_class else None
  found = predictor.predict([example["image"] for example in examples], classes)
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
  known = truth > 0
  low, high = float(truth[known].min()), float(truth.max())
  error = colormaps.paint(np.where(known, np.abs(depth - truth), np.nan), 0, LARGEST_ERROR, colormaps.ERROR)
  return [image, *(colormaps.color_depth(x, high, min_depth=low) for x in (truth, depth)), error]


def _wrong(truth: np.ndarray, label: np.ndarray) -> np.ndarray:
  return np.where((truth != label)[..., None], np.uint8(WRONG), np.uint8(RIGHT))


def sheet(parts: list[tuple[list[str], list[list[np.ndarray]]]], scale: int) -> Image.Image:
  """The pictures of all parts, each enlarged `scale` times, with a line of titles above every part."""
  height, width = parts[0][1][0][0].shape[:2]
  cell = scale * width + MARGIN, scale * height + MARGIN
  columns = max(len(titles) for titles, _ in parts)
  total = sum(TITLE + cell[1] * len(pictures) for _, pictures in parts)
  result = Image.new("RGB", (columns * cell[0] + MARGIN, total + MARGIN), "white")
  draw, font, top = ImageDraw.Draw(result), ImageFont.load_default(14), 0
  for titles, pictures in parts:
    for column, title in enumerate(titles):
      draw.text((MARGIN + column * cell[0], top + 4), title, "black", font)
    top += TITLE
    for row in pictures:
      for column, picture in enumerate(row):
        enlarged = Image.fromarray(picture).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        result.paste(enlarged, (MARGIN + column * cell[0], top))
      top += cell[1]
  return result


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdirs", nargs="+", required=True, help="of runs of configs/rooms.py, depth or segmentation")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="PNG to write")
  parser.add_argument("--count", type=int, default=3, help="rooms of each run")
  parser.add_argument("--scale", type=int, default=2, help="pixels of the sheet for one of the image")
  options = parser.parse_args()
  try:
    made = sheet([rows(workdir, options.count) for workdir in options.workdirs], options.scale)
  except UserError as error:
    raise SystemExit(f"contact_sheet: {one_line(error)}") from error
  atomic.write(options.output, lambda path: made.save(path, "PNG"))
  print(options.output)


if __name__ == "__main__":
  main()
