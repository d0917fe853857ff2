"""Six steps on the embedded rooms as a command, and how they end."""

import sys

import numpy as np

from tests.helpers.rooms_runs import arrays, rooms
from vpd_jax.config import loader

CONFIG = "configs/rooms.py:depth,tiny"
STEPS = 6


def config(**changes):
  """Six steps, each of them saved, every third one evaluated."""
  return rooms(**({"num_steps": STEPS, "eval_every": 3, "save_every": 1, "keep": 2} | changes))


def flat(section, prefix=""):
  """{dotted name: value} of a config."""
  items = ((f"{prefix}{key}", value) for key, value in section.items())
  return {
    k: v
    for key, value in items
    for k, v in (flat(value, f"{key}.") if hasattr(value, "items") else {key: value}).items()
  }


def command(workdir, **changes):
  """The command line of that run: python -m vpd_jax.main and what differs from the file."""
  shipped = flat(loader.load(CONFIG))
  flags = [f"--config.{key}={value}" for key, value in flat(config(**changes)).items() if value != shipped[key]]
  return [sys.executable, "-m", "vpd_jax.main", f"--config={CONFIG}", f"--workdir={workdir}", *flags]


def assert_final(workdir, expected, step=STEPS):
  found = arrays(workdir, step)
  assert expected.keys() == found.keys() and len(expected) > 300
  for name, value in expected.items():
    np.testing.assert_array_equal(value, found[name], err_msg=name)
