"""Common constructor arguments of layers, necks and heads."""

import dataclasses
from typing import Any, TypedDict

from flax import nnx
from jax.typing import DTypeLike


class LayerOptions(TypedDict):
  """Keyword arguments of every layer.

  Attributes:
    dtype: of computation.
    param_dtype: of parameters.
    rngs: for their initial values; `initializers.InitKeys` for models without arrays, see `parameters.describe`.
  """

  dtype: DTypeLike
  param_dtype: DTypeLike
  rngs: nnx.Rngs


@dataclasses.dataclass(frozen=True)
class Common:
  """Dtypes, random keys and the groups of batch normalization.

  Attributes:
    dtype, param_dtype, rngs: see LayerOptions.
    norm_group: images per group of batch normalization, 0 for the whole batch.
  """

  dtype: DTypeLike
  param_dtype: DTypeLike
  rngs: Any  # nnx.Rngs or InitKeys
  norm_group: int = 0

  @property
  def layer(self) -> LayerOptions:
    """The keyword arguments of a layer."""
    return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}
