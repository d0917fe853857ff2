"""Images and videos of rooms: what is written, and what is refused in a line."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers import loaded_scripts
from vpd_jax.data.datasets import rooms


@pytest.fixture(scope="module")
def script():
  return loaded_scripts.load("scripts/make_rooms_pictures.py")


def run(script, monkeypatch, folder, *arguments):
  monkeypatch.setattr("sys.argv", ["make_rooms_pictures.py", f"--output={folder}", *arguments])
  script.main()


def test_images_are_those_of_the_evaluation(script, monkeypatch, tmp_path, capsys):
  run(script, monkeypatch, tmp_path / "out", "--count=2", "--size", "48", "64")
  files = sorted((tmp_path / "out").iterdir())
  assert capsys.readouterr().out.splitlines() == [str(file) for file in files] and len(files) == 2
  for index, file in enumerate(files):
    room = rooms.draw(0, "eval", index, (48, 64))
    assert file.name == f"room_{index:02d}_{room.scene}.png"
    np.testing.assert_array_equal(np.asarray(Image.open(file)), room.image)


def test_what_cannot_be_drawn_is_one_line(script, monkeypatch, tmp_path, capsys):
  with pytest.raises(SystemExit, match="2"):
    run(script, monkeypatch, tmp_path / "out", "--count=0")
  assert "--count=0 must be at least 1; see --help" in capsys.readouterr().err
  with pytest.raises(SystemExit, match=r"^make_rooms_pictures: --output='gs://bucket/out' is in a bucket"):
    run(script, monkeypatch, "gs://bucket/out", "--count=1")
  with pytest.raises(SystemExit, match="2"):
    run(script, monkeypatch, tmp_path / "out", "--frames=4", "--size", "47", "64")
  assert "--size 47 64: a video needs even sides; see --help" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
