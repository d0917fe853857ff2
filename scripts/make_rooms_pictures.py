"""Writes images of procedural rooms that no training has seen, as input for --mode=predict.

python scripts/make_rooms_pictures.py --output=runs/quickstart/pictures
"""

import argparse
import pathlib

import cv2

from vpd_jax.data.datasets import rooms


def main() -> None:
  parser = argparse.ArgumentParser(description="Write images of procedural rooms, as input for --mode=predict.")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="folder, made where it does not exist")
  parser.add_argument("--count", type=int, default=4, help="images")
  parser.add_argument("--size", type=int, nargs=2, default=(192, 256), metavar=("HEIGHT", "WIDTH"))
  options = parser.parse_args()
  data = rooms.Rooms(size=tuple(options.size), crop=tuple(options.size), eval_count=options.count)
  source = data.source("eval")
  options.output.mkdir(parents=True, exist_ok=True)
  for index in range(len(source)):
    example = source[index]
    file = options.output / f"room_{index:02d}_{data.classes[int(example['class_id'])]}.png"
    cv2.imwrite(str(file), example["image"][..., ::-1])
    print(file)


if __name__ == "__main__":
  main()
