"""EcoDepth against the authors' code in float32: the picture for the classifier, taps, outputs, test-time scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import eco_depth, oracle, tiny
from tests.helpers.vpd_depth import everything, scores_on_nyu
from vpd_jax import experiment
from vpd_jax.evaluation import evaluate
from vpd_jax.models.backbones.vit import LEVELS
from vpd_jax.types import Features

FEATURES = tuple(f"unet.output_blocks.{i}" for i in (11, 7, 4, 1))


@pytest.fixture(scope="module", params=["nyu", "kitti"])
def case(request):
  """Name, golden arrays, experiment, state."""
  config = eco_depth.config(request.param)
  exp = experiment.assemble(config)
  state = tiny.train_state(exp, eco_depth.weights(config))
  return request.param, oracle.golden(f"eco_depth_{request.param}.tiny.npz"), exp, state


@pytest.fixture(scope="module")
def forward(case):
  """Results of the parts under the authors' names, in eval mode, and the depth."""
  name, _, exp, state = case

  @jax.jit
  def run(named, batch):
    model = exp.spec.merge(*named)
    context = model.method.context
    seen = context.picture(batch["image"])
    states = context.vit_model(jnp.asarray(LEVELS)[seen])
    taps = {"vit.image": seen, "vit.pixel_values": jnp.asarray(LEVELS)[seen], "vit.embeddings": states.hidden[0]}
    taps |= {f"vit.layer.{i}": x for i, x in enumerate(states.hidden[1:])}
    taps |= {"vit.layernorm": states.last, "vit.logits": states.logits}
    features = model.method(batch, training=False)
    taps |= {"cide.context": features.context, **dict(zip(FEATURES, features.maps, strict=True))}
    fused = model.neck(features)
    taps["out_layer"] = fused.maps[0]
    padded = model.head(Features(fused.maps, fused.context, (128, 192)), training=False)["depth"]
    return taps, padded, model.head(fused, training=False)["depth"]

  return run(everything(state), eco_depth.batch_of(name))


def stored(arrays, key):
  return key in arrays or f"{key}@stride" in arrays


def test_the_classifier_sees_the_authors_bytes(forward, case):
  np.testing.assert_array_equal(oracle.nchw(forward[0]["vit.image"]), case[1]["tap/vit.image"])


def test_taps_are_the_authors(forward, case):
  compared = 0
  for name, value in forward[0].items():
    if name != "vit.image" and stored(case[1], f"tap/{name}"):
      limit = 5e-6 if name.startswith(("vit.", "cide.")) else 2e-5
      oracle.compare(oracle.nchw(value) if value.ndim == 4 else value, case[1], f"tap/{name}", limit)
      compared += 1
  assert compared == {"nyu": 13, "kitti": 8}[case[0]]


def test_depth_and_loss_are_the_authors(forward, case):
  name, arrays, exp, _ = case
  oracle.compare(forward[1][:, None], arrays, "output/pred_d_padded", 2e-5)
  oracle.compare(forward[2][:, None], arrays, "output/pred_d", 2e-5)
  loss = exp.task.loss({"depth": forward[2]}, eco_depth.batch_of(name)).value
  np.testing.assert_allclose(loss, arrays["output/eval_loss"], atol=2e-5)


@pytest.fixture(scope="module")
def nyu():
  config = eco_depth.config()
  exp = experiment.assemble(config)
  return exp, tiny.train_state(exp, eco_depth.weights(config)), oracle.golden("eco_depth_nyu.tiny.npz")


@pytest.mark.slow  # their pictures for the classifier, with every run of the tests: test_class_mixture.py
@pytest.mark.parametrize("name, size, seed", [("pred_d_odd", (70, 100), 1000), ("pred_d_tall", (130, 70), 2000)])
def test_other_sizes_are_the_authors(nyu, name, size, seed):
  exp, state, arrays = nyu
  batch = {"image": jnp.asarray(eco_depth.picture((1, *size), seed))}
  depth = jax.jit(lambda named, batch: exp.spec.merge(*named)(batch, training=False)["depth"])
  oracle.compare(depth(everything(state), batch)[:, None], arrays, f"output/{name}", 2e-5)


@pytest.mark.slow  # the procedure, with every run of the tests: tests/inference/test_tta.py
def test_the_test_of_nyu_is_the_authors(nyu):
  """Whole pictures and their mirror images, clipped."""
  exp, state, arrays = nyu
  batch = eco_depth.batch_of()
  depth = jax.jit(evaluate.make_predict(exp, ("flip",), "full"))(everything(state), {"image": batch["image"]})
  oracle.compare(depth, arrays, "output/test_pred", 2e-5)
  scores = scores_on_nyu(exp.task, depth, batch["depth"])
  np.testing.assert_allclose(scores, arrays["output/test_metrics"], rtol=2e-5)
