"""The Python entry point: what it refuses. What it predicts is tested with the released checkpoints."""

import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vpd_jax
from tests.helpers import one_convolution
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.prediction import predictor


def test_no_weights_are_no_network_without_a_word():
  config = loader.load("configs/nyu_depth.py:tiny")
  with pytest.raises(ValueError, match=r"Predictor\.load has no weights: give weights=.*random_init=True") as caught:
    vpd_jax.Predictor.load(config)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("random_init", [True, False])
def test_weights_must_fill_the_network_unless_the_rest_is_to_be_random(monkeypatch, random_init):
  asked = {}

  def stop(config, exp, mesh, source, *, complete):
    asked.update(source=source, complete=complete)
    raise InterruptedError

  monkeypatch.setattr(initialize, "weights_on_mesh", stop)
  monkeypatch.setattr(initialize, "with_backbone_sizes", lambda config, source: config)
  config = loader.load("configs/nyu_depth.py:tiny").unlock()
  config.init.pretrained = "sd.safetensors"
  with pytest.raises(InterruptedError):
    vpd_jax.Predictor.load(config.lock(), random_init=random_init)
  assert asked == {"source": "", "complete": not random_init}


def test_a_command_leaves_the_weights_of_the_config_to_the_config(tmp_path, monkeypatch):
  """Given as an argument, they would be those of a run, which has merged its LoRA file already."""
  config = loader.changed(one_convolution.rooms(), {"init.pretrained": "weights.pth"})
  assert predictor.trained_weights(config, str(tmp_path)) == ""
  monkeypatch.setattr(predictor, "is_workdir", lambda path: True)
  assert predictor.trained_weights(config, str(tmp_path)) == str(tmp_path)


def known(class_id, *, takes, count=2):
  """`_known` of a predictor with 27 classes and no network."""
  made = object.__new__(predictor.Predictor)
  method = types.SimpleNamespace(needs={"class_id"} if takes else set(), prepare_inputs=set())
  made.experiment = types.SimpleNamespace(
    method=method,
    task=types.SimpleNamespace(test_time_protocol="windows"),
    classes=tuple(f"room_{i}" for i in range(27)),
  )
  made.config = types.SimpleNamespace(method=types.SimpleNamespace(name="a"), task=types.SimpleNamespace(name="b"))
  made._classify = None
  return made._inputs(count, class_id, None, None)


@pytest.mark.parametrize("given", [0, -1, [1, 2], np.int64(3)])
def test_a_class_has_an_effect_or_is_refused(given):
  ids = [own["class_id"] for own in known(given, takes=True)]
  assert ids == np.broadcast_to(given, 2).tolist() and {type(i) for i in ids} == {np.int32}
  with pytest.raises(ValueError, match="class_id has no effect on method 'a' and task 'b'; leave it out"):
    known(given, takes=False)
  assert known(None, takes=False) == [{}, {}] and known(None, takes=True, count=0) == []


@pytest.mark.parametrize("given", [[1, 2, 3], 1.5, [[1, 2]]])
def test_classes_are_one_or_one_each(given):
  with pytest.raises(ValueError, match="give one int, or one for each of 2 images"):
    known(given, takes=True)


@pytest.mark.parametrize(
  "given, ids",
  [("room 3", [3, 3]), (["room_0", "Room 26"], [0, 26]), (["room_1", -1], [1, -1]), ([None, "room_2"], [-1, 2])],
)
def test_classes_may_be_named(given, ids):
  assert [own["class_id"] for own in known(given, takes=True)] == ids
  with pytest.raises(ValueError, match=r"^class 'kitchen' is unknown; choose one of room_0, room_1, "):
    known("kitchen", takes=True)
  with pytest.raises(ValueError, match=r"^class 'rom_7' is unknown; did you mean room_7\? Known are room_0, "):
    known("rom_7", takes=True)


@pytest.fixture(scope="module")
def small():
  with one_convolution.known():
    yield vpd_jax.Predictor.load(one_convolution.rooms(), random_init=True)


IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_images_are_read_a_few_at_a_time(small, tmp_path):
  """Also of an iterator, whose later images may be bad or many."""
  count = max(predictor.BATCH_SIZE, small.config.eval.batch_size)
  images = iter([IMAGE] * count + [tmp_path / "none.png"])
  results = small.predict_each(images)
  found = [next(results)["depth"] for _ in range(count)]
  np.testing.assert_array_equal(found, [small.predict(IMAGE)["depth"]] * count)
  with pytest.raises(ValueError, match=r"none\.png"):
    next(results)
  np.testing.assert_array_equal(small.predict({"a": IMAGE}.values())[0]["depth"], found[0])


