"""Lovász-Softmax with static shapes, which sorts only the present classes.

Source: Berman et al. 2018, https://arxiv.org/abs/1705.08790; mmsegmentation 0.30 models/losses/lovasz_loss.py
(multi-class, classes "present", per_image False, the defaults in MetaPrompts' configs).
"""

import jax
import jax.numpy as jnp

from vpd_jax.types import Array

BITS = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def lovasz_softmax(logits: Array, label: Array, valid: Array) -> Array:
  """Mean over the present classes c of the Lovász extension of the Jaccard loss of the errors |1[label = c] - p_c|.

  For one class the errors are sorted, largest first, and multiplied by the steps of the Jaccard loss
  J_k = 1 - (G - f_k) / (G + b_k), where f_k and b_k count the pixels of the class and the others among the first k, and
  G all pixels of the class. No gradient flows through order and steps. Pixels without a label are ignored.

  Args:
    logits: float32 or wider [N, K]: all pixels that belong together.
    label: int [N]; arbitrary where not valid.
    valid: bool [N].

  Returns:
    float []; 0 if no pixel is valid.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  label = jnp.where(valid, label, -1)
  steps, present = jaccard_steps(*map(jax.lax.stop_gradient, (probabilities, label)))
  truth = label[:, None] == jnp.arange(logits.shape[-1])[None]
  return (jnp.abs(truth.astype(logits.dtype) - probabilities) * steps).sum() / jnp.maximum(present, 1)


def jaccard_steps(probabilities: Array, label: Array) -> tuple[Array, Array]:
  """The step of the Jaccard loss for each pixel and class, and the number of present classes.

  Loops over the present classes only, since an image contains about ten of 150 and sorting is expensive.

  Args:
    probabilities: float [N, K].
    label: int [N]; -1 marks ignored pixels.

  Returns:
    float [N, K], 0 for absent classes and ignored pixels; int32 [].
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
  """Steps of one class, float [N], from its probabilities, its pixels, the valid pixels, and its area."""
  errors = jnp.where(valid, jnp.abs(truth.astype(p.dtype) - p), 0)
  # Bit patterns of nonnegative floats have the same order as the floats, and are faster to sort. Their complement sorts
  # in descending order.
  keys = ~jax.lax.bitcast_convert_type(errors, BITS[p.dtype.itemsize])
  packed = 2 * jnp.arange(p.shape[0], dtype=jnp.int32) + truth.astype(jnp.int32)  # position and truth in one number
  _, packed = jax.lax.sort((keys, packed), num_keys=1, is_stable=False)
  inside = packed % 2
  hits = jnp.cumsum(inside)
  others = jnp.arange(1, p.shape[0] + 1, dtype=jnp.int32) - hits
  # J_k - J_(k-1) in closed form: subtracting two numbers close to 1 would lose precision.
  total, left = (area + others).astype(p.dtype), (area - hits).astype(p.dtype)
  # For pixels of the class total >= area >= 1; for others, others >= 1, so total - 1 >= area >= 1.
  steps = jnp.where(inside == 1, 1 / total, left / (total * jnp.maximum(total - 1, 1)))
  steps = jnp.zeros_like(p).at[packed // 2].set(steps, unique_indices=True)
  return jnp.where(valid, steps, 0)
