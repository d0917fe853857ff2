"""Depth of a video: length, rate and the one scale of colors."""

import json

import cv2
import numpy as np
import pytest

import vpd_jax
from tests.helpers import one_convolution
from vpd_jax.config import loader
from vpd_jax.prediction import predict_folder, predict_video
from vpd_jax.tasks import colormaps


def write_video(path, frames, rate=12.5):
  height, width = frames[0].shape[:2]
  writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
  for frame in frames:
    writer.write(frame)
  writer.release()
  return path


def read_video(path):
  """Frames uint8 [N, H, W, 3], RGB, and rate."""
  video, frames = cv2.VideoCapture(str(path)), []
  while (read := video.read())[0]:
    frames.append(read[1][..., ::-1])
  return np.stack(frames), video.get(cv2.CAP_PROP_FPS)


@pytest.fixture
def config(monkeypatch):
  """A config that any weights fill: those of one random network."""
  with one_convolution.known():
    predictor = vpd_jax.Predictor.load(one_convolution.rooms(), random_init=True)
    monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: predictor)
    yield one_convolution.rooms(**{"init.pretrained": "weights.pth"})


def test_a_video_becomes_one_of_equal_length_and_rate(tmp_path, config, capsys):
  frames = [np.full((64, 96, 3), level, np.uint8) for level in (0, 60, 120, 180, 240, 30)]
  clip = write_video(tmp_path / "clip.mp4", frames)
  assert predict_video.run(config, "", source=str(clip), output=str(tmp_path / "out")) == 6
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.depth.json", "clip.depth.mp4"]
  facts = json.loads((tmp_path / "out" / "clip.depth.json").read_text())
  shown, rate = read_video(tmp_path / "out" / "clip.depth.mp4")
  assert shown.shape == (6, 64, 96, 3) and rate == facts["frames_per_second"] == 12.5 and facts["frames"] == 6
  assert capsys.readouterr().out.splitlines()[-1] == f"6 frames written to {tmp_path / 'out' / 'clip'}.depth.mp4"
  # One scale for all: the ends are those of the whole clip.
  predictor = predict_folder.Predictor.load()
  depths = np.stack([found["depth"] for found in predictor.predict(list(read_video(clip)[0]))])
  np.testing.assert_allclose((facts["first_color"], facts["last_color"]), (depths.min(), depths.max()), rtol=1e-6)
  expected = np.stack([colormaps.color_depth(d, depths.max(), min_depth=depths.min()) for d in depths])
  difference = np.abs(shown.astype(int).mean((1, 2)) - expected.mean((1, 2)))
  assert difference.max() < 12, "beyond what the codec loses"
  assert np.ptp(expected.mean((1, 2)), axis=0).max() > 24, "the frames differ by more"


def test_an_odd_row_and_column_are_left_out(tmp_path, config):
  clip = write_video(tmp_path / "clip.avi", [np.zeros((64, 96, 3), np.uint8)] * 2)
  writer = predict_video.open_writer(tmp_path / "odd.mp4", 5.0, (63, 95))
  writer.write(np.zeros((62, 94, 3), np.uint8))
  writer.release()
  assert read_video(tmp_path / "odd.mp4")[0].shape == (1, 62, 94, 3)
  assert predict_video.is_video(str(clip)) and not predict_video.is_video(str(tmp_path))


@pytest.mark.parametrize(
  "content, options, message",
  [
    (b"", {}, "clip.mp4' holds no frame that can be read; copy it again"),
    (None, {"output": ""}, "needs a place for the results: give --output=FOLDER"),
    (None, {"sentence": "a car"}, "^--sentence='a car' has no effect: method 'one_convolution'"),
  ],
)
def test_what_cannot_be_predicted_is_one_line(tmp_path, config, content, options, message):
  clip = tmp_path / "clip.mp4"
  if content is None:
    write_video(clip, [np.zeros((64, 96, 3), np.uint8)])
  else:
    clip.write_bytes(content)
  given = {"source": str(clip), "output": str(tmp_path / "out")} | options
  with pytest.raises(ValueError, match=message) as caught:
    predict_video.run(config, "", **given)
  assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_method_that_reads_sentences_needs_one(tmp_path, config, monkeypatch):
  monkeypatch.setattr(one_convolution.OneConvolution, "prepare_inputs", frozenset({"sentence"}))
  clip = write_video(tmp_path / "clip.mp4", [np.zeros((64, 96, 3), np.uint8)])
  with pytest.raises(
    ValueError, match=r'needs a sentence about each image: give --sentence="the red car" about all\.$'
  ):
    predict_video.run(config, "", source=str(clip), output=str(tmp_path / "out"))


def test_a_task_without_depth_takes_no_video(tmp_path, config, monkeypatch):
  predictor = predict_folder.Predictor.load()
  monkeypatch.setattr(predictor.experiment.task, "measures_depth", False)
  clip = write_video(tmp_path / "clip.mp4", [np.zeros((64, 96, 3), np.uint8)])
  changed = loader.changed(config, {"task.name": "pose"})
  with pytest.raises(ValueError, match=r"clip\.mp4' is a video, and task 'pose' predicts no depth; give a folder"):
    predict_video.run(changed, "", source=str(clip), output=str(tmp_path / "out"))


@pytest.mark.parametrize("rate", [23.976023976, 59.94005994, 119.88011988, 239.934142, 959.04])
def test_rates_of_cameras_can_be_written(tmp_path, rate):
  """MPEG-4 has no fraction for 239.934 as OpenCV makes it."""
  writer = predict_video.open_writer(tmp_path / "fast.mp4", rate, (64, 96))
  writer.write(np.zeros((64, 96, 3), np.uint8))
  writer.release()
  assert abs(read_video(tmp_path / "fast.mp4")[1] - rate) < rate * 5e-5
