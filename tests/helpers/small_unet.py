"""The method of one_convolution.py with its convolution, and a matrix behind it, where a UNet's kernels would be."""

import contextlib

import pytest
from flax import nnx

from tests.helpers import one_convolution
from vpd_jax import experiment
from vpd_jax.models.backbones import layers
from vpd_jax.models.methods import image_input
from vpd_jax.types import Features


class UNet(nnx.Module):
  """A convolution and a matrix."""

  def __init__(self, setup):
    self.conv = layers.conv(3, 8, 8, stride=8, padding=0, **setup.common.layer)
    self.mix = layers.linear(8, 8, **setup.common.layer)


class SmallUNet(one_convolution.OneConvolution):
  """One map at stride 8."""

  def __init__(self, setup):
    self.unet = UNet(setup)
    self.dtype = setup.common.dtype

  def __call__(self, batch, *, training, key=None):
    del training, key
    x = self.unet.mix(self.unet.conv(image_input.network_input(batch, self.dtype)))
    return Features((x,), x.reshape(x.shape[0], -1, 8)[:, :1], tuple(batch["image"].shape[1:3]))


@contextlib.contextmanager
def known():
  """Configs of one_convolution.rooms have this method."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(experiment.METHODS, one_convolution.NAME, SmallUNet)
    yield
