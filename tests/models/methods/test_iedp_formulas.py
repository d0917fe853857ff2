"""IEDP's two contexts against restatements in numpy, term by term."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tests.helpers import fill, tiny
from tests.helpers.iedp import BATCH, TOKENS, WIDTH, batch, iedp_config
from vpd_jax import experiment
from vpd_jax.models import parameters
from vpd_jax.models.backbones.clip_image import pixels
from vpd_jax.models.context.clip_queries import ImplicitText
from vpd_jax.models.initializers import InitKeys


def gelu(x):
  return x * (1 + erf(x / math.sqrt(2))) / 2


def linear(named, name, x):
  return x @ named[f"{name}/kernel"] + named[f"{name}/bias"]


def layer_norm(named, name, x):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-5) * named[f"{name}/scale"] + named[f"{name}/bias"]


def mlp(named, name, x):
  return linear(named, f"{name}/2", gelu(linear(named, f"{name}/0", x)))


def attention(named, name, x, memory, heads):
  """One head after the other."""
  query, key, value = (
    linear(named, f"{name}/{p}_proj", y) for p, y in (("q", x), ("k", memory), ("v", memory))
  )  # fmt: skip
  out, width = np.zeros_like(query), x.shape[-1] // heads
  for head in range(heads):
    s = slice(head * width, (head + 1) * width)
    scores = np.exp(query[:, s] @ key[:, s].T / math.sqrt(width))
    out[:, s] = scores / scores.sum(-1, keepdims=True) @ value[:, s]
  return linear(named, f"{name}/out_proj", out)


def implicit_by_hand(named, features, heads, blocks):
  """Section 2 of the description, one image: V = pro(F); Qs = Q + SA(LN Q); Qc = Qs + CA(LN Qs, LN V); Qc + FFN."""
  visual, q = mlp(named, "projector", features), named["queries"]
  for i in range(blocks):
    b = f"blocks/{i}"
    normed = layer_norm(named, f"{b}/norm1", q)
    q = q + attention(named, f"{b}/self_attn", normed, normed, heads)
    q = q + attention(
      named, f"{b}/cross_attn", layer_norm(named, f"{b}/norm2", q), layer_norm(named, f"{b}/norm_visual", visual), heads
    )
    q = q + mlp(named, f"{b}/ffn", layer_norm(named, f"{b}/norm3", q))
  return layer_norm(named, "output_norm", q) if "output_norm/scale" in named else q


@pytest.mark.parametrize(("heads", "blocks", "norm", "ratio"), [(2, 1, "none", 4), (4, 1, "ln", 2), (1, 2, "none", 1)])
def test_implicit_text_is_the_formula(heads, blocks, norm, ratio):
  options = {"num_queries": 5, "query_init": 0.02, "num_heads": heads, "num_blocks": blocks, "ffn_ratio": ratio}
  kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": InitKeys(0)}
  parts = parameters.describe(lambda: ImplicitText(12, 8, **options, output_norm=norm, attention="auto", **kinds))
  assert parts.shapes["blocks/0/ffn/0/kernel"].shape == (8, 8 * ratio)
  named = tiny.filled(parts.shapes)
  features = fill.normal("features", (2, 7, 12), 0).astype(np.float32)
  found = jax.jit(lambda n, x: parts.merge(n)(x))(named, features)
  doubled = {name: value.astype(np.float64) for name, value in named.items()}
  for image, context in zip(features, found, strict=True):
    np.testing.assert_allclose(context, implicit_by_hand(doubled, image, heads, blocks), rtol=1e-4, atol=1e-5)


def test_queries_start_normal_with_the_given_deviation():
  kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
  options = {"num_queries": 77, "num_heads": 2, "num_blocks": 1, "ffn_ratio": 1, "output_norm": "none"}
  make = lambda: ImplicitText(8, 64, query_init=0.02, attention="auto", rngs=InitKeys(0), **options, **kinds)
  queries = parameters.describe(make).initialize(["queries"])["queries"]
  assert queries.shape == (77, 64) and abs(queries.std() - 0.02) < 1e-3 and abs(queries.mean()) < 1e-3


def contexts(config):
  """(implicit, explicit) contexts of the batch, and the states of CLIP's towers behind them."""
  exp = experiment.assemble(config)
  named = tiny.filled(exp.spec.shapes)

  def run(named, batch):
    method = exp.spec.merge(named).method
    seen = method.context.image_encoder(
      pixels(batch["image"], 28, dtype=jnp.float32, resize=method.context.clip_resize)
    )
    text = method.explicit.text_encoder(batch["tokens"])
    return method.context(batch), method.explicit(batch), seen.hidden, text

  return named, *jax.jit(run)(named, batch())


def below(named, prefix):
  return {n.removeprefix(prefix): np.asarray(x, np.float64) for n, x in named.items() if n.startswith(prefix)}


def test_contexts_are_the_formulas_on_the_states_of_clip():
  named, implicit, explicit, hidden, text = contexts(iedp_config())
  for i in range(BATCH):
    by_hand = implicit_by_hand(below(named, "method/implicit/"), np.asarray(hidden[-1][i], np.float64), 2, 1)
    np.testing.assert_allclose(implicit[i], by_hand, rtol=1e-4, atol=1e-5)
  c = np.asarray(text.last, np.float64)
  by_hand = c + named["method/gamma"] * mlp(below(named, "method/"), "text_adapter/fc", c)
  assert explicit.shape == (BATCH, TOKENS, WIDTH)
  np.testing.assert_allclose(explicit, by_hand, rtol=1e-4, atol=1e-5)


def test_other_features_and_other_text():
  changes = {"clip_features": "penultimate", "text_output": "pooled", "explicit_adapter": "none"}
  config = iedp_config(**{f"method.{name}": value for name, value in changes.items()})
  named, implicit, explicit, hidden, text = contexts(config)
  by_hand = implicit_by_hand(below(named, "method/implicit/"), np.asarray(hidden[-2][0], np.float64), 2, 1)
  np.testing.assert_allclose(implicit[0], by_hand, rtol=1e-4, atol=1e-5)
  end = np.argmax(np.asarray(batch()["tokens"]), axis=1)
  np.testing.assert_array_equal(explicit, np.asarray(text.last)[np.arange(BATCH), end][:, None])
  assert not any(n.startswith(("method/text_adapter", "method/gamma")) for n in named)
