"""Accelerators: names, peak rates and memory."""

import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """One accelerator.

  Attributes:
    name: in the vendor's documentation.
    kind: regular expression that matches the lower-case `device_kind`.
    peak: dense bfloat16 operations per second of a chip, as stated by the vendor.
    bandwidth: bytes per second between a chip and its memory, as stated by the vendor.
    memory: bytes of a device that a program can use; None if unknown. For TPUs the limit that the compiler of libtpu
      0.0.51 reports, for GPUs three quarters of the memory, which JAX preallocates.
    devices: JAX devices per chip, where each core is a device of its own (TPU v4, 7x).
  """

  name: str
  kind: str
  peak: float
  bandwidth: float
  memory: float | None
  devices: int = 1


# Sources: cloud.google.com/tpu/docs/system-architecture-tpu-vm, data sheets of NVIDIA (without sparsity).
CHIPS = (
  Chip("TPU v4", r"tpu v4", 275e12, 1228e9, 15.25 * GIB, 2),
  Chip("TPU v5e", r"tpu v5 ?(lite|e)", 197e12, 819e9, 15.75 * GIB),
  Chip("TPU v5p", r"tpu v5p?$", 459e12, 2765e9, 95.74 * GIB),
  Chip("TPU v6e", r"tpu v6 ?(lite|e)", 918e12, 1640e9, 31.25 * GIB),
  Chip("TPU7x", r"tpu ?v?7x", 2307e12, 7380e9, 94.75 * GIB, 2),
  Chip("V100", r"v100", 125e12, 900e9, None),  # float16: it has no bfloat16
  Chip("A100 40 GB", r"a100.*40gb", 312e12, 1555e9, 31.8e9),
  Chip("A100 80 GB", r"a100.*80gb", 312e12, 2039e9, 63.7e9),
  Chip("T4", r"\bt4\b", 65e12, 320e9, 11.85e9),  # float16: it has no bfloat16
  Chip("L4", r"\bl4\b", 121e12, 300e9, 17.7e9),
  Chip("A10G", r"a10g", 70e12, 600e9, 17.8e9),
  Chip("RTX 3090", r"rtx 3090$", 71e12, 936e9, 19.05e9),
  Chip("RTX 4090", r"rtx 4090$", 165e12, 1008e9, 19.05e9),
  Chip("H100 PCIe", r"h100 pcie", 756e12, 2000e9, 63.7e9),
  Chip("H100", r"h100", 989e12, 3350e9, 63.7e9),
  Chip("H200", r"h200", 989e12, 4800e9, 112.6e9),
)


def chip_for(device_kind: str) -> Chip | None:
  """The chip of a `device_kind` such as "TPU v5 lite" or "NVIDIA H200"; None if it is not in the table."""
  return next((chip for chip in CHIPS if re.search(chip.kind, device_kind.lower())), None)


def share_of_peak(rate: float, device_kind: str) -> float | None:
  """Operations per second of one device as a fraction of its peak; None if the peak is not known."""
  chip = chip_for(device_kind)
  return None if chip is None else rate * chip.devices / chip.peak
