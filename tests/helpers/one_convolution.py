"""A method for tests of what surrounds the network, traced and compiled in a tenth of the time of the smallest UNet."""

import contextlib

import pytest
from flax import nnx

from tests.helpers import tiny
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.models.backbones import layers
from vpd_jax.models.methods import image_input
from vpd_jax.types import Branch, Features, MapInfo

NAME = "one_convolution"


class OneConvolution(nnx.Module):
  """One map at stride 8, made of the image by one convolution."""

  needs = prepare_inputs = prepare_outputs = frozenset()
  map_info = MapInfo((8,), (8,), tokens=(1, 8))
  sentence_tokens, attends_to_classes, notes, training_only, text_options = None, False, (), (), ()
  class_predictor, sentence_summary, samples_latents = None, None, False

  def __init__(self, setup):
    self.only = layers.conv(3, 8, 8, stride=8, padding=0, **setup.common.layer)
    self.dtype = setup.common.dtype

  @staticmethod
  def prepare(example):
    """Nothing to do."""
    return example

  def branches(self, training):
    del training
    return (Branch("only", 1.0),)

  def __call__(self, batch, *, training, key=None):
    del training, key
    x = self.only(image_input.network_input(batch, self.dtype))
    return Features((x,), x.reshape(x.shape[0], -1, 8)[:, :1], tuple(batch["image"].shape[1:3]))


def depth(string):
  """A config of depth with this method in place of its own."""
  config = tiny.shrunk(loader.load(string)).unlock()
  config.method, config.neck = {"name": NAME}, {"name": "none"}
  config.optim.lr_groups = ((r"", 1.0),)
  return config.lock()


def rooms(**changes):
  """The depth of rooms with this method, four steps, two of them saved."""
  config = depth("configs/rooms.py:depth,tiny").unlock()
  config.update(num_steps=4, log_every=1, eval_every=4, save_every=2, keep=5)
  config.optim.schedule.num_steps = 400  # the same rates, however far a run goes
  config.update_from_flattened_dict(changes)
  return config.lock()


@contextlib.contextmanager
def known():
  """Configs know the method here only."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(experiment.METHODS, NAME, OneConvolution)
    yield
