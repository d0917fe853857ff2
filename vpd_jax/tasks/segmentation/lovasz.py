"""Lovász-Softmax with static shapes, sorting only the classes that are there.

Source: Berman et al. 2018, https://arxiv.org/abs/1705.08790; mmsegmentation 0.30 models/losses/lovasz_loss.py
(multi-class, classes "present", per_image False, as MetaPrompts' configs leave it).
"""

import jax
import jax.numpy as jnp

from vpd_jax.types import Array

BITS = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def lovasz_softmax(logits: Array, label: Array, valid: Array) -> Array:
  """Mean over the present classes c of the Lovász extension of the Jaccard loss of the errors |1[label = c] - p_c|.

  For one class the errors are sorted, largest first, and multiplied by the steps of the Jaccard loss
  J_k = 1 - (G - f_k) / (G + b_k), where f_k and b_k count the pixels of the class and the others among the first k, and
  G all of the class.
  No gradient flows through order and steps. Pixels without a label count nowhere.

  Args:
    logits: float32 or wider [N, K]: all pixels that belong together.
    label: int [N]; any number where not valid.
    valid: bool [N].

  Returns:
    float []; 0 where no pixel is valid.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  label = jnp.where(valid, label, -1)
  steps, present = jaccard_steps(*map(jax.lax.stop_gradient, (probabilities, label)))
  truth = label[:, None] == jnp.arange(logits.shape[-1])[None]
  return (jnp.abs(truth.astype(logits.dtype) - probabilities) * steps).sum() / jnp.maximum(present, 1)


def jaccard_steps(probabilities: Array, label: Array) -> tuple[Array, Array]:
  """The step of the Jaccard loss that belongs to each pixel and class, and the number of present classes.

  A loop over the present classes: an image shows ten of 150, and sorting is what costs.

  Args:
    probabilities: float [N, K].
    label: int [N]; -1 marks a pixel that does not count.

  Returns:
    float [N, K], 0 for absent classes and pixels that do not count; int32 [].
  """
  classes = probabilities.shape[-1]
  areas = jax.ops.segment_sum(jnp.ones_like(label), jnp.where(label < 0, classes, label), classes + 1)[:classes]
  (order,) = jnp.nonzero(areas, size=classes, fill_value=0)
  present = (areas > 0).sum(dtype=jnp.int32)

  def add(i: Array, steps: Array) -> Array:
    c = order[i]
    p = jax.lax.dynamic_index_in_dim(probabilities, c, axis=1, keepdims=False)
    column = class_steps(p, label == c, label >= 0, areas[c])
    return jax.lax.dynamic_update_index_in_dim(steps, column, c, axis=1)

  return jax.lax.fori_loop(0, present, add, jnp.zeros_like(probabilities)), present


def class_steps(p: Array, truth: Array, valid: Array, area: Array) -> Array:
  """Steps of one class, float [N], from its probabilities, its pixels, those that count, and its area."""
  errors = jnp.where(valid, jnp.abs(truth.astype(p.dtype) - p), 0)
  # The bits of numbers that are not negative stand in their order, and sort faster than the numbers. All ones minus
  # them is the order from the largest down.
  keys = ~jax.lax.bitcast_convert_type(errors, BITS[p.dtype.itemsize])
  places = 2 * jnp.arange(p.shape[0], dtype=jnp.int32) + truth.astype(jnp.int32)  # two numbers in one: sorted together
  _, places = jax.lax.sort((keys, places), num_keys=1, is_stable=False)
  inside = places % 2
  found = jnp.cumsum(inside)
  others = jnp.arange(1, p.shape[0] + 1, dtype=jnp.int32) - found
  # J_k - J_(k-1) in closed form: the difference of two numbers close to 1 would lose most of its digits.
  total, left = (area + others).astype(p.dtype), (area - found).astype(p.dtype)
  # A pixel of the class has total >= area >= 1; another one has others >= 1, so total - 1 >= area >= 1.
  steps = jnp.where(inside == 1, 1 / total, left / (total * jnp.maximum(total - 1, 1)))
  steps = jnp.zeros_like(p).at[places // 2].set(steps, unique_indices=True)
  return jnp.where(valid, steps, 0)
