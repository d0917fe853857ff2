"""Initial values on the host have the distributions of jax.nn.initializers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpd_jax.models import initializers
from vpd_jax.models.initializers import HostKey

SHAPE = (3, 3, 40, 60)
CHOICES = {
  "zeros": (initializers.zeros, jax.nn.initializers.zeros),
  "ones": (initializers.ones, jax.nn.initializers.ones),
  "normal": (initializers.normal(0.3), jax.nn.initializers.normal(0.3)),
  "truncated_normal": (initializers.truncated_normal(0.02), jax.nn.initializers.truncated_normal(0.02)),
  "lecun_normal": (initializers.lecun_normal, jax.nn.initializers.lecun_normal()),
  "he_normal": (initializers.he_normal, jax.nn.initializers.he_normal()),
  "xavier_uniform": (
    initializers.variance_scaling(1.0, "fan_avg", "uniform"),
    jax.nn.initializers.xavier_uniform(),
  ),
  "fan_out": (
    initializers.variance_scaling(2.0, "fan_out", "normal"),
    jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
  ),
  "torch_default": (
    initializers.torch_default,
    jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
  ),
}


def drawn(initializer, name="a", seed=0, shape=SHAPE, dtype=jnp.float32):
  with initializers.recording() as record:
    initializer(HostKey(seed), shape, dtype)
  ((_, draw),) = record
  return draw(name)


@pytest.mark.parametrize("name", CHOICES)
def test_values_on_the_host_are_distributed_as_jaxs(name):
  ours, reference = CHOICES[name]
  values, expected = drawn(ours), np.asarray(reference(jax.random.key(1), SHAPE, jnp.float32))
  assert values.shape == SHAPE and values.dtype == np.float32
  np.testing.assert_allclose(values.std(), expected.std(), rtol=0.02)
  for quantile in (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0):
    if name in ("normal", "fan_out") and quantile in (0.0, 1.0):
      continue  # a distribution without ends
    np.testing.assert_allclose(np.quantile(values, quantile), np.quantile(expected, quantile), atol=0.06 * values.std())


@pytest.mark.parametrize("name", CHOICES)
def test_with_a_jax_key_the_values_are_jaxs_own(name):
  ours, reference = CHOICES[name]
  key = jax.random.key(0)
  np.testing.assert_array_equal(ours(key, (4, 6), jnp.float32), reference(key, (4, 6), jnp.float32))


def test_one_matrix_serves_all_taps():
  nearest = initializers.nearest(initializers.he_normal)
  shape = (2, 2, 4, 6)
  ours = drawn(nearest, shape=shape)
  reference = nearest(jax.random.key(0), shape, jnp.float32)
  for values in (ours, reference):
    assert values.shape == shape and np.std(values) > 0
    np.testing.assert_array_equal(values, np.broadcast_to(values[:1, :1], shape))


def test_values_depend_on_the_seed_and_the_name_alone():
  first = drawn(initializers.normal(1.0), "a", 0)
  np.testing.assert_array_equal(first, drawn(initializers.normal(1.0), "a", 0))
  for other in (drawn(initializers.normal(1.0), "b", 0), drawn(initializers.normal(1.0), "a", 1)):
    assert (first != other).mean() > 0.99


def test_a_dtype_is_kept():
  assert drawn(initializers.he_normal, dtype=jnp.bfloat16).dtype == jnp.bfloat16
  assert drawn(initializers.constant(3), shape=(2,), dtype=jnp.int32).tolist() == [3, 3]


def test_a_host_key_outside_of_describing_is_refused():
  with pytest.raises(RuntimeError, match=r"only described.*nnx\.Rngs"):
    initializers.ones(HostKey(0), (2,), jnp.float32)
