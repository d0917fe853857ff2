"""Experiment and weights of the authors' tiny VPD depth network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import fill, oracle
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.prediction.predictor import Predictor
from vpd_jax.types import TrainState


def depth_config(string="configs/nyu_depth.py:tiny", **changes):
  """A tiny config as the oracle ran it: batch 2, statistics and loss over both images."""
  config = loader.load(string).unlock()
  config.data.batch_size = 2
  config.optim.norm_group = config.optim.loss_group = 0
  config.optim.schedule.half = 3  # the trace: 2 epochs of 3 iterations
  config.update_from_flattened_dict(changes)
  return config.lock()


def depth_weights(size="tiny", seed=0, dtype=np.float32):
  """The authors' rebuilt weights under our names."""
  shapes = depth_shapes(size)
  named, _ = rules.convert(oracle.weights("vpd_depth", size, seed), released.vpd_depth(), shapes)
  return {name: np.asarray(x, dtype) for name, x in named.items()}


@functools.cache
def depth_shapes(size="tiny"):
  return experiment.model_shapes(loader.load("configs/nyu_depth.py" + (":tiny" if size == "tiny" else "")))


def train_state(exp, named):
  """A TrainState of the given arrays, before the first step."""
  named = {name: jnp.asarray(x) for name, x in named.items()}
  trained = exp.groups.lr
  params = {n: x for n, x in named.items() if n in trained}
  stats = {n: x for n, x in named.items() if n in exp.spec.stats}
  frozen = {n: x for n, x in named.items() if n not in params and n not in stats}
  return TrainState(jnp.zeros((), jnp.int32), params, frozen, stats, jax.jit(exp.optimizer.init)(params))


def shrunk(config):
  """A shipped config with the smallest network of the same build: one block per level, attention in the middle one.

  All levels stay: the neck joins the maps of four.
  """
  config = config.copy_and_resolve_references().unlock()
  levels = len(config.backbone.unet.channel_mult)
  config.backbone.unet.update(
    model_channels=32, channel_mult=(1,) * levels, num_res_blocks=1, attention_levels=(), context_dim=16, num_heads=2
  )
  if config.method.get("attention_maps", False):
    config.backbone.unet.attention_levels, config.method.attention_max_size = (2,), 16
  config.backbone.vae.update(channels=32, channel_mult=(1,) * len(config.backbone.vae.channel_mult), num_res_blocks=1)
  if "width" in config.head:
    config.head.width = 8
  if "filters" in config.head:
    config.head.filters = (8,) * len(config.head.filters)
  config.neck.update({name: size for name, size in (("width", 32), ("inner", 8)) if name in config.neck})
  if "class_vectors" in config.method:
    config.method.class_vectors = "random:0"
  sentences = "sentence" in config.method.get("prompt", "") or config.method.name == "tadp"
  if sentences or config.method.name == "iedp":
    config.backbone.text.update(vocab_size=100, width=16, layers=1, heads=2, mlp_width=32, positions=8)
  if config.method.name == "iedp":
    config.backbone.image.update(width=32, layers=1, heads=2, mlp_width=64, image_size=28, projection=16)
    config.init.clip, config.method.tokenizer, config.method.num_queries = "random:0", "characters", 8
  if config.method.name == "eco_depth":
    config.backbone.vit.update(width=16, layers=1, heads=2, mlp_width=32, image_size=28, labels=10)
    config.method.embeddings, config.init.vit = 5, "random:0"
  if sentences:
    config.method.token_length, config.method.tokenizer, config.init.clip = 8, "words", "random:0"
  config.data.update(crop=(64, 64), batch_size=6, workers=0)
  for group in ("loss_group", "norm_group"):
    if config.optim[group] and 6 % config.optim[group]:
      config.optim[group] = 3
  config.data.update({name: (64, 96) for name in ("size", "resize") if name in config.data})
  config.data.update({name: n for name, n in (("train_count", 12), ("eval_count", 5)) if name in config.data})
  config.eval.batch_size = 2
  return config.lock()


def predictor(config):
  """A Predictor whose weights are `filled`: fresh ones make some outputs constant, as their last layer is zero."""
  made = Predictor.load(config, random_init=True)
  values = filled(made.experiment.spec.shapes)
  weights = tuple({name: jnp.asarray(values[name]) for name in part} for part in made.weights)
  return dataclasses.replace(made, weights=weights)


def filled(shapes, seed=0):
  """Made-up values of every array by its name, none of them zero; takes no compilation, unlike fresh ones."""
  return {name: np.asarray(fill.weight(name, s.shape, seed), s.dtype) for name, s in shapes.items()}
