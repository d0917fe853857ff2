"""MetaPrompts as the oracle ran it, its weights and inputs; and with the smallest network."""

import jax.numpy as jnp
import numpy as np

from tests.helpers import fill, oracle, tiny
from vpd_jax.config import loader, presets
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released

RESIZE_SCALE = {"nyu": 1, "kitti": 2}
MAX_DEPTH = {"nyu": 10.0, "kitti": 80.0}


def config(data, *, tiny_network=True, **changes):
  """MetaPrompts as the oracle ran it: batch 2, statistics and loss over both images."""
  made = loader.load("configs/nyu_depth.py" + (":tiny" if tiny_network else "")).unlock()
  sections = presets.meta_prompts_depth(tiny=tiny_network, head_init="released", resize_scale=RESIZE_SCALE[data])
  for name, section in sections.items():
    made[name] = type(made)(section)
  made.task.max_depth = MAX_DEPTH[data]
  made.data.batch_size = 2
  made.optim.norm_group = made.optim.loss_group = 0
  made.optim.schedule.half = 3  # the trace: 2 epochs of 3 iterations
  made.update_from_flattened_dict(changes)
  return made.lock()


def state_of(exp, dtype=np.float32):
  """The authors' rebuilt weights under our names, before the first step."""
  named, _ = rules.convert(oracle.weights("meta_depth"), released.meta_prompts_depth(), exp.spec.shapes)
  return tiny.train_state(exp, {name: np.asarray(x, dtype) for name, x in named.items()})


def batch_of(data, dtype=np.float32):
  depth = fill.uniform("input/depth", (2, 96, 96), 0, 0.001, MAX_DEPTH[data])
  depth *= fill.uniform("input/depth_valid", (2, 96, 96), 0) > 0.2
  image = fill.uniform("input/image", (2, 3, 96, 96), 0).transpose(0, 2, 3, 1)
  return {"image": jnp.asarray(image, dtype), "depth": jnp.asarray(depth, dtype)}


def everything(state):
  return state.params, state.frozen, state.stats


# Compiles in half the time; what is compared here is compiled alike.
QUICK = {"xla_backend_optimization_level": 0}
PROMPTS = 6


def smallest(**changes):
  """The smallest network of the release's build."""
  made = config("nyu").unlock()
  made.backbone.unet.update(model_channels=32, channel_mult=(1,) * 4, num_res_blocks=1, context_dim=16, num_heads=2)
  made.backbone.unet.attention_levels = ()
  made.backbone.vae.update(channels=32, channel_mult=(1,) * 4, num_res_blocks=1)
  made.method.prompts, made.neck.inner = PROMPTS, 8
  made.head.update(filters=(8, 8, 8), width=8)
  made.update_from_flattened_dict(changes)
  return made.lock()
