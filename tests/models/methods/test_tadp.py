"""TADP's options, a test for each value; and what is drawn, when, and for whom."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.depth_frames import TEST, TRAIN, write_frames
from tests.helpers.messages import check_message
from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import predict_folder
from vpd_jax.prediction.predictor import Predictor
from vpd_jax.training import train

IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
KEY = jax.random.key(1)


def config(**changes):
  made = tiny.shrunk(loader.load("configs/nyu_depth.py:tadp,tiny")).unlock()
  made.update_from_flattened_dict(changes)
  return made.lock()


@functools.cache
def assembled(**changes):
  return experiment.assemble(config(**{f"method.{name}": value for name, value in changes.items()}))


@functools.cache
def posterior():
  """Of the images, and the latents of a method with these options."""
  parts = assembled().spec
  named = {name: x for name, x in tiny.filled(parts.shapes).items() if name.startswith("method/vae/")}

  def run(image):
    method = parts.partial(named).method
    return method.vae(method.fit(image / 127.5 - 1))

  return named, jax.jit(run)(IMAGE.astype(jnp.float32))


@functools.cache
def latents_of(**options):
  """(image, key) to latents, compiled once for each shape."""
  named, _ = posterior()
  return jax.jit(lambda image, key: assembled(**options).spec.partial(named).method.latents({"image": image}, key))


def latents(key=None, image=IMAGE, **options):
  return latents_of(**options)(image, key)


def test_the_latents_are_a_sample_or_the_mode():
  expected, sample, mode = posterior()[1], latents(KEY), latents(KEY, latents="mode")
  np.testing.assert_allclose(mode, expected.mean, rtol=1e-5, atol=1e-5)
  drawn = (sample - expected.mean) / jnp.exp(expected.log_variance / 2)
  assert abs(float(drawn.mean())) < 0.1 and 0.9 < float(drawn.std()) < 1.1
  assert assembled().method.samples_latents and not assembled(latents="mode").method.samples_latents
  np.testing.assert_array_equal(mode, latents(None, latents="mode"))


def test_a_key_draws_for_each_image_and_another_key_anew():
  one = jnp.broadcast_to(IMAGE[:1], IMAGE.shape)
  first, again, other = latents(KEY, one), latents(KEY, one), latents(jax.random.key(2), one)
  np.testing.assert_array_equal(first, again)
  assert float(jnp.abs(first[0] - first[1]).max()) > 1e-3 and float(jnp.abs(first - other).max()) > 1e-3


def test_without_a_key_every_image_has_the_same_noise_whatever_stands_beside_it():
  """So that a score does not depend on the batch, the devices or the order; the release draws anew at each call."""
  together = latents()
  np.testing.assert_array_equal(together, latents())
  for i in range(len(IMAGE)):
    np.testing.assert_allclose(together[i : i + 1], latents(image=IMAGE[i : i + 1]), rtol=1e-5, atol=1e-5)
  one = latents(image=jnp.broadcast_to(IMAGE[:1], IMAGE.shape))
  np.testing.assert_allclose(one[0], one[1], rtol=1e-5, atol=1e-5)


def test_options_are_those_of_the_release():
  method = loader.load("configs/nyu_depth.py:tadp").method
  assert (method.latents, method.latent_scale, method.token_length, method.timestep) == ("sample", 0.0, 77, 1)
  assert loader.load("configs/nyu_depth.py:tadp").backbone.vae.latent_scale == 0.18215  # which 0.0 stands for
  segmentation = loader.load("configs/ade20k_seg.py:tadp")
  assert segmentation.optim.decay == 5e-3 and segmentation.head.dropout == 0.1
  assert (segmentation.data.batch_size, segmentation.optim.loss_group, segmentation.optim.norm_group) == (16, 8, 0)


@pytest.mark.parametrize("keep", [True, False])
def test_the_last_block_is_kept_where_asked(keep):
  made = experiment.assemble(tiny.shrunk(loader.load("configs/ade20k_seg.py:tadp,tiny").unlock()))
  assert any(name.startswith("method/unet/out/") for name in made.spec.shapes)
  shapes = assembled(keep_unused=keep).spec.shapes
  assert any(name.startswith("method/unet/out/") for name in shapes) == keep
  assert not any(
    "out/2" in name for name in assembled(keep_unused=keep).groups.lr if name.startswith("method/unet/out/")
  )


@pytest.mark.parametrize("field, value, message", [
  ("latents", "mean", "method.latents='mean' is unknown to tadp; choose one of ('sample', 'mode')."),
  ("token_length", 9, "method.token_length=9 is beyond the 8 positions of the text encoder."),
  ("pad_multiple", 32, "method.pad_multiple=32 must be a multiple of 64"),
  ("prompt", "sentence", "config.method of name 'tadp' does not take ['prompt']"),
])  # fmt: skip
def test_what_cannot_be_is_refused(field, value, message):
  made = config().unlock()
  made.method[field] = value
  check_message(message, lambda: experiment.assemble(made.lock()))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run on a few frames with captions: (config, folder, scores)."""
  folder = tmp_path_factory.mktemp("tadp")
  train_lines = write_frames(folder / "data/sync", TRAIN)
  test_lines = write_frames(folder / "data/official_splits/test", TEST)
  (folder / "data/train_list.txt").write_text("\n".join(train_lines))
  (folder / "data/test_list.txt").write_text("\n".join(test_lines))
  names = [line.split()[0] for line in train_lines + test_lines]
  entries = ", ".join(f'"{name}": {{"captions": ["a bed beside a window"]}}' for name in names)
  (folder / "captions.json").write_text(f"{{{entries}}}")
  changes = {"data.root": str(folder / "data"), "data.captions": str(folder / "captions.json"), "data.batch_size": 3}
  changes |= {"num_steps": 2, "eval_every": 2, "save_every": 2, "log_every": 1, "eval.panels": 1}
  changes |= {"optim.norm_group": 0, "optim.loss_group": 0, "data.crop": (48, 48), "data.resize": ()}
  changes |= {"task.eval_crop": "none", "method.tokenizer": "characters", "eval.test_time": ("flip",)}
  made = config(**changes)
  return made, folder, train.run(made, str(folder / "run"))


