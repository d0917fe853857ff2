"""IEDP: both branches in one step, their gradients, evaluation without text, sentences, options."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, tiny
from tests.helpers.iedp import BATCH, LAMBDA, TOKENS, WIDTH, batch, iedp_config, network
from vpd_jax import experiment
from vpd_jax.config import presets
from vpd_jax.data.datasets import nyu
from vpd_jax.models.backbones.clip_image import ClipImage
from vpd_jax.models.backbones.unet import UNet, UNetOutput
from vpd_jax.models.backbones.vae import VaeEncoder
from vpd_jax.models.context import label_sentences
from vpd_jax.models.context.clip_queries import ClipQueries
from vpd_jax.models.methods import image_input
from vpd_jax.training import step as training_step
from vpd_jax.types import Branch

QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time; what is compared here is compiled alike


@functools.cache
def encoded():
  """The same with ready latents, so that programs are smaller."""
  return batch() | {"latents": jnp.asarray(fill.normal("latents", (BATCH, 8, 8, 4), 0).astype(np.float32))}


@functools.cache
def step():
  """Gradients of both branches' losses, [2, ...] each; the losses, [2], and depth, [2 B, H, W]; all of one program."""
  exp, named = network()
  fields = [{n: named[n] for n in names} for names in split(exp)]

  def losses(trained, frozen, stats, batch):
    depth = exp.spec.merge(trained, frozen, stats)(batch, training=True)["depth"]
    of_branch = [exp.task.loss({"depth": d}, batch).value for d in jnp.split(depth, 2)]
    return jnp.stack(of_branch), (jnp.stack(of_branch), depth)

  run = jax.jit(jax.jacrev(losses, has_aux=True)).lower(*fields, encoded()).compile(QUICK)
  return run(*fields, encoded())


def split(exp):
  """Names of parameters, frozen arrays and statistics."""
  trained, stats = exp.groups.lr, exp.spec.stats
  rest = exp.spec.shapes.keys() - trained.keys() - stats
  return list(trained), sorted(rest), sorted(stats)


def silog(depth, truth):
  d = np.log(np.asarray(depth, np.float64)) - np.log(np.asarray(truth, np.float64))
  return math.sqrt((d**2).mean() - 0.5 * d.mean() ** 2)


def test_the_loss_is_implicit_plus_lambda_times_explicit():
  exp, _ = network()
  _, (of_branch, depth) = step()
  assert depth.shape == (2 * BATCH, 64, 64)
  truth = np.asarray(batch()["depth"])
  by_hand = [silog(part, truth) for part in np.split(np.asarray(depth), 2)]
  np.testing.assert_allclose(of_branch, by_hand, rtol=1e-5)
  assert np.abs(depth[:BATCH] - depth[BATCH:]).max() > 1e-4
  loss = training_step.group_losses(exp.task, {"depth": depth}, batch(), exp.method.branches(True), BATCH)
  np.testing.assert_allclose(loss.value / loss.weight, by_hand[0] + LAMBDA * by_hand[1], rtol=1e-5)
  assert {name.split("/")[0] for name in loss.logs} == {"implicit", "explicit"}


def reached(gradients, branch):
  return {name for name, value in gradients.items() if np.any(np.asarray(value[branch]))}


def test_both_branches_give_gradient_to_unet_neck_and_head_and_each_to_its_own():
  gradients, _ = step()
  implicit, explicit = reached(gradients, 0), reached(gradients, 1)
  for part in ("method/unet/", "neck/", "head/"):
    names = {name for name in gradients if name.startswith(part)}
    assert len(names & implicit) > 0.8 * len(names) and len(names & explicit) > 0.8 * len(names), part
  attended = {n for n in gradients if "/attn2/" in n}
  assert attended and attended <= explicit and attended <= implicit  # many tokens: queries and keys count
  own = {"implicit": "method/implicit/", "explicit": "method/text_adapter/"}
  assert any(n.startswith(own["implicit"]) for n in implicit) and "method/gamma" in explicit
  assert not any(n.startswith(own["implicit"]) for n in explicit)
  assert not any(n.startswith((own["explicit"], "method/gamma")) for n in implicit)


