"""--mode=predict for a video: writes its depth as a video of equal length and rate, with one color scale."""

import itertools
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from ml_collections import ConfigDict

from vpd_jax.errors import UserError
from vpd_jax.files import atomic
from vpd_jax.monitoring import progress
from vpd_jax.prediction.predict_folder import check_flags, check_output, say_origin
from vpd_jax.prediction.predictor import BATCH_SIZE, Predictor, trained_weights
from vpd_jax.types import DepthTask

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
CODEC = "mp4v"  # MPEG-4 Part 2, which every OpenCV build can write


def is_video(source: str) -> bool:
  """Whether --input names a video, by its suffix."""
  path = Path(source).expanduser()
  return path.suffix.lower() in SUFFIXES and path.is_file()


def run(config: ConfigDict, workdir: str, *, source: str, output: str, class_name: str = "", sentence: str = "") -> int:
  """Writes NAME.depth.mp4 and NAME.depth.json of a video NAME, and returns the number of its frames.

  Colors range from the smallest to the largest depth of the video, from near (red) to far (blue). Frames are predicted
  independently. The last row or column of odd sizes is dropped, because the codec requires even sizes.

  Args:
    config: of the run.
    workdir: whose checkpoint is read.
    source: the video, in one of SUFFIXES.
    output: a folder.
    class_name, sentence: of all frames, as for predict_folder.run.

  Raises:
    ValueError: for a video that cannot be read, has no frames or states no frame rate, a task that does not predict
      depth, a class or sentence without effect, and a folder that cannot be written to.
  """
  path = Path(source).expanduser()
  target = check_output(output)
  rate, count = _opened(path)
  predictor = Predictor.load(config, weights=trained_weights(config, workdir))
  check_flags(config, predictor, {"class": class_name, "sentence": sentence}, False, False)
  if not predictor.experiment.task.measures_depth:
    raise UserError(f"--input={source!r} is a video, and task {config.task.name!r} predicts no depth; give a folder.")
  say_origin(predictor, class_name)
  task, class_id = cast(DepthTask, predictor.experiment.task), predictor.class_id(class_name) if class_name else None
  target.mkdir(parents=True, exist_ok=True)
  frames, frame_count, nearest, farthest, size = _frames(path), 0, math.inf, -math.inf, (0, 0)
  with tempfile.TemporaryFile(dir=target) as buffer:  # a minute of full HD would not fit into memory
    with progress.phase("predict", count, "frames") as predicted:
      while batch := list(itertools.islice(frames, BATCH_SIZE)):
        inputs = {"sentences": [sentence] * len(batch)} if predictor.takes_sentence else {}
        for result in predictor.predict_each(batch, class_id, **inputs):
          depth = result[task.result]
          valid = depth[np.isfinite(depth) & (depth > 0)]
          nearest, farthest = min(nearest, valid.min(initial=nearest)), max(farthest, valid.max(initial=farthest))
          buffer.write(depth.astype(np.float16).tobytes())
          frame_count, size = frame_count + 1, depth.shape
          predicted.advance()
    buffer.seek(0)
    with atomic.beside(target / f"{path.stem}.depth.mp4") as unfinished:
      writer = open_writer(unfinished, rate, size)
      for _ in range(frame_count):
        depth = np.frombuffer(buffer.read(2 * math.prod(size)), np.float16).reshape(size).astype(np.float32)
        colors = task.colored(depth, float(nearest), float(farthest))[: size[0] // 2 * 2, : size[1] // 2 * 2]
        writer.write(np.ascontiguousarray(colors[..., ::-1]))
      writer.release()
  facts = {"source": path.name, "frames": frame_count, "frames_per_second": rate, "size": list(size), "unit": "meter"}
  facts |= {"first_color": float(nearest), "last_color": float(farthest), "class": class_name or None}
  atomic.write_json(target / f"{path.stem}.depth.json", facts)
  if count and frame_count != count:
    progress.write(f"{path.name} states {count} frames, and {frame_count} could be read")
  progress.write(f"{frame_count} frames written to {target / path.stem}.depth.mp4")
  return frame_count


def _opened(path: Path) -> tuple[float, int]:
  """Frames per second and stated number of frames of a video, 0 if it states none.

  Raises:
    ValueError: if it cannot be read, has no frames or states no frame rate.
  """
  if not os.access(path, os.R_OK):
    raise UserError(f"--input={str(path)!r} cannot be read; check its permissions.")
  os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # silences FFmpeg, whose messages say less than ours
  video = cv2.VideoCapture(str(path))
  rate, count = video.get(cv2.CAP_PROP_FPS), max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
  if next(_frames(path), None) is None:
    raise UserError(f"--input={str(path)!r} holds no frame that can be read; copy it again, or give another video.")
  if not (math.isfinite(rate) and rate > 0):
    raise UserError(f"--input={str(path)!r} has no frame rate; give a video that has one.")
  return rate, count


def _frames(path: Path) -> Iterator[np.ndarray]:
  """The frames of a video, uint8 [H, W, 3], RGB, with its rotation applied."""
  video = cv2.VideoCapture(str(path))
  while video.isOpened():
    success, frame = video.read()
    if not success:
      return
    yield np.ascontiguousarray(frame[..., ::-1])


def open_writer(path: Path, rate: float, size: tuple[int, int]) -> cv2.VideoWriter:
  """A writer of BGR frames of `size` = (height, width), without the last row or column of odd sizes.

  Raises:
    ValueError: if the video cannot be written.
  """
  even = size[1] // 2 * 2, size[0] // 2 * 2
  # OpenCV makes a fraction of up to three decimals, and MPEG-4 stores numbers up to 65535.
  rate = round(rate, next(digits for digits in (3, 2, 1, 0) if digits == 0 or rate * 10**digits <= 65535))
  writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*CODEC), rate, even)
  if not writer.isOpened():
    raise UserError(f"a video of {even[0]}x{even[1]} at {rate:g} frames per second cannot be written to {path.parent}.")
  return writer