def test_an_iterator_without_an_end_is_predicted_as_far_as_wanted(small):
  results = small.predict_each(itertools.repeat(IMAGE))
  np.testing.assert_array_equal(next(results)["depth"], small.predict(IMAGE)["depth"])


def test_a_damaged_file_that_pillow_has_opened_is_one_line(small, tmp_path):
  Image.fromarray(IMAGE).save(tmp_path / "whole.png")
  content = (tmp_path / "whole.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
  with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match=r"^an image ") as caught:
    small.predict(image)
  assert "\n" not in str(caught.value)


GRAY = np.repeat(IMAGE[..., :1], 3, axis=-1)


def test_a_predictor_is_shown_in_a_line(small):
  shown = repr(small)
  assert "\n" not in shown and len(shown) < 300
  assert "method 'one_convolution', task 'depth', data set 'rooms'" in shown and "M parameters" in shown


@pytest.mark.parametrize(
  "form, same",
  [
    (lambda folder: Image.fromarray(IMAGE), IMAGE),
    (lambda folder: IMAGE.astype(np.int64), IMAGE),
    (lambda folder: IMAGE.astype(np.float64) / 255, IMAGE),
    (lambda folder: np.concatenate([IMAGE, IMAGE[..., :1]], axis=-1), IMAGE),
    (lambda folder: IMAGE[..., 0], GRAY),
    (lambda folder: IMAGE[..., :1], GRAY),
    (lambda folder: IMAGE[..., 0].astype(np.uint16) * 257, GRAY),
    (lambda folder: Image.fromarray(IMAGE[..., 0]), GRAY),
    (lambda folder: Image.fromarray(IMAGE[..., 0].astype(np.uint16) * 257), GRAY),
    (lambda folder: jnp.asarray(IMAGE), IMAGE),
    (lambda folder: save(folder / "a.png", IMAGE), IMAGE),
    (lambda folder: str(save(folder / "a.png", IMAGE)), IMAGE),
    (lambda folder: save(folder / "a.png", IMAGE[..., 0]), GRAY),
  ],
)
def test_an_image_may_have_any_usual_form(small, tmp_path, form, same):
  image, (expected,) = form(tmp_path), small.predict([same])
  (listed,), alone = small.predict([image]), small.predict(image)
  np.testing.assert_allclose(alone["depth"], expected["depth"], atol=1e-6)
  np.testing.assert_array_equal(alone["depth"], listed["depth"])
  np.testing.assert_allclose(small.forward(image)["depth"], small.forward(same[None])["depth"], atol=1e-6)


def save(path, image):
  Image.fromarray(image).save(path)
  return path


def test_arrays_with_four_axes_and_lists_are_several_images(small):
  results = small.predict(np.stack([IMAGE, GRAY]))
  assert len(results) == 2 and small.forward([IMAGE, GRAY, IMAGE])["depth"].shape == (3, 64, 64)
  # XLA on CPU sums in another order for another batch size, on processors without AVX-512 even here.
  np.testing.assert_allclose(results[1]["depth"], small.predict((GRAY,))[0]["depth"], rtol=1e-6)


@pytest.mark.parametrize(
  "image, message",
  [
    (
      IMAGE.transpose(2, 0, 1),
      r"shape \(3, 64, 64\); give .*; its channels come first, which np\.moveaxis\(image, 0, -1\)",
    ),
    (IMAGE.astype(np.float32), r"float32 has values up to 255; give float in \[0, 1\]"),
    (IMAGE / 127.5 - 1, r"float64 has values down to -1; give float in \[0, 1\]"),
    (np.full((64, 64, 3), np.nan, np.float32), r"float32 has values up to nan; give float in \[0, 1\]"),
    (IMAGE.astype(np.int32) * 10, r"dtype int32 and values of 0 to 2550; give uint8"),
    (IMAGE[..., :2], r"shape \(64, 64, 2\); give"),
    (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\); give"),
    (np.array("a.png"), r"shape \(\); give"),
    ("nowhere/a.png", r"a\.png is not a picture"),
  ],
)
def test_what_is_no_image_is_refused_in_a_line(small, image, message):
  for call in (small.predict, small.forward):
    with pytest.raises(ValueError, match=message) as caught:
      call(image)
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes_are_for_predict(small):
  with pytest.raises(ValueError, match=r"^images of sizes \[\(32, 64\), \(64, 64\)\] make no batch; .*use predict"):
    small.forward([IMAGE, IMAGE[:32]])
