"""The platform for which a program is traced."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_any = contextvars.ContextVar("any platform", default=False)


def platform() -> str:
  """The platform of the mesh in sharding.tracing, else of this process: "cpu", "gpu", "tpu" etc.

  "any" inside `any_platform`.
  """
  if _any.get():
    return "any"
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device else jax.default_backend()
  return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@contextlib.contextmanager
def any_platform() -> Iterator[None]:
  """A context in which traced programs contain no platform-specific kernels and run on all platforms."""
  token = _any.set(True)
  try:
    yield
  finally:
    _any.reset(token)
