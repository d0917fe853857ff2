"""Referring segmentation assembled: a step, evaluation at both sizes, the same whatever is kept; the text matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.referring_rooms import small
from vpd_jax import experiment
from vpd_jax.data import pipeline
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import encoder_cache, evaluate
from vpd_jax.training import step as training_step

QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def run():
  config = small()
  exp = experiment.assemble(config)
  dataset = experiment.dataset(config, exp)
  state = tiny.train_state(exp, tiny.filled(exp.spec.shapes))
  batch = first_batch(config, exp, state)
  step = jax.jit(training_step.make_step(exp, loss_group=0)).lower(state, batch).compile(QUICK)
  return config, exp, dataset, state, batch, *step(state, batch), step


def test_a_run_begins_with_how_many_sentences_are_cut(run):
  config, exp, dataset, *_ = run
  count = len(dataset.source("eval"))
  expected = [f"eval: {count} sentences, 0 of them truncated to 8 tokens (method.token_length)"]
  assert experiment.sentence_lines(exp, dataset) == expected  # those of training are drawn when asked for
  short = config.copy_and_resolve_references().unlock()
  short.method.token_length = 4
  cut = experiment.sentence_lines(experiment.assemble(short.lock()), dataset, ("eval",))
  assert cut[0].startswith(
    f"eval: {count} sentences, {count} of them truncated to 4 tokens (method.token_length), such as"
  )


def one_device():
  return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def first_batch(config, exp, state, times=1):
  """The first training batch, computed or found so many times."""
  dataset = experiment.dataset(config, exp)
  encodings = encoder_cache.EncoderCache(config, exp, dataset, one_device())
  for _ in range(times):
    keys = experiment.batch_keys(exp, dataset)
    made = pipeline.train_batches(dataset, batch_size=4, seed=0, keys=keys, prepare=exp.method.prepare)
    encoded = encodings(made, state.frozen)
    batch = jax.tree.map(jnp.asarray, next(encoded))
  assert any(encoded.computed.values()) == (times == 1)
  return batch


def test_a_step_trains_what_it_should(run):
  _, _, _, state, batch, new, logs, _ = run
  assert set(batch) == {"image", "mask", "latents", "text_states"} and batch["text_states"].shape == (4, 8, 16)
  assert np.isfinite(logs["train/loss"])
  for name, value in state.frozen.items():
    np.testing.assert_array_equal(value, new.frozen[name])
  assert any(name.startswith("method/text_encoder/") for name in state.frozen)
  assert any(name.startswith("method/unet/out/") for name in state.frozen)
  moved = [name for name in state.params if (state.params[name] != new.params[name]).any()]
  assert len(moved) > 0.9 * len(state.params)


def test_a_step_from_kept_results_has_the_same_loss_and_gradients_to_the_last_bit(run, tmp_path):
  config, exp, _, state, _, new, logs, step = run
  for cache in ({"data.cache": "memory"}, {"data.cache": "disk", "data.cache_folder": str(tmp_path)}):
    changed = config.copy_and_resolve_references().unlock()
    changed.update_from_flattened_dict(cache)
    again, again_logs = step(state, first_batch(changed, exp, state, times=2))
    for first, second in ((new.params, again.params), (new.stats, again.stats), (logs, again_logs)):
      for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_both_sizes_are_scored_and_kept_results_change_no_pixel(run, tmp_path):
  config, exp, dataset, state, *_ = run
  weights = state.params, state.frozen, state.stats
  disk = {"data.cache": "disk", "data.cache_folder": str(tmp_path)}
  overlaps = []
  for at, cache in (("network", {}), ("original", disk), ("network", disk)):
    changed = config.copy_and_resolve_references().unlock()
    changed.update_from_flattened_dict({"task.eval_at": at, **cache})
    exp = experiment.assemble(changed)
    evaluator = evaluate.Evaluator(changed, exp, experiment.dataset(changed, exp), one_device())
    result = evaluator.run(weights)
    overlaps.append(result.rows)
    assert result.scores["eval/rooms/sentences"] == len(dataset.source("eval")) and result.panels.shape[0] > 1
    assert set(evaluator.baselines()) == {"constant_mask", "everything"}
  for name in ("intersection", "union"):
    np.testing.assert_array_equal(overlaps[0][name], overlaps[2][name])


def test_another_sentence_gives_another_answer(run):
  _, exp, _, state, batch, *_ = run
  forward = jax.jit(lambda b: exp.spec.merge(state.params, state.frozen, state.stats)(b, training=False)["logits"])
  logits = forward({k: batch[k] for k in ("image", "text_states")})
  np.testing.assert_array_equal(logits, forward({k: batch[k] for k in ("image", "text_states")}))
  others = forward({"image": batch["image"], "text_states": batch["text_states"][::-1]})
  assert np.abs(np.asarray(logits - others)).max() > 1e-5
