"""The contact sheet: where its pictures lie, what it refuses."""

import types

import numpy as np
import pytest

from tests.helpers import loaded_scripts
from vpd_jax.tasks import drawing


@pytest.fixture(scope="module")
def script():
  return loaded_scripts.load("scripts/contact_sheet.py")


def test_every_picture_has_its_place_below_its_title(script):
  pictures = [[np.full((8, 10, 3), 10 * row + column, np.uint8) for column in range(4)] for row in range(2)]
  found = script.sheet([(["a", "b", "c", "d"], pictures), (["e", "f", "g", "h"], pictures)], scale=2)
  height, width = 2 * 8 + script.MARGIN, 2 * 10 + script.MARGIN
  title = len(drawing.text_line("", width))
  for part in range(2):
    top = part * (title + 2 * height) + title
    assert (found[top - title : top] < 128).any()
    for row, column in np.ndindex(2, 4):
      y, x = top + row * height, script.MARGIN // 2 + column * width
      assert (found[y : y + 16, x : x + 20] == 10 * row + column).all()


def test_unknown_depth_has_no_error_and_wrong_classes_are_red(script):
  truth, depth = np.float32([[0, 2], [3, 4]]), np.float32([[9, 2], [2, 4]])
  _, _, _, error = script._depth(np.zeros((2, 2, 3), np.uint8), truth, depth)
  assert error[0, 0].tolist() == [128] * 3 and (error[0, 1] == error[1, 1]).all() and (error[1, 0] > error[0, 1]).any()
  wrong = script._wrong(np.int32([[1, 2]]), np.int32([[1, 3]]))
  assert wrong.tolist() == [[[*script.RIGHT], [*script.WRONG]]]


def test_a_folder_that_is_no_run_is_refused(script, monkeypatch, tmp_path):
  monkeypatch.setattr("sys.argv", ["contact_sheet", "--workdirs", str(tmp_path), f"--output={tmp_path}/sheet.png"])
  with pytest.raises(SystemExit, match="holds no checkpoint; give the workdir of a run"):
    script.main()
  assert not (tmp_path / "sheet.png").exists()


def test_a_sheet_has_at_least_one_room(script, monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["contact_sheet", "--workdirs", "run", "--output=sheet.png", "--count=0"])
  with pytest.raises(SystemExit, match="2"):
    script.main()
  assert capsys.readouterr().err.endswith(": --count=0 and --scale=2 must be at least 1; see --help\n")


def test_a_method_that_reads_sentences_gets_those_of_the_rooms(script, monkeypatch):
  image, depth = np.zeros((4, 6, 3), np.uint8), np.ones((4, 6), np.float32)
  examples = [{"image": image, "depth": depth, "sentence": f"room {i}"} for i in range(3)]
  asked = []
  name = lambda name: types.SimpleNamespace(name=name)
  predictor = types.SimpleNamespace(
    config=types.SimpleNamespace(data=name("rooms"), task=name("depth")),
    experiment=types.SimpleNamespace(task=None),
    takes_class=False,
    takes_sentence=True,
    predict=lambda images, classes, sentences: asked.extend(sentences) or [{"depth": depth} for _ in images],
  )
  monkeypatch.setattr(script.Predictor, "load", lambda **_: predictor)
  data = types.SimpleNamespace(source=lambda split: examples)
  monkeypatch.setattr(script.experiment, "dataset", lambda config, exp: data)
  assert len(script.rows("run", 2)[1]) == 2 and asked == ["room 0", "room 1"]
