"""The script that makes the weights "rooms/small": its prompts, its rooms, its file; no training."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import loaded_scripts
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert import load


@pytest.fixture(scope="module")
def script():
  return loaded_scripts.load("scripts/pretrain_rooms.py")


def test_half_of_the_rows_attend_to_their_scene_and_half_to_all_classes(script):
  rng = np.random.default_rng(0)
  scenes, classes = (rng.standard_normal((count, 4)).astype(np.float32) for count in (3, 5))
  tokens = script.EitherPrompt(scenes, classes)({"class_id": jnp.array([2, 2, 0, 1])})
  for row, wanted in enumerate((scenes[[2] * 5], classes, scenes[[0] * 5], classes)):
    np.testing.assert_array_equal(tokens[row], wanted)


def test_no_room_is_seen_twice_and_none_is_one_of_the_configs(script):
  first, second = script.batch(0, 2), script.batch(1, 2)
  images = [*first["image"], *second["image"]]
  assert len({image.tobytes() for image in images}) == 4
  assert all(np.array_equal(first[name], script.batch(0, 2)[name]) for name in first)
  assert loader.load("configs/rooms.py:depth,small_scratch").data.seed != script.SEED


def test_what_is_written_fills_the_backbone_of_every_kind_of_model(script, tmp_path):
  path = str(tmp_path / "weights.safetensors")
  exp = script.assemble(1e-3)
  script.export(exp.spec.initialize(exp.spec.paths), path)
  for words in ("depth,small_scratch", "segmentation,small_scratch", "depth,small_scratch,meta_prompts"):
    shapes = experiment.model_shapes(loader.load(f"configs/rooms.py:{words}"))
    named, _ = load.load_pretrained(path, shapes)
    assert {name for name in shapes if name.startswith(("method/unet/", "method/vae/"))} == named.keys()


def test_numbers_that_train_nothing_are_refused(script, monkeypatch):
  monkeypatch.setattr("sys.argv", ["pretrain_rooms", "--workdir=nowhere", "--steps=0", "--lr=-1"])
  with pytest.raises(SystemExit, match=r"--steps=0, --lr=-1.0 must be above 0"):
    script.main()
