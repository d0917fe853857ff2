"""Options of a run that change no result, or change it a little: remat, bfloat16, EMA, a profile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.batches import batch_for
from tests.helpers.devices import forward
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.training import step as training_step


@pytest.fixture(scope="module")
def stepped():
  """field -> value, to (new state, logs) after one step of the smallest network with that option."""
  results = {}

  def run(**changes):
    key = tuple(changes.items())
    if key not in results:
      config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
      config.update_from_flattened_dict(changes)
      exp = experiment.assemble(config.lock())
      state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
      step = jax.jit(training_step.make_step(exp, loss_group=config.optim.loss_group))
      results[key] = step(state, batch_for(exp, config))
    return results[key]

  return run


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(stepped):
  plain, remat = stepped()[1], stepped(**{"backbone.remat": True})[1]
  np.testing.assert_allclose(remat["train/loss"], plain["train/loss"], rtol=1e-6)
  np.testing.assert_allclose(remat["norm/gradients"], plain["norm/gradients"], rtol=1e-4)


def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32():
  losses = {}
  for dtype in ("float32", "bfloat16"):
    config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
    config.dtype = dtype
    exp = experiment.assemble(config.lock())
    state, batch = tiny.train_state(exp, tiny.filled(exp.spec.shapes)), batch_for(exp, config)
    new, logs = jax.eval_shape(training_step.make_step(exp, loss_group=config.optim.loss_group), state, batch)
    assert {x.dtype for x in (*new.params.values(), *new.stats.values(), logs["train/loss"])} == {jnp.float32.dtype}
    losses[dtype] = float(jax.jit(forward(exp, config.optim.loss_group))(state, batch).value)
  np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)
  assert losses["bfloat16"] != losses["float32"]


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("method.name", "vdp", r"config\.method\.name='vdp' is unknown; choose one of \[.*'vpd'\]"),
    ("head.init", "zeros", r"head\.init='zeros' is unknown"),
    ("dtype", "float16", r"config\.dtype='float16' is unknown"),
    ("dtype", "float64", "float64 is for both or neither"),
    ("backbone.attention", "flash", r"config\.backbone\.attention='flash' is unknown"),
    ("backbone.remat_policy", "dots", r"config\.backbone\.remat_policy='dots' is unknown; choose one of \('full', "),
    ("backbone.remat_policy", "minimal", r"remat_policy='minimal' has no effect with backbone\.remat=False"),
    ("optim.accumulation", 5, r"config\.optim\.accumulation=5 must divide"),
    ("optim.norm_group", 4, r"config\.optim\.norm_group=4 must divide"),
    ("eval.test_time", ("flop",), "eval.test_time has 'flop'"),
    ("optim.lr_groups", ((r"/nothing/", 1.0), (r"", 1.0)), "rules that match no array"),
    ("method.pad_multiple", 32, "must be a multiple of 64"),
  ],
)
def test_a_wrong_option_is_answered_in_one_line(field, value, message):
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message) as caught:
    experiment.assemble(config.lock())
  assert "\n" not in str(caught.value)


def test_float64_needs_its_switch():
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.dtype = config.param_dtype = "float64"
  with pytest.raises(ValueError, match="needs JAX_ENABLE_X64=1"):
    experiment.assemble(config.lock())
