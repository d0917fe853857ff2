"""The model: head(neck(method(batch)))."""

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

from flax import nnx

from vpd_jax.models.methods.diffusion import MethodSetup
from vpd_jax.types import Array, Batch, Outputs


class PerceptionModel(nnx.Module):
  """Method, neck and head, which vary independently."""

  def __init__(self, method: nnx.Module, neck: nnx.Module, head: nnx.Module):
    self.method, self.neck, self.head = method, neck, head

  def __call__(self, batch: Batch, *, training: bool, key: Array | None = None) -> Outputs:
    """Outputs of len(method.branches(training)) * B rows, branch by branch; `key` is used for sampling."""
    features = self.method(batch, training=training, key=key)
    return self.head(self.neck(features, training=training), training=training, key=key)


class Part(NamedTuple):
  """A class and its keyword arguments, comparable by value."""

  cls: type
  options: tuple[tuple[str, Hashable], ...]

  def __call__(self, *args: object) -> Any:
    """An instance."""
    return self.cls(*args, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class ModelBuilder:
  """Builds a model; equal builders build equal models, see `parameters.described`.

  Attributes:
    setup: constructor argument of the method.
    method, neck, head: classes and options.
  """

  setup: MethodSetup
  method: Part
  neck: Part
  head: Part

  def __call__(self) -> PerceptionModel:
    """The model."""
    method = self.method(self.setup)
    neck = self.neck(method.map_info, self.setup.common)
    return PerceptionModel(method, neck, self.head(neck.map_info, self.setup.common))
