"""Runs the network in this folder, which network.json describes: python load.py [INPUTS.npz], or load.run(image=..).

Needs jax, flatbuffers (of jax.export), numpy and safetensors.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

folder = pathlib.Path(__file__).parent
facts = json.loads((folder / "network.json").read_text())
jax.config.update("jax_enable_x64", facts["x64"])
try:
  network = export.deserialize(bytearray((folder / "network.jax_export").read_bytes()))
  version, newest = network.calling_convention_version, export.maximum_supported_calling_convention_version
  if not export.minimum_supported_calling_convention_version <= version <= newest:
    raise ValueError(f"its calling convention is {version}, the newest known is {newest}")
  network.mlir_module()  # Raises now, not at the first call, if the program has a newer format.
except Exception as error:
  exporter, reason = facts["versions"]["jax"], " ".join(str(error).split())
  raise SystemExit(
    f"network.jax_export was made by jax {exporter}, and jax {jax.__version__} cannot read it: {reason}"
  ) from None
weights = jax.device_put(load_file(folder / "weights.safetensors"))
call = jax.jit(network.call)


def run(**inputs):
  """The outputs by name, as numpy arrays, for the inputs by name, all of those in network.json."""
  if inputs.keys() != facts["inputs"].keys():
    raise ValueError(f"the inputs are {sorted(inputs)}; the network takes {sorted(facts['inputs'])}, see network.json")
  for name, x in inputs.items():
    low, high = facts["inputs"][name]["range"]
    tolerance = 0.5 if name == "image" else 0  # resizing with cubic interpolation overshoots
    if np.size(x) and not (low - tolerance <= np.min(x) and np.max(x) <= high + tolerance):
      raise ValueError(f"{name} is from {np.min(x)} to {np.max(x)}; the network takes {low} to {high}")
  arrays = {name: np.asarray(x, facts["inputs"][name]["dtype"]) for name, x in inputs.items()}
  return {name: np.asarray(x) for name, x in call(weights, arrays).items()}


if __name__ == "__main__":
  zeros = {name: np.zeros([1, *of["shape"][1:]], of["dtype"]) for name, of in facts["inputs"].items()}
  for name, x in run(**(np.load(sys.argv[1]) if sys.argv[1:] else zeros)).items():
    print(name, x.dtype, x.shape, f"from {x.min():.6g} to {x.max():.6g}, mean {x.mean():.6g}")
