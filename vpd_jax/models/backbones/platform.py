"""For which kind of device a program is traced."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_any = contextvars.ContextVar("any platform", default=False)


def platform() -> str:
  """Of the mesh that is traced for (sharding.tracing), else of this process: "cpu", "gpu", "tpu" and the like.

  "any" inside `any_platform`.
  """
  if _any.get():
    return "any"
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device else jax.default_backend()
  return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@contextlib.contextmanager
def any_platform() -> Iterator[None]:
  """What is traced inside holds no kernel of one platform, and runs on all."""
  token = _any.set(True)
  try:
    yield
  finally:
    _any.reset(token)
