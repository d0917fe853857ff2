"""The start of MetaPrompts' refinement, and the number of its steps chosen again when a stored run is evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, tiny
from tests.helpers.meta_prompts import QUICK, smallest
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A workdir with one checkpoint of three refinement steps, and the arrays in it."""
  workdir, config = str(tmp_path_factory.mktemp("run")), smallest()
  assert (config.method.refine_steps, config.method.trained_steps) == (3, 0)
  exp = experiment.assemble(config)
  named = tiny.filled(exp.spec.shapes)
  with initialize.checkpoints(config, exp, workdir) as held:
    held.save(1, tiny.train_state(exp, named), initialize.to_json(config), {}, force=True)
  return workdir, named


@pytest.mark.parametrize("steps", [1, 2])
def test_a_stored_run_is_evaluated_with_fewer_steps(stored, steps):
  workdir, saved = stored
  config = initialize.with_backbone_sizes(smallest(**{"method.refine_steps": steps}), workdir)
  assert config.method.trained_steps == 3
  exp = experiment.assemble(config, training=False)
  assert exp.method.steps == steps
  named, lines = initialize.weights(config, exp, workdir)
  assert named.keys() == saved.keys() and len(lines) == 1
  np.testing.assert_array_equal(named["method/t/2"], saved["method/t/2"])


def test_more_steps_than_a_stored_run_holds_are_refused(stored):
  config = initialize.with_backbone_sizes(smallest(**{"method.refine_steps": 4}), stored[0])
  with pytest.raises(ValueError, match=r"refine_steps=4 is more than the 3 steps that the weights hold .*; use 1 to 3"):
    experiment.assemble(config, training=False)


def test_as_many_steps_and_steps_that_are_told_stay_as_they_are(stored):
  assert initialize.with_backbone_sizes(smallest(), stored[0]).method.trained_steps == 0
  told = smallest(**{"method.refine_steps": 1, "method.trained_steps": 2})
  assert initialize.with_backbone_sizes(told, stored[0]).method.trained_steps == 2


def test_without_weights_only_fan_in_lets_later_steps_see_the_image():
  exp, last = experiment.assemble(smallest()), ["method/unet/out/2/kernel"]
  latents = jnp.asarray(fill.normal("latents", (2, 8, 8, 4), 0))
  batch = {"image": jnp.zeros((2, 64, 64, 3), jnp.uint8), "latents": latents}
  features = jax.jit(lambda named: exp.spec.merge(named).method(batch, training=False).maps, compiler_options=QUICK)
  for refine_init, seen in (("released", False), ("fan_in", True)):
    start_of = experiment.assemble(smallest(**{"method.refine_init": refine_init})).spec
    for x in features(tiny.filled(exp.spec.shapes) | start_of.initialize(last)):
      assert (np.abs(x[0] - x[1]).max() > 1e-4 * np.abs(x).max()) == seen, refine_init


def test_an_unknown_start_is_refused():
  with pytest.raises(
    ValueError, match=r"method\.refine_init='zeros' is unknown; choose one of \('released', 'fan_in'\)"
  ):
    experiment.assemble(smallest(**{"method.refine_init": "zeros"}))
