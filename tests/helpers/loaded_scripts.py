"""Scripts and benchmarks, imported."""

import importlib.util
import pathlib

from tests.helpers.paths import ROOT


def load(path):
  """A script as a module."""
  spec = importlib.util.spec_from_file_location(f"loaded_{pathlib.Path(path).stem}", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
