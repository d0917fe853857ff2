"""Detection of an accelerator that JAX does not use."""

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Variables that Cloud TPU VMs, GKE and Colab set on hosts of TPUs.
_TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "COLAB_TPU_ADDR")
_CUDA_13_DRIVER = 580  # the first driver that runs CUDA 13


def unused(environment: Mapping[str, str] = os.environ, root: str = "/") -> str:
  """A warning for a machine with an accelerator on which JAX's backend is the CPU; else an empty string.

  JAX itself continues on the CPU if the plugin of the accelerator is missing or has another version.

  Args:
    environment: a value of JAX_PLATFORMS silences the warning.
    root: of the file system in which devices are looked up.
  """
  import jax  # late: `is_absent` is asked before JAX is imported

  if environment.get("JAX_PLATFORMS") or jax.default_backend() != "cpu":
    return ""
  device, extra = _detect(environment, Path(root))
  if not extra:
    return ""
  return (
    f"warning: this machine has {device}, but JAX {jax.__version__} found no plugin for it and runs on the CPU. "
    f"Install both together: pip install -U 'vpd_jax[{extra}]'. JAX_PLATFORMS=cpu silences this."
  )


def is_absent(environment: Mapping[str, str] = os.environ, root: str = "/") -> bool:
  """Whether JAX will run on the CPU, since no accelerator is found or JAX_PLATFORMS names the CPU; without JAX.

  Args: as for `unused`.
  """
  platforms = environment.get("JAX_PLATFORMS", "")
  return platforms == "cpu" or (not platforms and not any(_detect(environment, Path(root))))


def extra(environment: Mapping[str, str] = os.environ, root: str = "/") -> str:
  """The pip extra for the accelerator of this machine, "" without one; without JAX.

  Args: as for `unused`.
  """
  return _detect(environment, Path(root))[1]


def tpu_chips(root: str | Path = "/") -> list[str]:
  """Device files of the TPU chips of this host: of v2 to v4 `accel*`, of newer ones numbers in `vfio`."""
  devices = Path(root) / "dev"
  return glob.glob(str(devices / "accel*")) or glob.glob(str(devices / "vfio" / "[0-9]*"))


def _detect(environment: Mapping[str, str], root: Path) -> tuple[str, str]:
  """Name of the accelerator, and the pip extra that supports it; two empty strings if there is none."""
  driver = root / "proc/driver/nvidia/version"
  if driver.exists() or glob.glob(str(root / "dev/nvidia[0-9]*")):
    version = re.search(r"\b(\d{3,})\.\d+", driver.read_text()) if driver.exists() else None
    new = version is not None and int(version[1]) >= _CUDA_13_DRIVER
    return "an NVIDIA GPU", "cuda13" if new else "cuda12"
  if tpu_chips(root) or any(environment.get(name) for name in _TPU_VARIABLES):
    return "a TPU", "tpu"
  return "", ""
