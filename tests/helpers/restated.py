"""Layers restated."""

import jax.numpy as jnp
import numpy as np


def bilinear(x, size, *, method="bilinear"):
  """A restatement of resizing without antialiasing, axis by axis: sample (i + 1/2) in / out - 1/2, edges repeated."""
  assert method == "bilinear"
  for axis, new in zip((1, 2), size, strict=True):
    old = x.shape[axis]
    at = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
    low = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    weights[np.arange(new), low] += 1 - (at - low)
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += at - low
    x = jnp.moveaxis(jnp.tensordot(jnp.asarray(weights, x.dtype), x, axes=(1, axis)), 0, axis)
  return x


def convolved(x, kernel, bias, stride=1):
  """A convolution with padding (size - 1) // 2, in float64."""
  size = kernel.shape[0]
  pad = (size - 1) // 2
  x = np.pad(np.asarray(x, np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
  out = np.zeros((x.shape[0], rows, columns, kernel.shape[3])) + bias
  for a, b in np.ndindex(size, size):
    out += x[:, a : a + stride * rows : stride, b : b + stride * columns : stride][:, :rows, :columns] @ kernel[a, b]
  return out


def group_normed(x, scale, bias, groups=16):
  parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
  mean, var = (f(axis=(1, 3), keepdims=True) for f in (parts.mean, parts.var))
  return ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias
