"""Weights that hold NaN or infinity, and steps whose loss does."""

import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vpd_jax.convert import finite

NAN, INF = np.float32(np.nan), np.float32(np.inf)
STEPS = [(7, np.float32(1), np.float32(1)), (8, NAN, INF)]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("device", [False, True])
def test_arrays_with_nan_or_infinity_are_named(kind, device):
  named = {"a": np.array([1, np.nan, -np.inf], kind), "b": np.ones(2, kind), "c": np.ones(2, np.int32)}
  named = {name: jnp.asarray(x) for name, x in named.items()} if device else named
  assert finite.count_non_finite(named) == {"a": 2}
  with pytest.raises(ValueError, match=r"^FILE: 1 arrays hold NaN or infinity: a \(2 numbers\); fetch") as caught:
    finite.check(named, "FILE")
  assert "\n" not in str(caught.value)
  finite.check({"b": named["b"]}, "FILE")


def test_a_loss_that_is_not_finite_tells_weights_from_data():
  state = types.SimpleNamespace(frozen={"method/vae/a": np.array([1, np.nan])})
  whole = types.SimpleNamespace(frozen={"method/vae/a": np.ones(2)})
  asked = []
  batch = lambda depth: lambda step: asked.append(step) or {"depth": np.array([depth]), "image": np.zeros(1, np.uint8)}
  blamed = {
    r"The weights are to blame: .*method/vae/a \(1 numbers\)": (state, batch(1.0)),
    r"The data are to blame: .*depth \(1 numbers\)": (whole, batch(np.inf)),
    r"hold finite numbers only\. Lower config\.optim\.lr or set": (whole, batch(1.0)),
    r"or look at the data of that step": (whole, lambda step: 1 / 0),
  }
  for words, given in blamed.items():
    with pytest.raises(FloatingPointError, match=rf"^the loss of step 8 is nan.*{words}"):
      finite.check_finite(STEPS, *given)
  assert asked == [8, 8]
