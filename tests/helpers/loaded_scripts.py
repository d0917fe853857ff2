"""Scripts and benchmarks, imported."""

import importlib.util
import pathlib
import sys

from tests.helpers.paths import ROOT


def load(path):
  """A script as a module, which may import what lies beside it."""
  spec = importlib.util.spec_from_file_location(f"loaded_{pathlib.Path(path).stem}", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str((ROOT / path).parent))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)
  return module
