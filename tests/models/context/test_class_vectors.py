"""The class of an image: told, or predicted by CLIP from the image alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, tiny
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.models import parameters
from vpd_jax.models.backbones.clip_image import ImageSizes, pixels
from vpd_jax.models.context import class_vectors
from vpd_jax.models.context.class_vectors import PredictedClass
from vpd_jax.models.initializers import InitKeys

SIZES = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "image_size": 28, "patch": 14, "projection": 8}
KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}
COLORS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (255, 255, 0)])[:, None, None]
IMAGES = (COLORS * 0.9 + fill.integers("images", (6, 40, 56, 3), 25, 0)).astype(np.uint8)


@pytest.fixture(scope="module")
def predictor():
  """Described, with made-up values, and its answers for six images."""
  parts = parameters.describe(lambda: class_vectors.ClassPredictor(ImageSizes(**SIZES), 27, **KINDS, rngs=InitKeys(0)))
  named = tiny.filled(parts.shapes)

  def run(named, image):
    model = parts.merge(named)
    return model(image), model.image_encoder(pixels(image, 28, dtype=jnp.float32)).embeds

  run = jax.jit(run)
  _, embeds = run(named, jnp.asarray(IMAGES))
  shared = np.asarray(embeds).mean(axis=0)
  names = named["names"] - np.outer(named["names"] @ shared, shared) / (
    shared @ shared
  )  # what images differ in decides
  named["names"] = (names / np.linalg.norm(names, axis=1, keepdims=True)).astype(np.float32)
  return parts, named, *run(named, jnp.asarray(IMAGES))


def test_the_class_is_the_name_nearest_in_direction(predictor):
  _, named, found, embeds = predictor
  embeds, names = np.asarray(embeds, np.float64), named["names"].astype(np.float64)
  cosine = [[e @ n / np.linalg.norm(e) for n in names] for e in embeds]  # names of one length, as they are made
  assert found.dtype == jnp.int32 and found.tolist() == [int(np.argmax(row)) for row in cosine]
  assert len(set(found.tolist())) > 1


def test_nothing_of_it_is_trained(predictor):
  parts, *_ = predictor
  assert not parts.params and not parts.stats and "names" in parts.buffers


def vpd_config(prompt):
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.method.prompt = prompt
  config.backbone.image = dict(SIZES)
  return config.lock()


@pytest.fixture(scope="module")
def vpd():
  exp = experiment.assemble(vpd_config("predicted"))
  return exp, tiny.filled(exp.spec.shapes)


def test_a_predicted_class_needs_no_label(vpd):
  exp, _ = vpd
  assert exp.keys == ("image", "depth") and not exp.method.needs
  told = experiment.assemble(vpd_config("scene_class"))
  assert told.method.needs == {"class_id"}
  more = exp.spec.shapes.keys() - told.spec.shapes.keys()
  assert more and all(name.startswith("method/class_predictor/") for name in more) and more <= exp.spec.buffers
  assert exp.groups == told.groups  # nothing more is trained


def test_what_is_told_goes_before_what_is_predicted(vpd):
  exp, named = vpd

  def run(named, images, told):
    method = exp.spec.merge(named).method
    predicted = method.context.class_ids({"image": images})
    batch = {"image": images, "class_id": told}
    return predicted, method.context.class_ids(batch), method.class_predictor(images), method.context(batch)

  told = jnp.asarray([-1, 4, -1, 26, 0, -1], jnp.int32)
  predicted, mixed, alone, context = jax.jit(run)(named, jnp.asarray(IMAGES), told)
  np.testing.assert_array_equal(predicted, alone)
  np.testing.assert_array_equal(mixed, np.where(told < 0, predicted, told))
  assert len(set(mixed.tolist())) > 3 and context.shape == (6, 1, 16)


def test_the_network_attends_to_the_predicted_class(vpd, monkeypatch):
  exp, named = vpd
  seen = {}
  original = PredictedClass.class_ids
  monkeypatch.setattr(PredictedClass, "class_ids", lambda self, batch: seen.setdefault("ids", original(self, batch)))
  jax.eval_shape(lambda n, b: exp.spec.merge(n)(b, training=False), named, {"image": IMAGES})
  assert seen["ids"].shape == (6,) and seen["ids"].dtype == jnp.int32


def test_an_unknown_prompt_lists_the_known():
  with pytest.raises(ValueError, match=r"method.prompt='told' is unknown to vpd; choose one of \('scene_class', 'pred"):
    experiment.assemble(vpd_config("told"))
