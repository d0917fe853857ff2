"""VPD's referring segmentation against the authors' code: taps, scores, loss, groups, schedule."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle
from tests.helpers.referring_network import RECIPE, batch_of, describe, weights
from vpd_jax import optim
from vpd_jax.config.presets import referring
from vpd_jax.convert import rules
from vpd_jax.convert.tables import released_referring
from vpd_jax.models import parameters as params_lib
from vpd_jax.models.backbones import unet
from vpd_jax.models.backbones.unet import UNetSizes
from vpd_jax.models.backbones.vae import VaeSizes
from vpd_jax.tasks.referring.task import Referring


@pytest.fixture(scope="module", params=[40, 77])
def forward(request):
  """(setup's arrays, parts of the network by the authors' names, outputs in eval mode, loss in train mode, stats)."""
  tokens = request.param
  parts = describe(tokens)
  original = unet.UNet._run

  @jax.jit
  def run(named, batch):
    blocks = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(unet.UNet, "_run", lambda self, *args: (blocks.append(original(self, *args)), blocks[-1])[1])
      model = parts.merge(named)
      features = model.method(batch, training=False)
    after = len(model.method.unet.input_blocks) + 1
    taps = {f"tap/unet.output_blocks.{i}": blocks[after + i][0] for i in (1, 4, 7, 11)}
    taps |= {"tap/text_adapter": features.context}
    taps |= {"tap/classifier.conv1_1": model.head.scores(features.maps, training=False)}
    logits = model.head(features, training=False)["logits"]
    trained = model.head(features, training=True)  # batch statistics are in the head alone
    return taps, logits, Referring().loss(trained, batch).value, params_lib.stats(model)

  return oracle.golden(f"vpd_refer_{tokens}.tiny.npz"), *run(weights(parts, tokens), batch_of(tokens))


def test_taps_are_the_authors(forward):
  arrays, taps = forward[:2]
  held = [name for name in taps if name in arrays or f"{name}@stride" in arrays]
  assert {"tap/text_adapter", "tap/classifier.conv1_1"} <= set(held) and (len(held) == 6 or len(arrays) < 20)
  for name in held:
    value = taps[name]
    oracle.compare(value if value.ndim == 3 else oracle.nchw(value), arrays, name, 1e-5)


def test_scores_and_losses_are_the_authors(forward):
  arrays, _, logits, trained, _ = forward
  oracle.compare(oracle.nchw(logits), arrays, "output/logits", 1e-5)
  mask = jnp.asarray(fill.integers("input/target", (2, 128, 128), 2, 0), jnp.uint8)
  evaluated = Referring().loss({"logits": logits}, {"mask": mask}).value
  np.testing.assert_allclose([evaluated, trained], [arrays["output/eval_loss"], arrays["train/loss"]], atol=2e-5)


def test_batch_statistics_move_as_the_authors(forward):
  arrays, stats = forward[0], forward[-1]
  expected = {name.removeprefix("train/bn_after/"): x for name, x in arrays.items() if "train/bn_after" in name}
  after = rules.to_source(stats, released_referring.vpd_refer())
  assert not expected or expected.keys() == after.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(after[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("factor", [1.0, 0.01])
def test_groups_are_the_authors_as_run_and_as_intended(factor):
  """As run the UNet learns at the full rate; `lr_scale` 0.01 of the release is read by nothing."""
  with gzip.open(oracle.GOLDEN / "optimizer_groups.refer.json.gz", "rt") as f:
    theirs = json.load(f)
  parts = describe(40, unet_sizes=UNetSizes(), vae_sizes=VaeSizes(), width=640)
  recipe = referring.referring_optimizer(unet_lr=factor)
  groups = optim.groups(parts.params, recipe["lr_groups"], recipe["decay_groups"])
  names = {name: next(iter(rules.to_source({name: phantom(parts, name)}, released_referring.vpd_refer())))
           for name in parts.params}  # fmt: skip
  ours = {}
  for name, rate in groups.lr.items():
    ours.setdefault((rate / (factor if "/unet/" in name else 1), groups.decay[name] * recipe["decay"]), set()).add(
      names[name]
    )
  unused = {f"unet.unet.diffusion_model.out.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
  expected = {}
  for text, group in theirs["groups"].items():
    rate, decay, trainable = (word.partition("=")[2] for word in text.split())
    if trainable == "True":
      expected.setdefault((float(rate), float(decay)), set()).update(set(group["names"]) - unused)
  assert ours == expected and theirs["base_lr"] == recipe["lr"]
  assert {names[name].split(".")[0] for name in groups.frozen} == {"encoder_vq"}


def phantom(parts, name):
  return np.broadcast_to(np.float32(0), parts.shapes[name].shape)


def test_the_learning_rate_of_every_step_is_the_authors():
  arrays = oracle.golden("schedules.refer.npz")
  total = int(arrays["refer/loader_length"]) * int(arrays["refer/epochs"])
  assert RECIPE["schedule"]["num_steps"] == total
  rate = jax.jit(optim.schedule(**RECIPE["schedule"], lr=RECIPE["lr"]))
  # Near its end the rate is a power of 1 - step / total, of which float32 has few digits left.
  np.testing.assert_allclose(rate(jnp.asarray(arrays["refer/step"])), arrays["refer/lr"], rtol=3e-6, atol=1e-11)
