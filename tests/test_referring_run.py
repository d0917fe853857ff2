"""Referring segmentation assembled: a step, an evaluation at both sizes, and that the sentence matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vpd_jax import assemble, config_file, evaluate, sharding, train
from vpd_jax.data import pipeline

QUICK = {"xla_backend_optimization_level": 0}


def small(**changes):
  config = config_file.load("configs/my_refer.py:tiny").unlock()
  config.data = {"name": "rooms", "task": "referring", "size": (64, 96), "crop": (64, 64), "train_count": 12,
                 "eval_count": 3, "batch_size": 4, "workers": 0, "on_bad_record": "stop"}  # fmt: skip
  config.eval.baselines = 4
  config.update_from_flattened_dict(changes)
  config = tiny.shrunk(config).unlock()
  config.data.update(eval_count=2, batch_size=4)
  return config.lock()


@pytest.fixture(scope="module")
def run():
  config = small()
  product = assemble.assemble(config)
  dataset = assemble.dataset(config, product)
  state = tiny.train_state(product, tiny.filled(product.parts.shapes))
  keys = assemble.batch_keys(product, dataset)
  made = pipeline.train_batches(dataset, batch_size=4, seed=0, keys=keys, prepare=product.method.prepare)
  batch = jax.tree.map(jnp.asarray, next(made))
  step = train.make_step(product, loss_group=0)
  new, logs = jax.jit(step).lower(state, batch).compile(QUICK)(state, batch)
  return config, product, dataset, state, batch, new, logs


def test_a_step_trains_what_it_should(run):
  _, _, _, state, batch, new, logs = run
  assert set(batch) == {"image", "mask", "tokens"} and batch["tokens"].shape == (4, 8)
  assert np.isfinite(logs["train/loss"])
  for name, value in state.frozen.items():
    np.testing.assert_array_equal(value, new.frozen[name])
  assert any(name.startswith("method/text_encoder/") for name in state.frozen)
  assert any(name.startswith("method/unet/out/") for name in state.frozen)
  moved = [name for name in state.params if (state.params[name] != new.params[name]).any()]
  assert len(moved) > 0.9 * len(state.params)


def test_both_sizes_are_scored(run):
  config, product, dataset, state, *_ = run
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  weights = state.params, state.frozen, state.stats
  for at in ("network", "original"):
    changed = config.copy_and_resolve_references().unlock()
    changed.task.eval_at = at
    product = assemble.assemble(changed)
    evaluator = evaluate.Evaluator(changed, product, assemble.dataset(changed, product), mesh)
    result = evaluator.run(weights)
    assert result.scores["eval/rooms/sentences"] == len(dataset.source("eval")) and result.panels.shape[0] > 1
    assert set(evaluator.baselines()) == {"constant_mask", "everything"}


def test_another_sentence_gives_another_answer(run):
  _, product, _, state, batch, *_ = run
  forward = jax.jit(lambda b: product.parts.merge(state.params, state.frozen, state.stats)(b, training=False)["logits"])
  logits = forward({k: batch[k] for k in ("image", "tokens")})
  np.testing.assert_array_equal(logits, forward({k: batch[k] for k in ("image", "tokens")}))
  others = forward({"image": batch["image"], "tokens": batch["tokens"][::-1]})
  assert np.abs(np.asarray(logits - others)).max() > 1e-5
