"""An accelerator that the machine has and JAX does not use."""

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

# Variables that Cloud TPU VMs, GKE and Colab set on hosts of TPUs.
_TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "COLAB_TPU_ADDR")
_CUDA_13_DRIVER = 580  # the first driver that runs CUDA 13


def unused(environment: Mapping[str, str] = os.environ, root: str = "/") -> str:
  """One line for a run whose machine shows an accelerator while JAX's backend is the CPU; else an empty one.

  JAX only warns where its plugin for the accelerator is missing or of another version, and goes on slowly.

  Args:
    environment: JAX_PLATFORMS in it, which names a choice, silences this.
    root: of the file system that shows the devices.
  """
  if environment.get("JAX_PLATFORMS") or jax.default_backend() != "cpu":
    return ""
  device, extra = _found(environment, Path(root))
  if not extra:
    return ""
  return (
    f"warning: this machine has {device}, but JAX {jax.__version__} found no plugin for it and runs on the CPU. "
    f"Install both together: pip install -U 'vpd_jax[{extra}]'. JAX_PLATFORMS=cpu silences this."
  )


def _found(environment: Mapping[str, str], root: Path) -> tuple[str, str]:
  """What the machine has, in words, and the extra that serves it; two empty strings for nothing."""
  driver = root / "proc/driver/nvidia/version"
  if driver.exists() or glob.glob(str(root / "dev/nvidia[0-9]*")):
    version = re.search(r"\b(\d{3,})\.\d+", driver.read_text()) if driver.exists() else None
    new = version is not None and int(version[1]) >= _CUDA_13_DRIVER
    return "an NVIDIA GPU", "cuda13" if new else "cuda12"
  if glob.glob(str(root / "dev/accel*")) or any(environment.get(name) for name in _TPU_VARIABLES):
    return "a TPU", "tpu"
  return "", ""
