"""VPD depth against the authors' code: outputs, taps, loss, gradients, statistics, five steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle, tiny
from tests.helpers.gradients import check_gradients
from tests.helpers.vpd_depth import batch_of, everything, run_steps
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released
from vpd_jax.models.backbones import unet
from vpd_jax.tasks.depth.task import silog
from vpd_jax.training import step as training_step

UNET = "encoder.unet.unet.diffusion_model."
FULL = (
  "last_layer_depth.2.weight",
  "last_layer_depth.2.bias",
  "last_layer_depth.0.bias",
  "encoder.gamma",
  "encoder.text_adapter.fc.2.bias",
)


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("vpd_depth.tiny.npz")


@pytest.fixture(scope="module")
def setup():
  exp = experiment.assemble(tiny.depth_config())
  return exp, tiny.train_state(exp, tiny.depth_weights())


@pytest.fixture(scope="module")
def forward(setup, arrays):
  """Outputs in eval mode, and the results of the parts under the authors' names."""
  exp, state = setup
  original = unet.UNet._run

  @jax.jit
  def run(named, batch):
    taps, blocks = {}, []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(unet.UNet, "_run", lambda self, *args: (blocks.append(original(self, *args)), blocks[-1])[1])
      model = exp.spec.merge(*named)
      features = model.method(batch, training=False)
    down = len(model.method.unet.input_blocks)
    for i, (x, _) in enumerate(blocks):
      name = f"input_blocks.{i}" if i < down else "middle_block" if i == down else f"output_blocks.{i - down - 1}"
      taps[f"tap/unet.{name}"] = x
    taps["tap/text_adapter"] = features.context
    fused = model.neck(features._replace(image_size=(128, 128)))
    taps["tap/out_layer"] = fused.maps[0]
    outputs = model.head(model.neck(features), training=False)
    return taps, outputs["depth"]

  return run(everything(state), batch_of(arrays))


def test_taps_are_the_authors(forward, arrays):
  taps, _ = forward
  for name, value in taps.items():
    oracle.compare(
      value if value.ndim == 3 else oracle.nchw(value),
      arrays,
      name + ("@stride" if f"{name}@stride" not in arrays and name not in arrays else ""),
      1e-5,
    )


def test_depth_is_the_authors(forward, arrays):
  oracle.compare(forward[1][:, None], arrays, "output/pred_d", 1e-5)
  loss, _ = silog(forward[1], batch_of(arrays)["depth"])
  np.testing.assert_allclose(loss, arrays["output/eval_loss"], atol=2e-5)


@pytest.mark.parametrize("name, side, seed", [("pred_d_nopad", 128, 1000), ("pred_d_352branch", 160, 2000)])
def test_other_published_sizes_are_the_authors(setup, arrays, name, side, seed):
  exp, state = setup
  image = fill.uniform("input/image", (1, 3, side, side), seed).transpose(0, 2, 3, 1)
  batch = {
    "image": jnp.asarray(image),
    "class_id": jnp.asarray(fill.integers("input/class_ids", (1,), 27, seed), jnp.int32),
  }
  depth = jax.jit(lambda named, batch: exp.spec.merge(*named)(batch, training=False))(everything(state), batch)
  oracle.compare(depth["depth"][:, None], arrays, f"output/{name}", 1e-5)


@pytest.fixture(scope="module")
def trained(setup, arrays):
  return run_steps(*setup, batch_of(arrays))


@pytest.mark.slow  # in float64 with every run of the tests: test_vpd_float64.py
def test_loss_in_training_is_the_authors(trained, arrays):
  np.testing.assert_allclose(trained["loss"], arrays["train/loss"], atol=2e-5)


