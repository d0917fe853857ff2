"""The Python entry point: what it refuses. What it predicts is tested with the released checkpoints."""

import types

import numpy as np
import pytest

import vpd_jax
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

  def stop(config, product, mesh, source, *, complete):
    asked.update(source=source, complete=complete)
    raise InterruptedError

  monkeypatch.setattr(initialize, "weights_on_mesh", stop)
  monkeypatch.setattr(initialize, "with_backbone_sizes", lambda config, source: config)
  config = loader.load("configs/nyu_depth.py:tiny").unlock()
  config.init.pretrained = "sd.safetensors"
  with pytest.raises(InterruptedError):
    vpd_jax.Predictor.load(config.lock(), random_init=random_init)
  assert asked == {"source": "", "complete": not random_init}


def known(class_id, *, takes, count=2):
  """`_known` of a predictor with 27 classes and no network."""
  made = object.__new__(predictor.Predictor)
  method = types.SimpleNamespace(needs={"class_id"} if takes else set(), prepare_inputs=set())
  made.product = types.SimpleNamespace(
    method=method, task=types.SimpleNamespace(test_time_protocol="windows"), classes=range(27)
  )
  made.config = types.SimpleNamespace(method=types.SimpleNamespace(name="a"), task=types.SimpleNamespace(name="b"))
  made._classify = None
  return made._known(count, class_id, None, None)


@pytest.mark.parametrize("given", [0, -1, [1, 2], np.int64(3)])
def test_a_class_has_an_effect_or_is_refused(given):
  ids = [own["class_id"] for own in known(given, takes=True)]
  assert ids == np.broadcast_to(given, 2).tolist() and {type(i) for i in ids} == {np.int32}
  with pytest.raises(ValueError, match="class_id has no effect on method 'a' and task 'b'; leave it out"):
    known(given, takes=False)
  assert known(None, takes=False) == [{}, {}] and known(None, takes=True, count=0) == []


@pytest.mark.parametrize("given", [[1, 2, 3], 1.5, "1", [[1, 2]]])
def test_classes_are_one_or_one_each(given):
  with pytest.raises(ValueError, match="give one int, or one for each of 2 images"):
    known(given, takes=True)
