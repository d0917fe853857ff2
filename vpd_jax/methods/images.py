"""What every method does to the image before the VAE."""

from typing import Any

import jax.numpy as jnp

from vpd_jax.types import Array


def signed(image: Array, dtype: Any) -> Array:
  """uint8 [B, H, W, 3], or float in [0, 1], to float in [-1, 1]; scaled in float32 or wider, then cast."""
  high = jnp.promote_types(dtype, jnp.float32)
  image = image.astype(high) / 255 if jnp.issubdtype(image.dtype, jnp.integer) else image.astype(high)
  return (image * 2 - 1).astype(dtype)


def padded(image: Array, multiple: int, value: float) -> Array:
  """[B, H, W, C] grown at the right and bottom to multiples of `multiple`, with `value`."""
  bottom, right = (-side % multiple for side in image.shape[1:3])
  return jnp.pad(image, ((0, 0), (0, bottom), (0, right), (0, 0)), constant_values=value)
