"""EcoDepth's recipe against the authors' lists and rates, its options, and its context in other tasks."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle, tiny
from vpd_jax import experiment, optim
from vpd_jax.config import loader
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released


@pytest.fixture(scope="module", params=["nyu", "kitti"])
def full(request):
  """Name, config and experiment at full size; nothing of it is allocated."""
  config = loader.load(f"configs/{request.param}_depth.py:eco_depth")
  return request.param, config, experiment.assemble(config)


def test_every_parameter_is_in_the_authors_group(full):
  _, config, exp = full
  with gzip.open(oracle.GOLDEN / "optimizer_groups.eco_depth.json.gz", "rt") as f:
    authors = json.load(f)["eco_depth_nyu"]
  assert authors["base_lr"] == config.optim.lr and authors["trainable_but_in_no_group"] == []
  assert authors["optimizer"].startswith(f"AdamW betas ({config.optim.b1}, {config.optim.b2}) eps 1e-08, no gradient")
  expected, groups = {}, exp.groups
  for key, group in authors["groups"].items():
    fields = dict(field.split("=") for field in key.split())
    expected |= dict.fromkeys(group["names"], (float(fields["lr_mult"]), float(fields["weight_decay"])))
  actual = {}
  for name in groups.lr:
    phantom = np.broadcast_to(np.float32(0), exp.spec.shapes[name].shape)
    (source,) = rules.to_source({name: phantom}, released.eco_depth_depth())
    actual[source] = groups.lr[name], config.optim.decay * groups.decay[name]
  assert actual == expected and len(actual) == 14 + 24 + 1 + 281 + 401
  assert actual["encoder.cide_module.embeddings"] == (10.0, 0.1)


def test_the_rate_of_every_step_is_the_authors(full):
  name, config, _ = full
  arrays = oracle.golden("schedules.eco_depth.npz")
  iterations, steps, expected = (arrays[f"eco_depth_{name}/{key}"] for key in ("iters_per_epoch", "step", "lr"))
  rate = jax.jit(optim.schedule(**config.optim.schedule, lr=config.optim.lr))
  np.testing.assert_allclose(rate(jnp.asarray(steps - 1, jnp.int32)), expected, rtol=3e-6)  # theirs counts from 1
  assert config.num_steps == 25 * iterations and config.optim.schedule.half == 12 * iterations


def test_pictures_are_trained_and_tested_as_in_the_release(full):
  name, config, _ = full
  assert config.data.crop == {"nyu": (480, 640), "kitti": (352, 640)}[name]
  assert config.data.cut_depth == {"nyu": "released", "kitti": "off"}[name]
  assert config.eval.test_time == {"nyu": ("flip",), "kitti": ("flip", "halves:64")}[name]
  task = config.task
  assert (task.variance_focus, task.loss_scale, task.clip_prediction, task.benchmark_silog) == (0.85, 10.0, True, True)


def small(string="configs/nyu_depth.py:eco_depth,tiny", **changes):
  """The smallest network of a config, its arrays, and a batch of pictures that are padded."""
  config = tiny.shrunk(loader.load(string)).unlock()
  config.update_from_flattened_dict(changes)
  exp = experiment.assemble(config.lock())
  image = fill.integers("small", (2, 50, 70, 3), 256, 0).astype(np.uint8)
  return exp, tiny.filled(exp.spec.shapes), {"image": jnp.asarray(image)}


@pytest.mark.parametrize(
  "changes, scale", [({}, 0.18215), ({"method.latent_scale": 1.0}, 1.0), ({"backbone.vae.latent_scale": 0.5}, 0.5)]
)
def test_latents_are_scaled(changes, scale):
  exp, named, batch = small(**changes)
  seen = []

  def run(named, batch):
    method = exp.spec.merge(named).method
    method.passes = lambda latents, batch, training: (seen.append(latents), ((), latents))[1]
    return method.latents(batch), method(batch, training=False).context

  unscaled, scaled = jax.jit(run)(named, batch)
  np.testing.assert_allclose(scaled, scale * unscaled, rtol=1e-5)


@pytest.mark.parametrize("value, byte", [(-1.0, 0), (0.0, 127)])
def test_padding_has_its_color_for_vae_and_classifier(value, byte):
  exp, named, batch = small(**{"method.pad_value": value})
  method = exp.spec.partial({n: jnp.asarray(x) for n, x in named.items()}).method
  padded = method.fit(jnp.zeros((1, 50, 70, 3)))
  assert padded.shape == (1, 64, 128, 3) and (padded[:, 50:] == value).all() and (padded[:, :, 70:] == value).all()
  square = method.context.square(batch["image"])
  assert square.shape == (2, 128, 128, 3) and (square[:, :50, 70:] == byte).all() and (square[:, 64:] == 0).all()


@pytest.mark.parametrize("seen, side", [(True, 128), (False, 70)])
def test_the_classifier_sees_the_padding_or_not(seen, side):
  exp, named, batch = small(**{"method.vit_padding": seen})
  context = exp.spec.partial({n: jnp.asarray(x) for n, x in named.items()}).method.context
  assert context.square(batch["image"]).shape == (2, side, side, 3)


@pytest.mark.parametrize("count", [100, 200])
def test_there_are_as_many_learned_vectors_as_asked_for(count):
  exp, _, _ = small(**{"method.embeddings": count})
  assert exp.spec.shapes["method/embeddings"].shape == (count, 16)


def test_the_class_token_of_a_trained_transformer_is_the_context():
  """The variant of a later version: no mixture, and everything up to the last layer is trained."""
  options = {"method.prompt": "class_token", "method.pad_value": 0.0, "head.cut_padding": "features"}
  options |= {"backbone.vit.width": 16, "method.embeddings": 100, "optim.lr_groups": ((r"/vae/", None), (r"", 1.0))}
  exp, named, batch = small(**options)
  assert exp.method.map_info.tokens == (1, 16)
  assert not [name for name in named if name.startswith(("method/fc", "method/embeddings", "method/gamma"))]
  layer = "method/vit_model/vit/encoder/layer/0/intermediate/dense/kernel"
  assert exp.groups.lr[layer] == 1.0 and "method/vit_model/classifier/kernel" in exp.spec.buffers

  def loss(kernel, batch):
    method = exp.spec.merge(named | {layer: kernel}).method
    return (method.context(batch) ** 2).sum()

  assert jnp.abs(jax.grad(loss)(jnp.asarray(named[layer]), batch)).max() > 0


def test_without_training_a_rule_of_the_recipe_may_be_unused():
  """The class token leaves no mixture, which the recipe of the release trains faster."""
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:eco_depth,tiny")).unlock()
  config.method.update(prompt="class_token", embeddings=100)
  config.backbone.vit.width = config.backbone.unet.context_dim
  with pytest.raises(ValueError, match=r"rules that match no array: \['/embeddings\$'\]"):
    experiment.assemble(config)
  assert experiment.assemble(config, training=False).method.map_info.tokens[0] == 1


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"method.embeddings": 0}, r"method\.embeddings=0 must be at least 1\."),
    ({"method.prompt": "class"}, r"method\.prompt='class' is unknown to eco_depth; choose one of \('image', 'clas"),
    (
      {"method.prompt": "class_token", "method.embeddings": 200},
      r"method\.prompt='class_token' has no mixture to read method\.embeddings=200; leave",
    ),
    ({"method.pad_multiple": 32}, r"method\.pad_multiple=32 must be a multiple of 64"),
  ],
)
def test_what_cannot_be_is_one_line(changes, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    small(**changes)


@pytest.mark.parametrize(
  "string, tokens",
  [
    ("configs/ade20k_seg.py:eco_depth", 1),
    ("configs/coco_pose.py:eco_depth", 1),
    ("configs/rooms.py:referring,eco_depth", 8 + 1),
  ],
)
def test_other_tasks_take_the_context(string, tokens):
  exp, _, _ = small(string)
  assert exp.method.map_info.tokens == (tokens, 16)
  assert "method/vit_model/classifier/kernel" in exp.spec.buffers and "method/embeddings" in exp.groups.lr
  batch = {"image": jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8), "tokens": jax.ShapeDtypeStruct((2, 8), jnp.int32)}
  outputs = jax.eval_shape(lambda n, b: exp.spec.merge(n)(b, training=False), exp.spec.shapes, batch)
  assert all(x.shape[0] == 2 for x in outputs.values())
