"""Device topologies for ahead-of-time compilation: TPU slices by libtpu, GPUs by JAX's CUDA plugin."""

import importlib.metadata
import importlib.util
import os
import re

from jax.experimental import topologies

from vpd_jax.distributed import sharding
from vpd_jax.errors import UserError, one_line
from vpd_jax.types import Device, Fields, Options

EFFORTS = ("low", "default")
OPTIONS: dict[str, Fields] = {
  "default": {},
  # Compiles in minutes; the program is slower and needs more memory than that of a run. The levels are
  # XLA's EFFORT_O0: the two efforts alone took five times as long for VPD on v5e:2x4, without saving memory.
  "low": {
    **{"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
    **{"optimization_level": 9, "memory_fitting_level": 9},
  },
  # Without a GPU kernels cannot be timed: uses the libraries' default choices instead of autotuning.
  "untimed": {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False},
}
# Otherwise libtpu queries a metadata server, logs verbosely, and allows only one process.
QUIET = {
  **{"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"},
  **{"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
}
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e
_TPU = re.compile(rf"v(?:5e|6e):(?:{'|'.join(SLICES)})|v(?:4|5p):\d+x\d+x\d+")
_GPU = re.compile(r"([a-z]+\d+g?(?:-\d+gb)?):(\d+)")
# By compute capability: CUDA C++ Programming Guide, technical specifications.
_HOPPER = {"capability": (9, 0), "threads": 2048, "fpus": 128, "shared": 233472, "most_shared": 232448}
_ADA = {"capability": (8, 9), "threads": 1536, "fpus": 128, "shared": 102400, "most_shared": 101376}
_GA102 = {**_ADA, "capability": (8, 6)}
_GA100 = {"capability": (8, 0), "threads": 2048, "fpus": 64, "shared": 167936, "most_shared": 166912}
_TURING = {"capability": (7, 5), "threads": 1024, "fpus": 64, "shared": 65536, "most_shared": 65536}
_H100 = {**_HOPPER, "cores": 132, "l2": 52428800, "clock": 1.98}
_A100 = {**_GA100, "cores": 108, "l2": 41943040, "clock": 1.41}
# Properties of a GPU that XLA needs; bandwidth in bytes per second, memory in bytes, clock (boost) in GHz.
GPUS: dict[str, Options] = {
  "a100-40gb": {"name": "NVIDIA A100-SXM4-40GB", "bandwidth": 1555e9, "memory": 42.4e9, **_A100},
  "a100-80gb": {"name": "NVIDIA A100-SXM4-80GB", "bandwidth": 2039e9, "memory": 84.9e9, **_A100},
  "h100": {"name": "NVIDIA H100 80GB HBM3", "bandwidth": 3352e9, "memory": 84.9e9, **_H100},
  "h200": {"name": "NVIDIA H200", "bandwidth": 4800e9, "memory": 150.1e9, **_H100},
  "t4": {
    **{"name": "Tesla T4", "bandwidth": 320e9, "memory": 15.8e9, "cores": 40, "l2": 4194304, "clock": 1.59},
    **_TURING,
  },
  "l4": {
    **{"name": "NVIDIA L4", "bandwidth": 300e9, "memory": 23.6e9, "cores": 58, "l2": 50331648, "clock": 2.04},
    **_ADA,
  },
  "a10g": {
    **{"name": "NVIDIA A10G", "bandwidth": 600e9, "memory": 23.7e9, "cores": 80, "l2": 6291456, "clock": 1.71},
    **_GA102,
  },
  "rtx3090": {
    **{"name": "NVIDIA GeForce RTX 3090", "bandwidth": 936e9, "memory": 25.4e9, "cores": 82, "l2": 6291456},
    **{"clock": 1.695, **_GA102},
  },
  "rtx4090": {
    **{"name": "NVIDIA GeForce RTX 4090", "bandwidth": 1008e9, "memory": 25.4e9, "cores": 128, "l2": 75497472},
    **{"clock": 2.52, **_ADA},
  },
}
KNOWN = (
  f"known are v5e and v6e with {', '.join(SLICES)}, as v5e:2x4; v4 and v5p as v5p:2x2x1; and any number of "
  f"{', '.join(GPUS)}, as h200:8"
)
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {most_shared}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


def topology_devices(topology: str) -> list[Device]:
  """The devices of a topology, for which programs can be compiled but not run.

  Args:
    topology: a TPU slice as named by libtpu, like "v5e:2x4", or a GPU and their number, like "h200:8".

  Raises:
    ValueError: its compiler is not installed, it is unknown, or jax cannot create a mesh for it, as for v4.
  """
  gpu = _gpu(topology)
  if not gpu and not _TPU.fullmatch(topology):
    raise UserError(f"--topology={topology!r} is unknown; {KNOWN}.")
  needed = PLUGINS if gpu else ("libtpu",)
  if not any(map(importlib.util.find_spec, needed)):
    package, extra = ("JAX's CUDA plugin, which also compiles without a GPU", "cuda12") if gpu else (
      "libtpu, which also runs without a TPU", "plan")  # fmt: skip
    raise UserError(f"--topology={topology!r} needs {package}: pip install 'vpd_jax[{extra}]'.")
  try:
    devices = _gpus(*gpu) if gpu else _tpus(topology)
    sharding.make_mesh(devices=devices)
  except Exception as error:
    raise UserError(f"--topology={topology!r} cannot be planned for ({one_line(error)[:200]}); {KNOWN}.") from error
  return devices


def compiler(topology: str) -> str:
  """Name and version of the compiler for a topology; without one, for the local devices."""
  for name in (PLUGINS if _gpu(topology) else ("libtpu",)) if topology else ("jaxlib",):
    if importlib.util.find_spec(name):
      try:
        return f"{name} {importlib.metadata.version(name)}"
      except importlib.metadata.PackageNotFoundError:
        return name
  return "?"


def effort(topology: str, requested: str) -> str:
  """Key of OPTIONS for compilation: always "untimed" for GPU topologies.

  Raises:
    ValueError: an effort other than the first is requested for a topology without a choice.
  """
  if _gpu(topology) and requested != EFFORTS[0]:
    raise UserError(f"--effort={requested!r} would have no effect with --topology={topology!r}; leave it out.")
  return "default" if not topology else "untimed" if _gpu(topology) else requested


def _gpu(topology: str) -> tuple[str, int] | None:
  """Name and number of the GPUs; None for a TPU slice."""
  match = _GPU.fullmatch(topology)
  return (match[1], int(match[2])) if match and match[1] in GPUS else None


def _gpus(name: str, count: int) -> list[Device]:
  hosts = f"1x{count // 8}x8" if count % 8 == 0 else f"1x1x{count}"
  description = _DESCRIPTION.format(**GPUS[name])
  return list(topologies.get_topology_desc("", "cuda", target_config=description, topology=hosts).devices)


def _tpus(topology: str) -> list[Device]:
  for name, value in QUIET.items():
    os.environ.setdefault(name, value)
  # A host has four chips by default.
  alone = {"chips_per_host_bounds": (1, 1, 1)} if re.search(r":1(x1)*$", topology) else {}
  return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices)
