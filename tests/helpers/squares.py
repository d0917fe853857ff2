"""A data set of small arrays, and where its batches go."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vpd_jax.errors import UserError
from vpd_jax.types import Dataset, Source

KEYS = ("index", "position", "noise", "image")


class Squares(Dataset):
  """A data set of small arrays; the record `bad`, or those in the tuple, cannot be read."""

  provides = frozenset(KEYS)

  def __init__(self, records=10, bad=None):
    self.records, self.bad = records, bad

  def source(self, split):
    return Records(self.records, self.bad)

  def train_transform(self, example, rng, position):
    return dict(example, position=np.asarray(position), noise=np.asarray(rng.random()))

  def eval_transform(self, example):
    return example


class Records(Source):
  def __init__(self, records, bad):
    self.records, self.bad = records, bad

  def __len__(self):
    return self.records

  def __getitem__(self, index):
    if index in (self.bad if isinstance(self.bad, tuple) else (self.bad,)):
      raise UserError(f"folder/file_{index}.png is truncated.")
    return {"image": np.full((40, 50, 3), index, np.uint8), "index": np.asarray(index, np.int32)}


def sharding():
  devices = np.array(jax.devices())
  mesh = jax.sharding.Mesh(devices.reshape(-1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  return NamedSharding(mesh, P(("data", "fsdp")))
