"""For which kind of device a program is traced."""

import jax


def platform() -> str:
  """Of the mesh that is traced for (sharding.tracing), else of this process: "cpu", "gpu", "tpu" and the like."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device else jax.default_backend()
  return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)
