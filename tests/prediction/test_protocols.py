"""How many windows go through the network at once, and what the network reads of an image."""

import jax
import numpy as np
import pytest

import vpd_jax
from tests.helpers import one_convolution
from vpd_jax.config import loader
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import protocols


@pytest.mark.parametrize("backend, windows", [("cpu", 1), ("gpu", 8)])
def test_a_cpu_takes_one_window_at_a_time(monkeypatch, backend, windows):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert protocols._batch_size(loader.load("configs/nyu_depth.py")) == windows


def test_the_network_of_poses_reads_the_sentence_of_each_image():
  given, made = [], object.__new__(protocols.TopDownProtocol)
  made._estimator = lambda weights, images, boxes, inputs: given.extend([*map(len, boxes), *inputs]) or []
  rows = [{"tokens": np.int32([1, 2]), "boxes": [[0, 0, 4, 4]] * 2}, {"tokens": np.int32([3, 4])}]
  made((), [np.zeros((8, 8, 3), np.uint8)] * 2, rows)
  assert given[:2] == [2, 1] and [sorted(inputs) for inputs in given[2:]] == [["tokens"]] * 2
  assert [inputs["tokens"].tolist() for inputs in given[2:]] == [[1, 2], [3, 4]]


def test_halves_are_predicted_as_in_the_evaluation():
  words, image = ("flip", "halves:16"), np.random.default_rng(0).random((64, 96, 3), np.float32)
  with one_convolution.known():
    load = lambda **changes: vpd_jax.Predictor.load(one_convolution.rooms(**changes), random_init=True)
    predictor = load(**{"eval.test_time": words, "data.crop": (64, 56)})
    expected = evaluate.make_predict(predictor.experiment, words, "released")(predictor.weights, {"image": image[None]})
    found = predictor.predict([image, image])
    windows = load(**{"eval.test_time": ("flip",)})
  for result in found:
    np.testing.assert_allclose(result["depth"], expected[0], rtol=1e-5)
  assert predictor.input_size == (64, 56) and windows.input_size == (64, 64)
  assert "halves:N" in predictor.preprocessing and "halves" not in windows.preprocessing