def test_towers_are_never_trained_whatever_the_config_says():
  exp, _ = network()
  towers = {n for n in exp.spec.shapes if n.startswith(("method/image_encoder/", "method/text_encoder/"))}
  assert towers and towers <= exp.spec.buffers
  assert exp.groups.lr.keys() == exp.spec.params  # the rooms train everything else
  kept = experiment.assemble(iedp_config(**{"method.tower_dtype": "bfloat16"})).spec.shapes
  assert {kept[n].dtype for n in towers} == {jnp.dtype(jnp.bfloat16)}
  assert {s.dtype for n, s in kept.items() if n not in towers} == {jnp.dtype(jnp.float32)}


def test_evaluation_has_neither_text_encoder_nor_labels_and_gives_the_same_depth():
  trained, named = network()
  exp = experiment.assemble(iedp_config(**{"method.tokenizer": ""}), training=False)
  left_out = trained.spec.shapes.keys() - exp.spec.shapes.keys()
  assert {name.split("/")[1] for name in left_out} == {"text_encoder", "text_adapter", "gamma"}
  assert not exp.method.needs and not exp.method.prepare_outputs and exp.keys == ("image", "depth")
  example = {"image": np.zeros(1)}
  assert exp.method.prepare(example) is example
  assert exp.method.branches(True) == (Branch("implicit", 1.0),)
  assert exp.groups == trained.groups  # rules that name the text adapter only stay valid
  held = {name: named[name] for name in exp.spec.shapes}
  inputs = {name: encoded()[name] for name in ("image", "latents")}
  found, expected = (
    jax.jit(lambda n, b, p=p: p.spec.merge(n)(b, training=False)["depth"]).lower(n, inputs).compile(QUICK)(n, inputs)
    for p, n in ((exp, held), (trained, named))
  )
  assert found.shape == (BATCH, 64, 64)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def recorded(monkeypatch, training, **changes):
  """Rows and tokens of every call of the UNet, and how often VAE and image encoder run; nothing is computed."""
  exp, _ = network() if not changes else (experiment.assemble(iedp_config(**changes)), None)
  calls, counts = [], {"vae": 0, "clip": 0}

  def unet(self, latents, context, **_):
    calls.append((latents.shape[0], context.shape[1], latents))
    maps = tuple(jnp.zeros((latents.shape[0], 8 >> i, 8 >> i, w)) for i, w in enumerate((32, 32, 32, 32)))
    return UNetOutput(maps, {}, None)

  def counted(name, original):
    def run(self, x):
      counts[name] += 1
      return original(self, x)

    return run

  with monkeypatch.context() as patch:
    patch.setattr(UNet, "__call__", unet)
    patch.setattr(VaeEncoder, "__call__", counted("vae", VaeEncoder.__call__))
    patch.setattr(ClipImage, "__call__", counted("clip", ClipImage.__call__))
    run = lambda named, batch: exp.spec.merge(named).method(batch, training=training)
    features = jax.eval_shape(run, exp.spec.shapes, batch())
  return [call[:2] for call in calls], counts, features


def test_latent_and_features_are_made_once_and_the_unet_runs_on_both(monkeypatch):
  calls, counts, features = recorded(monkeypatch, True)
  assert calls == [(2 * BATCH, TOKENS)] and counts == {"vae": 1, "clip": 1}
  assert [m.shape[0] for m in features.maps] == [2 * BATCH] * 4 and features.context.shape[0] == 2 * BATCH
  calls, counts, features = recorded(monkeypatch, False)
  assert calls == [(BATCH, TOKENS)] and counts == {"vae": 1, "clip": 1} and features.context.shape[0] == BATCH


def test_branches_of_different_lengths_run_one_after_the_other(monkeypatch):
  calls, counts, features = recorded(monkeypatch, True, **{"method.num_queries": 5})
  assert calls == [(BATCH, 5), (BATCH, TOKENS)] and counts == {"vae": 1, "clip": 1}
  assert features.maps[0].shape[0] == 2 * BATCH and features.context.shape == (2 * BATCH, TOKENS, WIDTH)


def test_branches_and_their_weights():
  method = network()[0].method
  assert method.branches(True) == (Branch("implicit", 1.0), Branch("explicit", LAMBDA))
  assert method.branches(False) == (Branch("implicit", 1.0),)
  alone = experiment.assemble(iedp_config(**{"method.branch_mode": "implicit"})).method
  assert alone.branches(True) == (Branch("implicit", 1.0),) and not alone.needs


