"""TADP against the authors' code in float32: taps, depth, scores, windows, views; groups and rates.

Gradients and steps are compared in float64, in test_tadp_float64.py.
"""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle, tadp
from tests.helpers import segmentation_setups as setups
from tests.helpers.vpd_depth import scores_on_nyu
from vpd_jax import experiment, optim
from vpd_jax.config import loader
from vpd_jax.convert import rules
from vpd_jax.inference import sliding_window, tta
from vpd_jax.models import parameters

LIMIT = 1e-5
DEPTH, SEGMENTATION = "tadp_depth_nyu", "tadp_seg_ade"


class Network:
  """A tiny network in evaluation mode with its results, taps and, of its head, what training gives."""

  def __init__(self, setup):
    self.arrays, self.experiment, self.state = (
      oracle.golden(f"{setup}.tiny.npz"),
      tadp.assembled(setup),
      tadp.state(setup),
    )
    self.weights = setups.everything(self.state)

    @jax.jit
    def run(named, batch, noise):
      model = self.experiment.spec.merge(*named)
      with setups.Tapped(model) as tapped:
        batch = tadp.with_latents(model, batch, noise)
        features = model.method(batch, training=False)
        given = model.neck(features, training=False)
        outputs = model.head(given, training=False)
      taps = tapped.taps | {"latents": batch["latents"] * model.method.latent_scale}
      if setup == DEPTH:  # stored before the fused map is cut to the picture
        padded = tuple(8 * side for side in batch["latents"].shape[1:3])
        taps["out_layer"] = model.neck(features._replace(image_size=padded)).maps[0]
      return taps, features.maps, given, outputs

    self._run = run

  def __call__(self, batch, noise):
    return self._run(self.weights, batch, noise)

  def check_taps(self, taps):
    held = {key.split("@")[0].removeprefix("tap/") for key in self.arrays if key.startswith("tap/")}
    assert held == taps.keys() and len(held) > 25
    for name in held:
      oracle.compare(oracle.nchw(taps[name]), self.arrays, f"tap/{name}", LIMIT)


@pytest.fixture(scope="module")
def depth():
  return Network(DEPTH)


@pytest.fixture(scope="module")
def segmentation():
  return Network(SEGMENTATION)


def test_depth_and_its_taps_are_the_authors(depth):
  batch = tadp.depth_batch((2, 96, 96))
  taps, _, _, outputs = depth(batch, tadp.noise(2, 16))
  depth.check_taps(taps)
  oracle.compare(outputs["depth"][:, None], depth.arrays, "output/pred_d", LIMIT)
  loss = depth.experiment.task.loss(outputs, batch).value
  np.testing.assert_allclose(loss, depth.arrays["output/eval_loss"], atol=2e-5)


@pytest.mark.parametrize(
  "name, side, latent, seed",
  [
    ("nopad", 128, 16, 1000),
    pytest.param("352branch", 160, 24, 2000, marks=pytest.mark.slow),
  ],  # VPD's is compared, too
)
def test_other_published_sizes_are_the_authors(depth, name, side, latent, seed):
  batch = tadp.depth_batch((1, side, side), seed=seed)
  outputs = depth(batch, tadp.noise(1, latent, seed=seed))[3]
  oracle.compare(outputs["depth"][:, None], depth.arrays, f"output/pred_d_{name}", LIMIT)


def test_mirrored_windows_of_depth_are_the_authors(depth):
  """Two windows and their mirror images are one batch, each with noise of its own."""
  batch, noise = tadp.depth_batch((1, 96, 144), seed=3000), tadp.noise(4, 16, seed=3000)
  predict = tta.with_test_time_augmentation(lambda part: depth(part, noise)[3]["depth"], ("flip", "shift:2"))
  predicted = predict(batch)
  oracle.compare(predicted[0], depth.arrays, "output/test_pred", LIMIT)
  scores = scores_on_nyu(depth.experiment.task, predicted, batch["depth"])
  np.testing.assert_allclose(scores, depth.arrays["output/test_metrics"], rtol=1e-5)


def test_segmentation_and_its_taps_are_the_authors(segmentation):
  batch = tadp.segmentation_batch()
  taps, maps, given, outputs = segmentation(batch, tadp.noise(2, 16))
  segmentation.check_taps(taps)
  for i, x in enumerate(maps):
    oracle.compare(oracle.nchw(x), segmentation.arrays, f"output/extract_feat.{i}", LIMIT)
  assert [x.shape[-1] for x in maps] == [32, 64 + 77, 128 + 77, 128]
  oracle.compare(oracle.nchw(taps["decode_head.conv_seg"]), segmentation.arrays, "output/head_logits", LIMIT)
  oracle.compare(oracle.nchw(outputs["logits"]), segmentation.arrays, "output/logits", LIMIT)
  loss = segmentation.experiment.task.loss(outputs, batch).value
  np.testing.assert_allclose(loss, segmentation.arrays["output/eval_loss"], atol=2e-5)
  check_training_of_the_head(segmentation, given, batch)


def check_training_of_the_head(network, given, batch):
  @jax.jit
  def run(named, maps, context):
    model = network.experiment.spec.merge(*named)
    outputs = model.head(given._replace(maps=maps, context=context), training=True)
    loss = network.experiment.task.loss(outputs, batch)
    return loss.value, loss.logs, parameters.stats(model)

  loss, logs, after = run(network.weights, given.maps, given.context)
  np.testing.assert_allclose(loss, network.arrays["train/loss"], rtol=0, atol=2e-5)
  setups.check_logs(logs | {"loss": loss}, network.arrays, batch)
  after = rules.to_source(after, tadp.table(SEGMENTATION))
  assert len(after) == sum(key.startswith("train/bn_after/") for key in network.arrays) > 0
  for name, value in after.items():
    np.testing.assert_allclose(value, network.arrays[f"train/bn_after/{name}"], rtol=1e-5, atol=LIMIT, err_msg=name)


