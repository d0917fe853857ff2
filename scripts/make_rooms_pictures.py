"""Writes images of procedural rooms that no training has seen, as input for --mode=predict.

python scripts/make_rooms_pictures.py --output=runs/quickstart/pictures
python scripts/make_rooms_pictures.py --output=clips --count=1 --frames=48   # a video in which the camera turns
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from vpd_jax.data.datasets import rooms
from vpd_jax.errors import Parser, UserError, one_line
from vpd_jax.files import paths
from vpd_jax.prediction import predict_video

RATE = 12  # frames a second
TURN = 0.6  # radians in a video


def write_clip(file: pathlib.Path, data: rooms.Rooms, index: int, frames: int) -> None:
  """Writes an evaluation room as a video in which the camera turns by TURN, centered on its direction in the image."""
  writer = predict_video.open_writer(file, RATE, data.size)
  for turn in np.linspace(-TURN / 2, TURN / 2, frames):
    frame = rooms.draw(data.seed, "eval", index, data.size, turn=float(turn)).image
    writer.write(np.ascontiguousarray(frame[..., ::-1]))
  writer.release()


def parse() -> argparse.Namespace:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", required=True, help="folder, made where it does not exist")
  parser.add_argument("--count", type=int, default=4, help="images")
  parser.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
  parser.add_argument("--frames", type=int, default=0, help="of a video in place of an image, with even sides")
  options = parser.parse_args()
  if options.count < 1:
    parser.error(f"--count={options.count} must be at least 1")
  if options.frames and any(side % 2 for side in options.size):
    parser.error(f"--size {options.size[0]} {options.size[1]}: a video needs even sides")
  return options


def write(options: argparse.Namespace) -> None:
  """Writes the images or videos, and prints their names."""
  output = paths.local(options.output, "--output")
  data = rooms.Rooms(size=tuple(options.size), crop=tuple(options.size), eval_count=options.count)
  source = data.source("eval")
  output.mkdir(parents=True, exist_ok=True)
  for index in range(len(source)):
    example = source[index]
    file = output / f"room_{index:02d}_{data.classes[int(example['class_id'])]}.png"
    if options.frames:
      file = file.with_suffix(".mp4")
      write_clip(file, data, index, options.frames)
    else:
      Image.fromarray(example["image"]).save(file)
    print(file)


def main() -> None:
  try:
    write(parse())
  except UserError as error:
    raise SystemExit(f"make_rooms_pictures: {one_line(error)}") from error


if __name__ == "__main__":
  main()