def test_latents_are_scaled(monkeypatch):
  exp = experiment.assemble(iedp_config(**{"method.latent_scale": 0.18215}))
  seen = []

  class Called(Exception):
    pass

  def unet(self, latents, context, **_):
    seen.append(np.asarray(latents))
    raise Called

  monkeypatch.setattr(UNet, "__call__", unet)
  monkeypatch.setattr(ClipQueries, "__call__", lambda self, batch, step=0: jnp.zeros((BATCH, TOKENS, WIDTH)))
  with pytest.raises(Called):
    exp.spec.merge(tiny.filled(exp.spec.shapes)).method(encoded(), training=False)
  np.testing.assert_allclose(seen[0], 0.18215 * encoded()["latents"], rtol=1e-6)


def test_sentences_become_tokens_on_the_host():
  method = network()[0].method
  assert method.needs == method.prepare_outputs == {"tokens"} and method.prepare_inputs == {"class_id"}
  prepare = pickle.loads(pickle.dumps(method.prepare))
  example = prepare({"class_id": np.int32(nyu.CLASSES.index("living_room")), "image": np.zeros(1)})
  ids = [62, *(ord(c) % 62 for c in "a photo of")]  # begin, and as much as fits before the end
  assert example["tokens"].dtype == np.int32 and example["tokens"].tolist() == [*ids, 63]
  assert set(example) == {"class_id", "image", "tokens"}
  with pytest.raises(ValueError, match="class_id -1; there are sentences for 0 to 26"):
    prepare({"class_id": np.int32(-1)})


def test_a_sentence_without_a_place_is_that_of_every_image():
  method = experiment.assemble(iedp_config(**{"method.sentence": "a photo of a street"})).method
  assert method.needs == {"tokens"} and not method.prepare_inputs
  assert method.prepare({})["tokens"].tolist() == method.prepare({"class_id": np.int32(5)})["tokens"].tolist()
  assert label_sentences.sentences_of("a photo of a {}", ("dining_room", "cafe")) == (
    "a photo of a dining room",
    "a photo of a cafe",
  )
  for wrong in ("", "{} and {}", "a {name}"):
    with pytest.raises(ValueError, match="must be a text with at most one"):
      label_sentences.sentences_of(wrong, ("a",))


def test_training_without_tokenizer_says_what_to_give():
  exp = experiment.assemble(iedp_config(**{"method.tokenizer": "", "init.clip": ""}))
  with pytest.raises(ValueError, match=r"there is no tokenizer .* set config.method.tokenizer to a folder") as caught:
    _ = exp.method.prepare
  assert "\n" not in str(caught.value)


def test_wrong_options_are_refused_together():
  changes = {"clip_features": "first", "num_queries": 0, "lambda_exp": -1.0, "output_norm": "bn"}
  config = iedp_config(**{f"method.{name}": value for name, value in changes.items()})
  with pytest.raises(ValueError) as caught:
    experiment.assemble(config)
  assert all(f"method.{name}" in str(caught.value) for name in changes) and "\n" not in str(caught.value)
  with pytest.raises(ValueError, match="num_heads=3 must divide 16"):
    experiment.assemble(iedp_config(**{"method.num_heads": 3}))
  with pytest.raises(ValueError, match="is 64 wide, the UNet's context 16"):
    experiment.assemble(iedp_config(**{"backbone.text.width": 64}))


def test_the_assumptions_in_force_are_told():
  (line,) = network()[0].method.notes
  assert line.startswith("IEDP assumptions in force")
  values = {**presets.iedp_assumptions(), "num_queries": TOKENS, "num_heads": 2, "ffn_ratio": 2, "lambda_exp": LAMBDA}
  values["tower_dtype"] = "float32"
  assert all(f"{name}={value!r}" in line for name, value in values.items())


def test_padding_is_the_vae_side_only(monkeypatch):
  """CLIP sees the picture, not the mid gray that the VAE's input grows by."""
  shapes = {}
  monkeypatch.setattr(image_input, "padded", lambda x, *a, p=image_input.padded: shapes.setdefault("vae", p(x, *a)))
  original = ClipImage.__call__
  monkeypatch.setattr(ClipImage, "__call__", lambda self, x: shapes.setdefault("clip", x) is None or original(self, x))
  exp, named = network()
  picture = {"image": jnp.zeros((1, 40, 48, 3), jnp.uint8)}
  jax.eval_shape(lambda n, b: exp.spec.merge(n).method(b, training=False), named, picture)
  assert shapes["vae"].shape == (1, 64, 64, 3) and shapes["clip"].shape == (1, 28, 28, 3)
