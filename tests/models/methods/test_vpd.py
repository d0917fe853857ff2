"""VPD's forward pass at sizes of any kind, and its options one by one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tests.helpers import fill, modules, tiny
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.models import parameters
from vpd_jax.models.backbones.unet import UNetSizes
from vpd_jax.models.backbones.vae import VaeSizes
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.diffusion import ConstantTime
from vpd_jax.models.methods.vpd import Vpd
from vpd_jax.types import Branch

# Compiles in half the time; what is compared here is compiled alike.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def network():
  """The smallest network of the NYU config, and made-up values of all its arrays."""
  exp = experiment.assemble(tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")))
  return exp, tiny.filled(exp.spec.shapes)


@pytest.fixture(scope="module")
def depth_of(network):
  """Batch to depth, in evaluation."""
  exp, named = network
  run = jax.jit(lambda n, b: exp.spec.merge(n)(b, training=False)["depth"], compiler_options=QUICK)
  return lambda **batch: np.asarray(run(named, {name: jnp.asarray(x) for name, x in batch.items()}))


def image(height, width, batch=1):
  return fill.integers(f"image{height}x{width}", (batch, height, width, 3), 256, 0).astype(np.uint8)


def class_ids(*ids):
  return np.asarray(ids, np.int32)


def test_488x640_is_padded_with_mid_gray_at_the_bottom_and_cropped(depth_of):
  whole = depth_of(image=image(488, 640), class_id=class_ids(3))
  assert whole.shape == (1, 488, 640)
  assert (whole > 0).all() and (whole < 10).all() and np.ptp(whole) > 0.01
  by_hand = np.full((1, 512, 640, 3), 0.5, np.float32)
  by_hand[:, :488] = image(488, 640) / np.float32(255)
  padded = depth_of(image=by_hand, class_id=class_ids(3))
  # Both have 16 rows at stride 32, so that neck and head see the same.
  np.testing.assert_allclose(whole, padded[:, :488], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def small(depth_of):
  """Depth of two images of 64 x 128, of the classes 3 and 5."""
  return depth_of(image=image(64, 128, 2), class_id=class_ids(3, 5))


def test_uint8_and_float_images_agree(depth_of, small):
  as_float = image(64, 128, 2) / np.float32(255)
  # A whole network, whose inputs differ in the last bit: one program divides by 255, the other was given the quotient.
  np.testing.assert_allclose(depth_of(image=as_float, class_id=class_ids(3, 5)), small, rtol=1e-4)


def test_images_of_a_batch_do_not_see_each_other(depth_of, small):
  other = image(64, 128, 2)
  other[1] = 0
  np.testing.assert_array_equal(depth_of(image=other, class_id=class_ids(3, 9))[0], small[0])


def test_the_class_matters(depth_of, small):
  other = depth_of(image=image(64, 128, 2), class_id=class_ids(4, 5))
  assert np.abs(other[0] - small[0]).max() > 1e-4
  np.testing.assert_array_equal(other[1], small[1])


def test_ready_latents_stand_for_the_encoded_image(network, depth_of, small):
  exp, named = network

  @jax.jit
  def encode(named, image):
    method = exp.spec.merge(named).method
    return method.vae(image_input.padded(image_input.signed(image, jnp.float32), 64, 0.0)).mean

  latents = encode(named, jnp.asarray(image(64, 128, 2)))
  blank = np.zeros_like(image(64, 128, 2))
  ready = depth_of(image=blank, latents=latents, class_id=class_ids(3, 5))
  np.testing.assert_allclose(ready, small, rtol=1e-4)  # a whole network, whose parts were compiled otherwise


def batch_of(height=64, width=64, **more):
  return {"image": jnp.asarray(image(height, width)), "class_id": jnp.asarray(class_ids(3)), **more}


@pytest.fixture
def shown(network, monkeypatch):
  """What a part of the method, "vae" or "unet", is called with; the pass ends there."""
  exp, named = network

  class Called(Exception):
    pass

  def run(part, batch, **attributes):
    method = exp.spec.merge(named).method
    for name, value in attributes.items():
      setattr(method, name, value)
    calls = []

    def call(self, *args, **options):
      calls.append((args, options))
      raise Called

    monkeypatch.setattr(type(getattr(method, part)), "__call__", call)
    with pytest.raises(Called):
      method(batch, training=False)
    return calls[0]

  return run


def test_latent_scale_multiplies_the_latents_and_is_1_as_released(shown):
  batch = batch_of(latents=jnp.asarray(fill.normal("latents", (1, 8, 8, 4), 0)))
  np.testing.assert_array_equal(shown("unet", batch)[0][0], batch["latents"])
  (latents, _), _ = shown("unet", batch, latent_scale=0.18215)
  np.testing.assert_allclose(latents, 0.18215 * batch["latents"], rtol=1e-6)


def test_the_timestep_is_one_number_for_all_and_1_as_released(shown):
  batch = batch_of(latents=jnp.zeros((1, 8, 8, 4)))
  assert shown("unet", batch)[1]["timesteps"] == 1
  assert shown("unet", batch, time=ConstantTime(500))[1] == {
    "timesteps": 500,
    "map_max_positions": 0,
    "predict_noise": False,
  }


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_pad_value_fills_right_and_bottom_after_scaling(shown, value):
  (seen,), _ = shown("vae", batch_of(40, 70), fit=image_input.PaddedInput(64, value))
  assert seen.shape == (1, 64, 128, 3)
  np.testing.assert_allclose(seen[:, :40, :70], image(40, 70) / 127.5 - 1, atol=1e-6)
  assert (seen[:, 40:] == value).all() and (seen[:, :, 70:] == value).all()


def test_pad_multiple_sets_the_size_the_vae_sees(shown):
  assert shown("vae", batch_of(40, 70), fit=image_input.PaddedInput(128, 0.0))[0][0].shape == (1, 128, 128, 3)


def test_maps_have_the_stated_strides_and_widths(network):
  exp, named = network
  run = lambda named, batch: exp.spec.merge(named).method(batch, training=False).maps
  maps = jax.eval_shape(run, named, batch_of(100, 130))  # 128 x 192 after padding
  strides, widths = exp.method.map_info.strides, exp.method.map_info.widths
  assert [m.shape for m in maps] == [(1, 128 // s, 192 // s, w) for s, w in zip(strides, widths, strict=True)]
  assert strides == (8, 16, 32, 64)


@pytest.fixture(scope="module")
def context_of(network):
  """Class ids to context, with arrays replaced."""
  exp, named = network

  def run(ids, **arrays):
    changed = named | {f"method/{name}": jnp.asarray(x) for name, x in arrays.items()}
    return np.asarray(exp.spec.merge(changed).method.context({"class_id": jnp.asarray(ids)}))

  return run


def test_class_id_minus_1_is_the_mean_vector(network, context_of):
  vectors = np.asarray(network[1]["method/class_vectors"])
  mean = vectors.mean(axis=0, keepdims=True)
  by_hand = context_of(class_ids(0), class_vectors=np.repeat(mean, 27, axis=0))
  np.testing.assert_allclose(context_of(class_ids(-1)), by_hand, rtol=1e-5, atol=1e-6)


def test_the_context_is_the_vector_plus_gamma_times_the_adapter(network, context_of):
  named = {name.removeprefix("method/"): np.asarray(x, np.float64) for name, x in network[1].items()}
  text = named["class_vectors"][[3, 26]]
  hidden = text @ named["text_adapter/fc/0/kernel"] + named["text_adapter/fc/0/bias"]
  hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
  adapted = hidden @ named["text_adapter/fc/2/kernel"] + named["text_adapter/fc/2/bias"]
  expected = (text + named["gamma"] * adapted)[:, None]
  np.testing.assert_allclose(context_of(class_ids(3, 26)), expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(
    context_of(class_ids(3), gamma=np.zeros(16, np.float32))[0, 0], network[1]["method/class_vectors"][3]
  )


@pytest.mark.parametrize("size, multiple, expected", [
  ((480, 480), 64, (512, 512)), ((352, 352), 64, (384, 384)), ((512, 512), 64, (512, 512)), ((1, 65), 64, (64, 128)),
  ((480, 640), 128, (512, 640)),
])  # fmt: skip
def test_padding_grows_to_the_next_multiple(size, multiple, expected):
  assert image_input.padded(jnp.zeros((1, *size, 3)), multiple, 0.0).shape[1:3] == expected


def make(**options):
  """A small VPD, with shapes in place of arrays."""
  small = {"unet": UNetSizes(model_channels=32, context_dim=8, num_res_blocks=1), "vae": VaeSizes(channels=32)}
  return parameters.describe(lambda: Vpd(modules.setup(**small, classes=27), **options)).model


def test_the_defaults_are_the_release_and_there_is_one_branch():
  method = make()
  assert (method.time, method.latent_scale) == (ConstantTime(1), 1.0)
  assert method.fit == image_input.PaddedInput(64, 0.0)
  assert inspect.signature(Vpd.__init__).parameters["residual_scale"].default == 1e-4
  assert method.context.class_vectors.get_value().shape == (27, 8) and not hasattr(method.unet, "out")
  assert method.needs == {"class_id"}
  assert method.branches(True) == method.branches(False) == (Branch("text", 1.0),)
  example = {"image": image(8, 8)}
  assert method.prepare(example) is example


def test_gamma_starts_at_the_residual_scale():
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.method.residual_scale = 0.25
  gamma = experiment.assemble(config).spec.initialize(["method/gamma"])["method/gamma"]
  np.testing.assert_array_equal(gamma, np.full(16, 0.25, np.float32))


@pytest.mark.parametrize("options, message", [
  ({"prompt": "caption"}, "method.prompt='caption' is unknown to vpd; choose one of "
                          "('scene_class', 'predicted', 'all_classes', 'sentence')."),
  ({"pad_multiple": 32}, "method.pad_multiple=32 must be a multiple of 64, the UNet's coarsest stride."),
])  # fmt: skip
def test_wrong_options_are_one_line(options, message):
  with pytest.raises(ValueError) as error:
    make(**options)
  assert str(error.value) == message


@pytest.mark.parametrize("field, value, message", [
  ("method.name", "vqd", r"^config\.method\.name='vqd' is unknown; choose one of \[.*'vpd'"),
  ("backbone.attention", "flash", r"^config\.backbone\.attention='flash' is unknown; choose one of \('auto', "),
  ("dtype", "float16", r"^config\.dtype='float16' is unknown; choose one of \['bfloat16', 'float32', 'float64'\]"),
  ("dtype", "float64", r"^float64 is for both or neither: config\.dtype='float64', config\.param_dtype='float32'"),
])  # fmt: skip
def test_wrong_words_of_a_config_are_one_line(field, value, message):
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    experiment.assemble(config)


def test_float64_without_x64_says_what_to_set():
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.dtype = config.param_dtype = "float64"
  with pytest.raises(ValueError, match=r"='float64' needs JAX_ENABLE_X64=1 in the environment"):
    experiment.assemble(config)
