"""Initial values of arrays that the weights of Stable Diffusion do not have, against those of the releases."""

import functools
import math

import numpy as np
import pytest

from vpd_jax import experiment
from vpd_jax.config import loader


@functools.cache
def initializer(config):
  return experiment.assemble(loader.load(f"configs/{config}")).spec


def uniform_limit(*, fan_in, fan_out=None):
  """PyTorch's default, or Xavier's with both fans."""
  return math.sqrt(6 / (fan_in + fan_out)) if fan_out else 1 / math.sqrt(fan_in)


# Config and array: standard deviation of a normal distribution without bounds.
NORMAL = {
  ("nyu_depth.py:vpd,tiny", "neck/layer1/0/kernel"): 0.02,
  ("nyu_depth.py:vpd,tiny", "neck/layer1/3/kernel"): 0.02,
  ("nyu_depth.py:vpd,tiny", "neck/layer2/0/kernel"): 0.02,
  ("nyu_depth.py:vpd,tiny", "neck/out_layer/0/kernel"): 0.02,
  ("nyu_depth.py:eco_depth,tiny", "method/embeddings"): 1.0,
  ("ade20k_seg.py:vpd,tiny", "head/decode_head/conv_seg/kernel"): 0.01,
  ("ade20k_seg.py:vpd,tiny", "head/decode_head/scale_heads/0/0/conv/kernel"): math.sqrt(2 / (9 * 32)),
}
# Config and array: bound of a uniform distribution.
UNIFORM = {
  ("nyu_depth.py:vpd,tiny", "method/text_adapter/fc/0/kernel"): uniform_limit(fan_in=64),
  ("nyu_depth.py:eco_depth,tiny", "method/text_adapter/fc/2/kernel"): uniform_limit(fan_in=64),
  ("nyu_depth.py:eco_depth,tiny", "method/fc/0/kernel"): uniform_limit(fan_in=1000),
  ("nyu_depth.py:eco_depth,tiny", "method/fc/2/kernel"): uniform_limit(fan_in=400),
  ("ade20k_seg.py:vpd,tiny", "neck/lateral_convs/1/conv/kernel"): uniform_limit(fan_in=214, fan_out=32),
  ("ade20k_seg.py:vpd,tiny", "neck/fpn_convs/0/conv/kernel"): uniform_limit(fan_in=9 * 32, fan_out=9 * 32),
}


@pytest.mark.parametrize("config, name", NORMAL)
def test_normal_values_are_not_truncated(config, name):
  values = initializer(config).initialize([name])[name]
  np.testing.assert_allclose(np.std(values), NORMAL[config, name], rtol=0.05)
  assert np.abs(values).max() > 2.5 * NORMAL[config, name]  # timm bounds at -2 and 2, not at two standard deviations


@pytest.mark.parametrize("config, name", UNIFORM)
def test_uniform_values_reach_their_bound(config, name):
  largest = np.abs(initializer(config).initialize([name])[name]).max()
  assert 0.97 * UNIFORM[config, name] < largest <= UNIFORM[config, name]
