"""LoRA: a frozen kernel W of the UNet is replaced by W + (alpha / rank) A B with trained A and B.

A kernel [.., in, out] of a linear layer or convolution is treated as a matrix [rest, out], where rest is the product of
all axes except the last; A is [rest, rank], B is [rank, out] and initialized with 0, so that the network is initially
unchanged. The sum is computed where arrays are merged into the model (parameters.ModelSpec.merge), outside of modules.

Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, section 4.1 (B A there is A B here).
"""

import functools
import math
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.parameters import ModelSpec
from vpd_jax.types import Array, Fields, ParamDict

PREFIX = "lora/"  # of the names of A and B, around that of their kernel: lora/KERNEL/a, lora/KERNEL/b
UNET = "method/unet/"
ATTENTION = (r"/attn[12]/to_(q|k|v|out/0)/kernel$",)  # the matrices of self- and cross-attention


def targets(trained: Iterable[str], shapes: Fields, rank: int, patterns: tuple[str, ...]) -> list[str]:
  """The kernels of the UNet that are adapted; none if the rank is 0.

  Args:
    trained: names of the arrays that the run would train without LoRA.
    shapes: by name.
    rank: config.lora.rank.
    patterns: config.lora.targets, regular expressions, searched in "/" + name; empty: ATTENTION.

  Raises:
    ValueError: no kernel of the UNet is trained; an invalid pattern, or one without match.
  """
  if not rank:
    return []
  kernels = sorted(n for n in trained if n.startswith(UNET) and len(shapes[n].shape) > 1)
  if not kernels:
    raise UserError(
      "config.lora adapts the UNet, but config.optim.lr_groups freezes all of it; give it a learning rate there, "
      "or set config.lora.rank=0."
    )
  try:
    matches = {pattern: [n for n in kernels if re.search(pattern, "/" + n)] for pattern in patterns or ATTENTION}
  except re.error as error:
    raise UserError(f"config.lora.targets: {error.pattern!r} is not a regular expression: {error}; fix it.") from error
  if unused := [pattern for pattern, names in matches.items() if not names]:
    raise UserError(
      f"config.lora.targets: {unused} match no kernel of the UNet that is trained, like {kernels[:2]}; correct "
      "or remove them."
    )
  return sorted({name for names in matches.values() for name in names})


def adapted(spec: ModelSpec, kernels: list[str], *, rank: int, alpha: float, seed: int, dtype: DTypeLike) -> ModelSpec:
  """Adds A and B of these kernels to the model; its `merge` applies them.

  Args:
    spec: of the model.
    kernels: from `targets`.
    rank: at least 1.
    alpha: above 0.
    seed: of A, which is normal with variance 1 / (3 rest), as in loralib's uniform distribution; B is 0.
    dtype: of A and B.

  Raises:
    ValueError: alpha is not above 0.
  """
  if not alpha > 0:
    raise UserError(f"config.lora.alpha={alpha} must be above 0.")
  draws = {}
  for name in kernels:
    *rest, out = spec.shapes[name].shape
    a, b = initializers.normal((3 * math.prod(rest)) ** -0.5).sample, initializers.zeros.sample
    draws[f"{PREFIX}{name}/a"] = initializers.Draw(a, seed, (math.prod(rest), rank), dtype)
    draws[f"{PREFIX}{name}/b"] = initializers.Draw(b, seed, (rank, out), dtype)
  shapes = {name: jax.ShapeDtypeStruct(draw.shape, draw.dtype) for name, draw in draws.items()}
  return spec._replace(
    shapes=spec.shapes | shapes,
    params=spec.params | shapes.keys(),
    draws=spec.draws | draws,
    fold=lambda named: merged(named, alpha),
  )


def merged(named: ParamDict, alpha: float) -> ParamDict:
  """Merges A and B into their kernels, in the wider of the dtypes.

  Args:
    named: all arrays, on the host or traced.
    alpha: with which A and B were trained; the rank is read from their shapes.
  """
  result = {name: x for name, x in named.items() if not name.startswith(PREFIX)}
  for name in named:
    if name.startswith(PREFIX) and name.endswith("/a"):
      kernel, a, b = name.removeprefix(PREFIX).removesuffix("/a"), named[name], named[name.removesuffix("a") + "b"]
      product = _product(a)(a, b).reshape(result[kernel].shape)
      result[kernel] = result[kernel] + product * np.asarray(alpha / a.shape[1], a.dtype)
  return result


def _product(a: Array) -> Callable[[Array, Array], Array]:
  """The matrix product in full precision, on the host or on devices."""
  return functools.partial(jnp.matmul, precision="highest") if isinstance(a, jax.Array) else np.matmul
