"""The model: head(neck(method(batch)))."""

from flax import nnx

from vpd_jax.types import Array, Batch, Outputs


class PerceptionModel(nnx.Module):
  """Method, neck and head, which vary independently."""

  def __init__(self, method: nnx.Module, neck: nnx.Module, head: nnx.Module):
    self.method, self.neck, self.head = method, neck, head

  def __call__(self, batch: Batch, *, training: bool, key: Array | None = None) -> Outputs:
    """Outputs of len(method.branches(training)) * B rows, branch by branch; `key` is used for sampling."""
    features = self.method(batch, training=training, key=key)
    return self.head(self.neck(features, training=training), training=training, key=key)
