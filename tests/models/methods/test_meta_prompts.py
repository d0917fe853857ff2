"""MetaPrompts' passes, sizes and options one by one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, modules, oracle, tiny
from tests.helpers import meta_prompts as single
from tests.helpers.meta_prompts import PROMPTS, QUICK, smallest
from tests.helpers.restated import bilinear
from vpd_jax import experiment
from vpd_jax.convert import rules
from vpd_jax.convert.tables import stable_diffusion
from vpd_jax.models import parameters
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.unet import UNet, UNetOutput, UNetSizes
from vpd_jax.models.backbones.vae import VaeEncoder, VaeSizes
from vpd_jax.models.methods.meta_prompts import MetaPrompts
from vpd_jax.types import Branch

SIZES = {
  "unet": UNetSizes(model_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, context_dim=16, num_heads=2),
  "vae": VaeSizes(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1),
}


@pytest.fixture(scope="module")
def network():
  """The smallest network, and made-up values of all its arrays."""
  exp = experiment.assemble(smallest())
  return exp, tiny.filled(exp.spec.shapes)


def make(**options):
  """A method with shapes in place of arrays."""
  return parameters.describe(lambda: MetaPrompts(modules.setup(**SIZES), **options)).model


def names(**options):
  """Names of the method's own arrays."""
  parts = parameters.describe(lambda: MetaPrompts(modules.setup(**SIZES), **options))
  return {name: shape.shape for name, shape in parts.shapes.items() if not name.startswith("vae/")}


# Passes.


def by_hand(network, latents, steps):
  """The features of every pass: each a program of its own, with the skips resized by the restatement above."""
  exp, named = network

  @jax.jit
  def once(named, latents, prompts, time):
    method = exp.spec.merge(named).method
    prompts = jnp.broadcast_to(prompts, (latents.shape[0], *prompts.shape))
    out = method.unet(latents, prompts, time_embedding=time, predict_noise=True)
    return out.features, out.noise

  @jax.jit
  def adapted(named):
    method = exp.spec.merge(named).method
    return [adapter(named[f"method/meta_prompts/{i}"]) for i, adapter in enumerate(method.context.text_adapter)]

  prompts, results = adapted(named), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers, "resize", bilinear)
    for step in range(steps):
      features, latents = once(named, latents, prompts[step], named[f"method/t/{step}"])
      results.append(features)
  return results, prompts


def run(steps, network, latents):
  """The method's features with so many steps, of weights that hold three."""
  exp = experiment.assemble(smallest(**{"method.refine_steps": steps, "method.trained_steps": 3}))
  assert exp.spec.shapes == network[0].spec.shapes
  batch = {"image": jnp.zeros((latents.shape[0], 64, 64, 3), jnp.uint8), "latents": latents}
  call = lambda named, batch: exp.spec.merge(named).method(batch, training=False)._replace(image_size=(0, 0))
  return jax.jit(call, compiler_options=QUICK)(network[1], batch)


