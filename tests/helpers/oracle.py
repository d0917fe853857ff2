"""The authors' numbers in tests/golden, and their weights rebuilt from names by fill.py."""

import gzip
import json
import re

import numpy as np

from tests.helpers import fill
from tests.helpers.paths import GOLDEN


def manifest(setup: str, size: str = "tiny") -> list[dict]:
  """Entries {name, shape, dtype, kind, alias_of} in state-dict order.

  "eco_depth_v2" is the list of v1 with the UNet's names of v2.0.0, which we read and did not run.
  """
  with gzip.open(GOLDEN / f"{setup.removesuffix('_v2')}.manifest.json.gz", "rt") as f:
    entries = json.load(f)[size]
  if setup.endswith("_v2"):
    entries = [e | {"name": e["name"].replace(".unet.unet.diffusion_model.", ".unet.")} for e in entries]
  return entries


def weights(setup: str, size: str = "tiny", seed: int = 0) -> dict[str, np.ndarray]:
  """The authors' state dict, in their names and layouts."""
  entries = [e for e in manifest(setup, size) if not (e["kind"] == "buffer" and "sd_model." in e["name"])]
  return {e["name"]: fill.weight(e.get("alias_of") or e["name"], e["shape"], seed) for e in entries}


def is_noise(setup: str, name: str) -> bool:
  """Whether the gradient of this parameter is zero and only rounding moves it, so Adam's steps mean nothing."""
  return name in json.loads((GOLDEN / f"zero_gradient.{setup}.json").read_text())


def golden(file: str) -> dict[str, np.ndarray]:
  """All arrays of tests/golden/<file>."""
  with np.load(GOLDEN / file) as arrays:
    return {name: arrays[name] for name in arrays.files}


def plain_names(source: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
  """A restatement of the conversion for a backbone alone: names with slashes, kernels with inputs before outputs."""
  named = {}
  for name, value in source.items():
    if not name.startswith(prefix):
      continue
    name = name[len(prefix) :].replace(".", "/")
    if value.ndim == 4:
      name, value = re.sub("weight$", "kernel", name), value.transpose(2, 3, 1, 0)
    elif value.ndim == 2 and "_embedding/" in name:
      name = re.sub("weight$", "embedding", name)
    elif value.ndim == 2:
      name, value = re.sub("weight$", "kernel", name), value.T
    else:
      name = re.sub("weight$", "scale", name)
    named[name] = value
  return named


def nchw(x) -> np.ndarray:
  """[B, H, W, C] to PyTorch's [B, C, H, W]."""
  return np.asarray(x).transpose(0, 3, 1, 2)


def compare(actual, arrays: dict[str, np.ndarray], key: str, limit: float) -> float:
  """Asserts that `actual` is the stored array `key`, whole or strided, within `limit` of its largest value.

  Returns the largest difference over the largest value.
  """
  actual = np.asarray(actual)
  if key in arrays:
    expected = arrays[key]
    assert actual.shape == expected.shape, (key, actual.shape, expected.shape)
    largest = np.abs(expected).max()
  else:
    stride, info = int(arrays[f"{key}@info"][0]), arrays[f"{key}@info"]
    assert actual.shape == tuple(arrays[f"{key}@shape"]), (key, actual.shape, arrays[f"{key}@shape"])
    norm = np.linalg.norm(actual.astype(np.float64).ravel())
    assert abs(norm - info[3]) <= 10 * limit * info[3], (key, norm, info[3])
    actual, expected = actual.ravel()[::stride], arrays[f"{key}@stride"]
    largest = max(abs(info[4]), abs(info[5]))
  error = float(np.abs(actual - expected).max() / largest)
  assert error <= limit, f"{key}: {error:.2e} of the largest value, limit {limit:.0e}"
  return error