@pytest.mark.slow  # in float64 with every run of the tests: test_vpd_float64.py
def test_every_gradient_is_the_authors(trained, arrays):
  check_gradients(trained["grads"], arrays, 1e-3)
  assert arrays["train/no_grad_names"].size == 0
  for name in FULL:
    expected = arrays[f"train/grad/{name}"]
    np.testing.assert_allclose(trained["grads"][name], expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.slow  # in float64 with every run of the tests: test_vpd_float64.py
def test_batch_statistics_move_as_the_authors(trained, arrays):
  after = rules.to_source(trained["stats"], released.vpd_depth())
  for name, value in after.items():
    np.testing.assert_allclose(value, arrays[f"train/bn_after/{name}"], atol=1e-5, rtol=1e-5)
  assert len(after) == 8


@pytest.mark.slow  # in float64 with every run of the tests: test_vpd_float64.py
def test_five_steps_follow_the_authors_losses_and_rates(trained, arrays):
  losses = [log["train/loss"] for log in trained["logs"]]
  np.testing.assert_allclose(losses, arrays["trace/loss"], atol=1e-4)
  groups = {str(n): i for i, n in enumerate(arrays["trace/group_names"])}
  for i, log in enumerate(trained["logs"]):
    expected = arrays["trace/lr"][i]
    unet_rates = [expected[g] for n, g in groups.items() if n.startswith("layer_0")]
    rest_rates = [expected[g] for n, g in groups.items() if n.startswith("layer_1")]
    np.testing.assert_allclose([log["lr/unet"]] * 2, unet_rates, rtol=1e-5)
    np.testing.assert_allclose([log["lr/rest"]] * 2, rest_rates, rtol=1e-5)


@pytest.mark.slow  # in float64 with every run of the tests: test_vpd_float64.py
def test_frozen_arrays_do_not_move(trained):
  first, last = trained["states"][0], trained["states"][-1]
  assert any("/vae/" in "/" + n for n in first.frozen) and "method/class_vectors" in first.frozen
  for name, value in first.frozen.items():
    np.testing.assert_array_equal(value, last.frozen[name])


@pytest.mark.slow
def test_full_size_network_is_the_authors(full_oracle):
  """Output, loss, gradients and statistics at Stable Diffusion 1.5's sizes; about 14 GiB."""
  arrays = full_oracle("vpd_depth")
  config = loader.load("configs/nyu_depth.py").unlock()
  config.data.batch_size, config.optim.norm_group, config.optim.loss_group = 1, 0, 0
  exp = experiment.assemble(config.lock())
  named = tiny.depth_weights("full")
  groups = exp.groups.lr
  params = {n: x for n, x in named.items() if n in groups}
  stats = {n: x for n, x in named.items() if n in exp.spec.stats}
  frozen = {n: x for n, x in named.items() if n not in params and n not in stats}
  side = int(arrays["input/image_shape"][-1])
  depth = fill.uniform("input/depth", (1, side, side), 0, 0.001, 10)
  depth *= fill.uniform("input/depth_valid", (1, side, side), 0) > 0.2
  image = fill.uniform("input/image", (1, 3, side, side), 0).transpose(0, 2, 3, 1)
  batch = {"image": image, "depth": depth, "class_id": np.asarray(arrays["input/class_ids"], np.int32)}
  forward = jax.jit(lambda named, batch: exp.spec.merge(*named)(batch, training=False)["depth"])
  output = forward((params, frozen, stats), batch)
  worst = oracle.compare(output[:, None], arrays, "output/pred_d", 1e-5)
  eval_loss = float(silog(output, depth)[0]) - float(arrays["output/eval_loss"])
  del output
  gradients = jax.jit(training_step.make_gradients(exp, loss_group=0, accumulation=1))
  grads, loss, _, after = gradients(params, frozen, stats, batch)
  np.testing.assert_allclose([eval_loss, loss - arrays["train/loss"]], 0, atol=2e-5)
  gradient = check_gradients(rules.to_source(grads, released.vpd_depth()), arrays, 1e-3)
  for name, value in rules.to_source(after, released.vpd_depth()).items():
    np.testing.assert_allclose(value, arrays[f"train/bn_after/{name}"], atol=1e-5, rtol=1e-5)
  print(
    f"full-size VPD depth: output {worst:.1e}, loss {float(loss - arrays['train/loss']):.1e}, gradients {gradient:.1e}"
  )
