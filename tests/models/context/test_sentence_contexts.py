"""Contexts behind a sentence: MetaPrompts' learned prompts, IEDP's tokens of the image."""

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from vpd_jax import experiment
from vpd_jax.config import loader

QUICK = {"xla_backend_optimization_level": 0}
# Tokens behind those of the sentence, and the trained arrays that make them.
BEHIND = {"meta_prompts": (50, "method/meta_prompts/0"), "iedp": (8, "method/implicit/queries")}


def config_of(method):
  return tiny.shrunk(loader.load(f"configs/refcoco_refer.py:{method},tiny"))


@pytest.mark.parametrize("method", BEHIND)
def test_the_network_attends_to_the_sentence_and_to_what_stands_behind_it(method):
  exp = experiment.assemble(config_of(method), training=False)
  count, name = BEHIND[method]
  shapes, made = exp.spec.shapes, exp.method
  width = shapes[name].shape[-1]
  assert shapes[name].shape == (count, width) and name in exp.groups.lr
  assert made.sentence_tokens == (8, width) and made.map_info.tokens == (8 + count, width)
  assert made.prepare_inputs == {"sentence"} and exp.keys == ("image", "mask", "tokens")
  assert [branch for branch in made.branches(True)] == list(made.branches(False)) and len(made.branches(True)) == 1
  encoder = [n for n in shapes if n.startswith("method/text_encoder/")]
  assert encoder and not set(encoder) & set(exp.groups.lr)
  named = tiny.filled(shapes)
  rng = np.random.default_rng(0)
  batch = {"image": rng.integers(0, 256, (2, 64, 64, 3), np.uint8), "tokens": rng.integers(0, 98, (2, 8), np.int32)}

  def forward(named, batch):
    model = exp.spec.merge(named)
    features = model.method(batch, training=False)
    return features.context, model(batch, training=False)["logits"], model.method.text_states(batch)

  run = jax.jit(forward).lower(named, batch).compile(QUICK)
  context, logits, states = run(named, batch)
  assert context.shape == (2, 8 + count, width) and logits.shape == (2, 64, 64, 2)
  assert np.isfinite(logits).all()
  if method == "meta_prompts":  # as they are, both
    np.testing.assert_array_equal(context[:, :8], states)
    np.testing.assert_array_equal(context[:, 8:], np.broadcast_to(named[name], (2, count, width)))
  else:
    assert np.abs(context[:, :8] - states).max() > 0  # gamma times the adapter
  other = run(named, batch | {"tokens": batch["tokens"][::-1]})
  np.testing.assert_array_equal(other[2], states[::-1])
  np.testing.assert_allclose(other[0][:, 8:], context[:, 8:], atol=1e-6)
  assert np.abs(other[1] - logits).max() > 1e-6


@pytest.mark.parametrize("method, changes, message", [
  ("meta_prompts", {"method.prompt": "sentence"}, r"'sentence' is unknown to meta_prompts; choose one of \('learned',"),
  ("iedp", {"method.prompt": "sentence"}, r"method\.prompt='sentence' is unknown; choose one of \('image',"),
  ("iedp", {"method.branch_mode": "both"}, r"has one branch; set method\.branch_mode='implicit'"),
  ("meta_prompts", {"method.token_length": 90}, r"token_length=90 is beyond the 8 positions"),
])  # fmt: skip
def test_what_cannot_be_is_refused(method, changes, message):
  config = config_of(method).unlock()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    experiment.assemble(config.lock())
