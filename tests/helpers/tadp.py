"""The authors' two tiny networks of TADP: configs, weights and inputs, the noise of the latents among them."""

import functools

import jax.numpy as jnp
import numpy as np

from tests.helpers import fill, oracle, segmentation_setups, tiny
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.models.methods import image_input

CONFIGS = {"tadp_depth_nyu": "configs/nyu_depth.py:tadp,tiny", "tadp_seg_ade": "configs/ade20k_seg.py:tadp,tiny"}
RELEASES = {"tadp_depth_nyu": "tadp_depth", "tadp_seg_ade": "tadp_segmentation"}


@functools.cache
def assembled(setup, dtype="float32"):
  """As the oracle ran it: batch 2, statistics and loss over both images, no dropout, 2 epochs of 3 steps on depth."""
  config = loader.load(CONFIGS[setup]).unlock()
  config.dtype = config.param_dtype = dtype
  config.data.batch_size = 2
  config.optim.norm_group = config.optim.loss_group = 0
  if setup == "tadp_depth_nyu":
    config.optim.schedule.half = 3
  else:
    config.head.dropout = 0.0
  return experiment.assemble(config.lock())


def state(setup, dtype=np.float32):
  """The authors' rebuilt weights under our names, before the first step."""
  made = assembled(setup, np.dtype(dtype).name)
  named, _ = rules.convert(oracle.weights(setup), table(setup), made.spec.shapes)
  return tiny.train_state(made, {name: np.asarray(x, dtype) for name, x in named.items()})


def table(setup):
  return released.TABLES[RELEASES[setup]]()


def text(rows, dtype=np.float32, seed=0):
  """The states of made-up captions, [B, 77, 64]."""
  return jnp.asarray(fill.normal("input/text", (rows, 77, 64), seed), dtype)


def noise(rows, side, dtype=np.float32, seed=0, name="input/latent_noise"):
  """Of the latents, [B, h, w, 4], the same side up and down."""
  return jnp.asarray(fill.normal(name, (rows, 4, side, side), seed).transpose(0, 2, 3, 1), dtype)


def with_latents(model, batch, noise):
  """A batch with the latents that this noise stands for in the place of those that the method would draw."""
  method = model.method
  posterior = method.vae(method.fit(image_input.network_input(batch, method.dtype)))
  return {**batch, "latents": posterior.sample(noise)}


def depth_batch(shape, dtype=np.float32, seed=0):
  """Images [B, H, W, 3], depth and text."""
  rows, height, width = shape
  image = fill.uniform("input/image", (rows, 3, height, width), seed).transpose(0, 2, 3, 1)
  depth = fill.uniform("input/depth", shape, seed, 0.001, 10)
  depth *= fill.uniform("input/depth_valid", shape, seed) > 0.2
  named = {"image": jnp.asarray(image, dtype), "depth": jnp.asarray(depth, dtype)}
  return named | {"text_states": text(rows, dtype, seed)}


def segmentation_batch(dtype=np.float32):
  """Images of 128 x 128, labels and text."""
  return segmentation_setups.batch_of("vpd_seg", dtype) | {"text_states": text(2, dtype)}