@pytest.fixture(scope="module")
def even(network):
  latents = jnp.asarray(fill.normal("latents", (2, 8, 16, 4), 0))
  return latents, *by_hand(network, latents, 3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_features_and_prompts_are_those_of_the_last_pass(network, even, steps):
  """Also the number of steps chosen again for weights that hold three."""
  latents, expected, prompts = even
  features = run(steps, network, latents)
  for ours, theirs in zip(features.maps, expected[steps - 1], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
  np.testing.assert_allclose(features.context, np.stack([prompts[steps - 1]] * 2), rtol=1e-5, atol=1e-5)
  if steps > 1:
    assert np.abs(features.maps[0] - expected[0][0]).max() > 0.1


def test_odd_sides_give_the_maps_of_the_next_multiple_of_eight(network):
  latents = jnp.asarray(fill.normal("odd latents", (1, 9, 13, 4), 0))
  expected, _ = by_hand(network, latents, 2)
  features = run(2, network, latents)
  assert [x.shape[1:3] for x in features.maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
  for ours, theirs in zip(features.maps, expected[1], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


# What the parts are given.


@pytest.fixture
def shown(monkeypatch):
  """options, batch -> (calls of the UNet, what the VAE saw, the features); both give made-up arrays."""

  def run(batch, *, training=False, **options):
    config = smallest(**{f"method.{name}": value for name, value in options.items()})
    exp = experiment.assemble(config)
    calls, images = [], []

    def pass_of(self, latents, context, **told):
      calls.append((latents, context, told))
      size = latents.shape[1:3]
      maps = tuple(jnp.full((latents.shape[0], size[0] >> i, size[1] >> i, 32), len(calls)) for i in range(4))
      return UNetOutput(maps, {}, latents + 1 if told["predict_noise"] else None)

    class Encoded:
      def __init__(self, image):
        images.append(image)
        self.mean = jnp.ones((image.shape[0], image.shape[1] // 8, image.shape[2] // 8, 4))

    monkeypatch.setattr(UNet, "__call__", pass_of)
    monkeypatch.setattr(VaeEncoder, "__call__", lambda self, image: Encoded(image))
    named = tiny.filled(exp.spec.shapes)
    features = exp.spec.merge({n: jnp.asarray(x) for n, x in named.items()}).method(batch, training=training)
    return calls, images, features, named

  return run


def image(height, width, batch=2):
  return jnp.asarray(fill.integers(f"image{height}x{width}", (batch, height, width, 3), 256, 0).astype(np.uint8))


def test_each_step_has_its_time_and_gets_the_latents_of_the_step_before(shown):
  calls, _, features, named = shown({"image": image(64, 64)})
  assert [told["predict_noise"] for _, _, told in calls] == [True, True, False]
  for step, (latents, context, told) in enumerate(calls):
    np.testing.assert_array_equal(latents, np.full((2, 16, 16, 4), 1.0 + step))
    np.testing.assert_array_equal(told["time_embedding"], named[f"method/t/{step}"])
    assert context.shape == (2, PROMPTS, 16) and "timesteps" not in told
  assert features.maps[0][0, 0, 0, 0] == 3 and features.image_size == (64, 64)
  np.testing.assert_array_equal(features.context, calls[2][1])


def test_latent_scale_multiplies_the_latents_of_the_image_only(shown):
  calls, *_ = shown({"image": image(64, 64)}, latent_scale=0.18215)
  np.testing.assert_allclose([c[0][0, 0, 0, 0] for c in calls], [0.18215, 1.18215, 2.18215], rtol=1e-6)
  ready, images, *_ = shown({"image": image(64, 64), "latents": jnp.full((2, 8, 8, 4), 2.0)}, latent_scale=0.5)
  assert not images and ready[0][0].shape == (2, 8, 8, 4) and float(ready[0][0][0, 0, 0, 0]) == 1.0


def test_prompts_may_be_shared_and_used_as_they_are(shown):
  calls, _, features, named = shown({"image": image(64, 64)}, share_prompts=True, adapt_prompts=False)
  for _, context, _ in calls:
    np.testing.assert_array_equal(context, np.stack([named["method/meta_prompts/0"]] * 2))
  assert not any("text_adapter" in name or "meta_prompts/1" in name for name in named)
  np.testing.assert_array_equal(features.context[0], named["method/meta_prompts/0"])


def test_time_may_be_a_diffusion_timestep(shown):
  calls, _, _, named = shown({"image": image(64, 64)}, time_embedding="timestep:7")
  assert [told["timesteps"] for _, _, told in calls] == [7, 7, 7] and "time_embedding" not in calls[0][2]
  assert "method/unet/time_embed/0/kernel" in named and "method/t/0" not in named


def test_fifty_images_are_treated_as_any_other_number():
  """The release gives each image a single prompt there."""
  exp = experiment.assemble(smallest())
  call = lambda named, image: exp.spec.merge(named).method({"image": image}, training=False).context
  for batch in (50, PROMPTS):
    shape = jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.uint8)
    assert jax.eval_shape(call, exp.spec.shapes, shape).shape == (batch, PROMPTS, 16)


# Sizes.


@pytest.mark.parametrize("size, scale, expected", [
  ((480, 480), 1, (512, 512)), ((480, 640), 1, (512, 704)), ((352, 352), 2, (448, 448)),
  ((352, 1216), 2, (448, 1344)), ((100, 130), 1, (128, 192)), ((64, 64), 1, (128, 128)), ((1, 63), 1, (64, 64)),
  ((480, 480), 0, (448, 448)), ((72, 104), -1, (72, 104)),
])  # fmt: skip
def test_the_image_is_resized_to_multiples_of_64(size, scale, expected):
  assert make(resize_scale=scale).fit.size(*size) == expected


@pytest.mark.parametrize("size, scale, resized, cells", [
  ((480, 480), 1, (512, 512), (60, 60)), ((352, 352), 2, (448, 448), (44, 44)),
  ((352, 1216), 2, (448, 1344), (44, 152)), ((488, 643), 1, (512, 704), (61, 80)), ((30, 5), 1, (64, 64), (3, 1)),
])  # fmt: skip
def test_depth_has_the_size_of_the_image(size, scale, resized, cells):
  exp = experiment.assemble(smallest(**{"method.resize_scale": scale, "task.max_depth": 80.0}))

  def call(named, image):
    model = exp.spec.merge(named)
    features = model.method({"image": image}, training=False)
    joined = model.neck(features, training=False)
    return features.maps, joined.maps, model.head(joined, training=False)["depth"]

  shape = jax.ShapeDtypeStruct((2, *size, 3), jnp.uint8)
  maps, joined, depth = jax.eval_shape(call, exp.spec.shapes, shape)
  strides, widths = exp.method.map_info.strides, exp.method.map_info.widths
  expected = [(2, resized[0] // s, resized[1] // s, w) for s, w in zip(strides, widths, strict=True)]
  assert [x.shape for x in maps] == expected
  assert [x.shape for x in joined] == [(2, *cells, PROMPTS)] and depth.shape == (2, *size)


def test_the_image_is_resized_without_antialiasing_after_scaling(shown):
  _, (seen,), *_ = shown({"image": image(96, 70)})
  assert seen.shape == (2, 128, 128, 3)
  np.testing.assert_allclose(seen, bilinear(image(96, 70) / 127.5 - 1, (128, 128)), atol=2e-5)
  _, (seen,), *_ = shown({"image": image(96, 72)}, resize_scale=-1)
  np.testing.assert_allclose(seen, image(96, 72) / 127.5 - 1, atol=1e-6)


# Arrays and options.


def test_the_defaults_are_the_release():
  defaults = {n: p.default for n, p in inspect.signature(MetaPrompts.__init__).parameters.items()}
  method = dict(single.config("nyu").method)
  assert method.pop("name") == "meta_prompts"
  assert {name: defaults[name] for name in method} == method
  made = make()
  context, time = made.context, made.time
  assert (len(time.t), len(context.meta_prompts), len(context.text_adapter)) == (3, 3, 3)
  assert time.t[0].get_value().shape == (1, 128) and context.meta_prompts[2].get_value().shape == (50, 16)
  assert made.branches(True) == made.branches(False) == (Branch("prompts", 1.0),)
  assert made.needs == made.prepare_outputs == frozenset()


def test_the_block_between_passes_is_the_unets_own_and_absent_for_one_pass():
  assert "unet/out/2/kernel" in names() and "unet/time_embed/0/kernel" not in names()
  assert not any(name.startswith("unet/out/") for name in names(refine_steps=1))
  assert names(refine_steps=1, trained_steps=3) == names()


def test_fresh_prompts_and_times_are_standard_normal():
  exp = experiment.assemble(smallest())
  wanted = [n for n in exp.spec.shapes if n.startswith(("method/t/", "method/meta_prompts/"))]
  fresh = exp.spec.initialize(wanted)
  values = np.concatenate([np.ravel(fresh[name]) for name in wanted])
  assert values.size == 3 * (128 + PROMPTS * 16)
  np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=0.15)


@pytest.mark.parametrize("options, message", [
  ({"refine_steps": 0}, "method.refine_steps=0 must be at least 1, the number of passes of the UNet."),
  ({"refine_steps": 4, "trained_steps": 3}, "method.refine_steps=4 is more than the 3 steps that the weights hold "
    "(method.trained_steps); use 1 to 3."),
  ({"trained_steps": -1}, "method.trained_steps=-1 must be 0 (as many as refine_steps) or more."),
  ({"prompts": 0}, "method.prompts=0 must be at least 1."),
  ({"time_embedding": "sine"}, "method.time_embedding='sine' is unknown; use 'learned' or 'timestep:N'."),
  ({"resize_scale": -2}, "method.resize_scale=-2 must be -1 (the image as it is), 0 or more."),
])  # fmt: skip
def test_wrong_options_are_one_line(options, message):
  with pytest.raises(ValueError) as error:
    make(**options)
  assert str(error.value) == message


def test_training_takes_all_steps_that_the_weights_hold(shown):
  with pytest.raises(ValueError, match=r"^training needs all 3 steps that the weights hold, but .*=2; fewer are for"):
    shown({"image": image(64, 64)}, training=True, refine_steps=2, trained_steps=3)


def test_an_image_that_would_vanish_is_one_line():
  with pytest.raises(ValueError, match=r"^an image of 63x640 becomes 0x640 at method\.resize_scale=0; use 1\.$"):
    make(resize_scale=0).fit.size(63, 640)


def test_stable_diffusion_fills_unet_and_vae_and_leaves_its_time_layers():
  targets = experiment.assemble(single.config("nyu")).spec.shapes
  source = oracle.weights("sd_unet_hier") | oracle.weights("sd_vae_encoder")
  named, report = rules.convert(
    source, stable_diffusion.compvis(targets), targets, fresh=(r"^/(?!method/(unet|vae)/)",)
  )
  np.testing.assert_array_equal(
    named["method/unet/out/2/kernel"], source["model.diffusion_model.out.2.weight"].transpose(2, 3, 1, 0)
  )
  dropped = {name for name, why in report.dropped.items() if why == "the model learns its time vectors"}
  assert dropped == {name for name in source if ".time_embed." in name} and len(dropped) == 4
  assert {name.split("/")[1] for name in report.fresh if name.startswith("method/")} == {
    "t", "meta_prompts", "text_adapter"
  }  # fmt: skip