def labeled(network, images, words, noise, softmax=True):
  """The result for one picture given in several scales, [1, K, H, W]; windows have noise of their own, by number."""
  done = [0]

  def logits(weights, batch):
    del weights
    rows = batch["image"].shape[0]
    windows = [tadp.noise(1, 16, name=f"input/{noise}.{done[0] + i}") for i in range(rows)]
    done[0] += rows
    return network(batch, jnp.concatenate(windows))[3]["logits"]

  engine = sliding_window.SlidingWindowInference(logits, sliding_window.parse(words), batch_size=2, softmax=softmax)
  engine._predict = logits  # compiled for the taps already
  size = tuple(int(side) for side in network.arrays["input/slide_ori_shape"])
  views = sliding_window.Views(
    [image[0].astype(np.float32) for image in images], size, {"text_states": np.asarray(tadp.text(2)[0])}
  )
  (result,) = engine(None, [views])
  return oracle.nchw(np.asarray(result)[None, : size[0], : size[1]]), done[0]


def test_sliding_windows_are_the_authors(segmentation):
  arrays, words = segmentation.arrays, ("slide:128:85",)
  image = setups.picture("input/slide_image", arrays["input/slide_image_shape"])
  scores, windows = labeled(segmentation, [image], words, "slide_noise", softmax=False)
  oracle.compare(scores, arrays, "output/slide_logits", LIMIT)
  probabilities, _ = labeled(segmentation, [image], words, "slide_noise")
  oracle.compare(probabilities, arrays, "output/slide_softmax", LIMIT)
  expected = arrays["output/slide_pred"]
  # Where another class won, it was a tie.
  lost = scores.max(axis=1) - np.take_along_axis(scores, expected[:, None].astype(int), axis=1)[:, 0]
  assert lost.max() <= LIMIT * np.abs(scores).max() and (lost > 0).mean() < 1e-3 and windows == 2


def test_scales_and_mirror_images_are_the_authors(segmentation):
  shapes = [segmentation.arrays[f"input/ms_image_shape.{i}"] for i in range(2)]
  images = [setups.picture(f"input/ms_image.{i}", shape) for i, shape in enumerate(shapes)]
  probabilities, windows = labeled(segmentation, images, ("slide:128:85", "flip"), "ms_noise")
  oracle.compare(probabilities, segmentation.arrays, "output/ms_flip_softmax", LIMIT)
  assert windows == 16


@pytest.mark.parametrize("setup", tadp.CONFIGS)
def test_every_parameter_of_the_full_network_is_in_the_authors_group(setup):
  with gzip.open(oracle.GOLDEN / "optimizer_groups.tadp.json.gz", "rt") as f:
    authors = json.load(f)[setup]
  made = loader.load(tadp.CONFIGS[setup].removesuffix(",tiny"))
  full = experiment.assemble(made)
  assert authors["base_lr"] == made.optim.lr and authors["trainable_but_in_no_group"] == []
  words = f"AdamW betas ({made.optim.b1}, {made.optim.b2}) eps {made.optim.epsilon}, no gradient clipping"
  assert authors["optimizer"] == words and made.optim.clip_norm == 0
  # What gets no gradient PyTorch's optimizer leaves alone, whatever its group.
  without = {str(name) for name in oracle.golden(f"{setup}.tiny.npz")["train/no_grad_names"]}
  expected = {}
  for key, group in authors["groups"].items():
    fields = dict(field.split("=") for field in key.split())
    rates = (float(fields["lr_mult"]), float(fields["weight_decay"]))
    if fields["trainable"] == "True":
      expected |= dict.fromkeys(set(group["names"]) - without, rates)
  actual = {}
  for name, rate in full.groups.lr.items():
    (source,) = rules.to_source({name: np.broadcast_to(np.float32(0), full.spec.shapes[name].shape)}, tadp.table(setup))
    actual[source] = (rate, made.optim.decay * full.groups.decay[name])
  assert actual == expected


@pytest.mark.parametrize("run, options", [
  ("tadp_depth_nyu", {}),
  ("tadp_seg_ade", {}),
  ("tadp_seg_ade_8k", {"lr": 1.6e-4, "num_steps": 8000, "warmup": 150}),
  ("tadp_seg_ade_4k", {"lr": 1.6e-4, "num_steps": 4000, "warmup": 75}),
])  # fmt: skip
def test_the_rate_of_every_step_is_the_authors(run, options):
  arrays, depth = oracle.golden("schedules.tadp.npz"), "depth" in run
  made = loader.load(tadp.CONFIGS[DEPTH if depth else SEGMENTATION].removesuffix(",tiny"))
  options = {**loader.schedule(made), "lr": made.optim.lr} | options
  steps = arrays[f"{run}/step"] - 1 if depth else arrays[f"{run}/iter"]  # the former counts from 1
  expected = arrays[f"{run}/lr"]
  actual = optim.schedule(**options)(jnp.asarray(steps, jnp.int32))
  # Near its end a rate is a difference of larger numbers, each rounded to float32.
  np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=0 if depth else 1e-7 * options["lr"])


def test_the_fast_run_on_depth_has_a_constant_rate():
  rates = oracle.golden("schedules.tadp.npz")["tadp_depth_nyu_fast/lr"]
  np.testing.assert_array_equal(rates, 5e-4)
  flat = optim.schedule("triangular_poly", lr=5e-4, min_lr=5e-4, half=12)
  np.testing.assert_allclose(flat(jnp.arange(30)), 5e-4, rtol=1e-6)
