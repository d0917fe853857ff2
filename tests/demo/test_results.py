"""What the page does, without the page: files, colors, the cloud and messages."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vpd_jax
from tests.helpers import one_convolution
from vpd_jax.config import loader
from vpd_jax.demo import results
from vpd_jax.demo.results import Inputs
from vpd_jax.prediction import predict_folder


@pytest.fixture(scope="module")
def predictor():
  with one_convolution.known():
    yield vpd_jax.Predictor.load(one_convolution.rooms(), random_init=True)


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / "photo.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(path)
  return str(path)


def test_files_are_those_of_predict(tmp_path, predictor, photo, monkeypatch):
  found = results.predict(predictor, photo, tmp_path / "user", Inputs(ply=True, focal=80.0))
  monkeypatch.setattr(predict_folder.Predictor, "load", lambda *_, **__: predictor)
  config = one_convolution.rooms(**{"init.pretrained": "weights.pth"})
  folders = {"source": str(tmp_path), "output": str(tmp_path / "out")}
  predict_folder.run(config, "", **folders, ply=True, focal=80.0)
  expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  assert {path.name: path.read_bytes() for path in found.files} == expected and len(expected) == 5
  assert found.shown.name == "photo.color.png" and found.facts == json.loads(expected["photo.json"])


def test_users_with_pictures_of_one_name_have_folders_of_their_own(tmp_path, predictor, photo):
  first, second = (results.predict(predictor, photo, tmp_path / "user", Inputs()) for _ in range(2))
  assert first.shown != second.shown and first.shown.exists() and first.cloud is None


def test_the_pointer_reads_the_depth_of_its_pixel(tmp_path):
  depth = np.full((4, 6), np.nan, np.float32)
  depth[1, 5] = 2.345
  np.save(tmp_path / "a.npy", depth)
  assert results.depth_at(tmp_path / "a.npy", 5, 1) == "**2.35 m** at column 5, row 1"
  for column, row in ((0, 0), (6, 1), (5, 4)):  # not known, and beyond: on the bar
    assert results.depth_at(tmp_path / "a.npy", column, row) == "no depth here"


def test_the_ends_of_the_colors_move(tmp_path, predictor):
  np.save(tmp_path / "a.npy", np.tile(np.float32([1.0, 2.0, 3.0]), (60, 1)))
  whole, part = (results.recolored(predictor, tmp_path / "a.npy", 1, end) for end in (3, 2))
  assert (whole[0, 2] == part[0, 1]).all() and not (whole[0, 1] == part[0, 1]).all()
  assert whole.shape[0] == 60 and whole.shape[1] > 3  # with the bar
  with pytest.raises(ValueError, match="colors from 3 m to 3 m are no range; move the first below the second"):
    results.recolored(predictor, tmp_path / "a.npy", 3, 3)


def test_the_cloud_of_the_browser_is_thinned_and_has_y_up(tmp_path, monkeypatch):
  monkeypatch.setattr(results, "MAX_POINTS", 6)
  depth, image = np.full((4, 6), 2.0, np.float32), np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
  raw = results._small_cloud(tmp_path / "a.ply", depth, image, 2.0).read_bytes()
  header, body = raw.split(b"end_header\n")
  assert b"comment x right, y up, z against" in header
  places = np.frombuffer(body, [("place", "<f4", 3), ("color", "u1", 3)])
  assert len(places) == 6
  np.testing.assert_allclose(places["place"][0], [-2.0, 1.0, -2.0])  # the upper left: its middle is at (-1, -1/2) steps
  assert (places["color"][1] == image[0, 2]).all()


def test_boxes_are_read_one_a_line():
  assert results.read_boxes(" 20, 10, 80.5, 200\n\n-1 0 3 4 ") == [[20, 10, 80.5, 200], [-1, 0, 3, 4]]
  with pytest.raises(ValueError, match=r"^the box '1, 2, 3' is not x, y, width and height in pixels"):
    results.read_boxes("1, 2, 3")


def test_a_large_picture_is_previewed_smaller():
  assert results.preview(np.zeros((2048, 3, 3), np.uint8)).shape == (1024, 2, 3)
  assert results.preview(np.zeros((64, 96, 3), np.uint8)).shape == (64, 96, 3)


@pytest.mark.parametrize(
  "content, limit, message",
  [
    (None, 0, "^there is no picture yet"),
    (b"words", 0, "^a.png "),
    ("cut", 0, "^a.png "),
    ("whole", 100, "^a.png has 96 x 64 pixels; the page takes up to 0.0001 million"),
  ],
)
def test_what_is_no_picture_is_one_line(tmp_path, photo, monkeypatch, content, limit, message):
  path = tmp_path / "a.png"
  whole = Path(photo).read_bytes()
  path.write_bytes({"cut": whole[: len(whole) // 2], "whole": whole}.get(content, content or b""))
  if limit:
    monkeypatch.setattr(results, "MAX_PIXELS", limit)
  with pytest.raises(ValueError, match=message) as caught:
    results.read_picture(None if content is None else str(path))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("focal", [-3.0, float("inf")])
def test_a_focal_length_that_is_none_is_refused(tmp_path, predictor, photo, focal):
  with pytest.raises(ValueError, match=r"^the focal length is .* above 0"):
    results.predict(predictor, photo, tmp_path / "user", Inputs(ply=True, focal=focal))
  assert not (tmp_path / "user").exists()


def test_inputs_of_another_task_are_ignored(tmp_path, predictor, photo):
  found = results.predict(predictor, photo, tmp_path / "user", Inputs(attention=True, ply=False, focal=-3.0))
  assert len(found.files) == 4 and found.cloud is None


def test_a_missing_sentence_is_asked_for(tmp_path, predictor, photo, monkeypatch):
  monkeypatch.setattr(type(predictor), "takes_sentence", True)
  with pytest.raises(ValueError, match=r"^the network needs a sentence about the picture"):
    results.predict(predictor, photo, tmp_path / "user", Inputs(sentence="  "))


def test_without_a_config_all_tasks_of_the_rooms_are_offered(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  offered = results.networks(None)
  assert tuple(offered) == results.TASKS
  assert all(network.draws and "are random" in network.notice for network in offered.values())


def test_a_config_without_weights_is_refused_unless_it_is_of_the_rooms(tmp_path):
  with pytest.raises(ValueError, match=r"holds no checkpoint and config.init.pretrained is empty"):
    results.networks(loader.load("configs/nyu_depth.py:tiny"), str(tmp_path))
  string = "configs/rooms.py:pose,small_scratch"
  (network,) = results.networks(loader.load(string), str(tmp_path), string).values()
  assert f"--config={string}" in network.notice


def test_a_drawn_room_fits_the_task(tmp_path, predictor, monkeypatch):
  path, caption, _ = results.drawn_room(predictor, tmp_path, 0)
  assert (
    results.read_picture(str(path)).shape == (480, 720, 3) and caption.startswith(("a ", "an ")) and " with " in caption
  )
  with monkeypatch.context() as patch:
    patch.setattr(predictor, "config", loader.changed(predictor.config, {"task.name": "referring"}))
    assert results.drawn_room(predictor, tmp_path, 0)[1].startswith("the ")
  monkeypatch.setattr(type(predictor), "takes_boxes", True)
  _, _, boxes = results.drawn_room(predictor, tmp_path, 0)
  assert len(results.read_boxes(boxes)) == 1
