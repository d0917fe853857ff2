"""The one table of accelerators: peak rate, memory, and the names under which they are met."""

import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """One device as JAX counts them; of TPU v2, v3, v4 and 7x that is half a chip at times, see `devices`.

  Attributes:
    name: as in the documents.
    kind: regular expression, found in the lower-case `device_kind`.
    peak: dense bfloat16 operations a second of a chip, as its maker states; what a chip reaches is less.
    bandwidth: bytes a second between a chip and its memory, as its maker states.
    memory: bytes of a device that a program can use, where the device itself does not say; None where it must. Those of
      TPUs are what the compiler of libtpu 0.0.51 says when a program is too large, those of GPUs three quarters of all,
      which is what JAX takes.
    devices: per chip, when all of a chip's cores are devices of their own.
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
  Chip("L4", r"\bl4\b", 121e12, 300e9, None),
  Chip("H100 PCIe", r"h100 pcie", 756e12, 2000e9, 63.7e9),
  Chip("H100", r"h100", 989e12, 3350e9, 63.7e9),
  Chip("H200", r"h200", 989e12, 4800e9, 112.6e9),
)


def of(device_kind: str) -> Chip | None:
  """The chip that a device says it is, e.g. "TPU v5 lite" or "NVIDIA H200"; None where the table has no row for it."""
  return next((chip for chip in CHIPS if re.search(chip.kind, device_kind.lower())), None)


def share_of_peak(rate: float, device_kind: str) -> float | None:
  """Operations a second of one device as a share of the peak; None where that is not known."""
  chip = of(device_kind)
  return None if chip is None else rate * chip.devices / chip.peak