def test_a_run_trains_and_is_scored_alike_twice(run, capsys):
  made, folder, scores = run
  assert np.isfinite(scores["eval/nyu/rmse"])
  again = evaluate.run(made, str(folder / "run"))
  np.testing.assert_allclose(again["eval/nyu/rmse"], scores["eval/nyu/rmse"], rtol=1e-6)
  assert "eval: 2 sentences, 2 of them truncated to 8 tokens" in capsys.readouterr().out


def test_a_run_predicts_a_folder_with_a_caption_for_each_picture(run, tmp_path):
  made, folder, _ = run
  pictures = folder / "data/sync/kitchen_0028b"
  options = {"source": str(pictures), "output": str(tmp_path / "out")}
  check_message("the method needs a sentence", lambda: predict_folder.run(made, str(folder / "run"), **options))
  (tmp_path / "said.json").write_text('[{"image": "rgb_00045.jpg", "sentence": "a bed"}]')
  assert predict_folder.run(made, str(folder / "run"), **options, sentences=str(tmp_path / "said.json")) == 1
  assert np.load(tmp_path / "out/rgb_00045.npy").shape == (48, 64)
  assert json.loads((tmp_path / "out/rgb_00045.json").read_text())["sentence"] == "a bed"
  predictor = Predictor.load(made, str(folder / "run"))
  image = np.zeros((48, 48, 3), np.uint8)
  one, two = (predictor.predict([image], sentences=["a"])[0]["depth"] for _ in range(2))
  np.testing.assert_array_equal(one, two)
