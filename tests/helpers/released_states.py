"""The authors' state dicts, and modules of their entries."""

import numpy as np

from tests.helpers import oracle

STEP = 12345


def layout(name: str, value: np.ndarray) -> np.ndarray:
  """PyTorch's layout -> ours, restated."""
  if value.ndim == 4:
    return value.transpose(2, 3, 0, 1) if "deconv" in name and ".weight" in name else value.transpose(2, 3, 1, 0)
  return value.T if value.ndim == 2 and name.endswith(".weight") else value


def state_dict(size: str = "tiny", setup: str = "vpd_depth") -> dict[str, np.ndarray]:
  counted = {n: np.asarray(STEP) for n in (e["name"] for e in oracle.manifest(setup, size)) if n.endswith("tracked")}
  return oracle.weights(setup, size) | counted


def skeleton(torch, entries):
  """A module with exactly the entries of a manifest, in its order."""
  root = torch.nn.Module()
  for entry in entries:
    *path, leaf = entry["name"].split(".")
    module = root
    for part in path:
      if part not in module._modules:
        module.add_module(part, torch.nn.Module())
      module = module._modules[part]
    value = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
    if entry["kind"] == "buffer":
      module.register_buffer(leaf, value)
    else:
      module.register_parameter(leaf, torch.nn.Parameter(value))
    # One tensor under several names, as a module that is registered several times has it.
    if entry.get("alias_of"):
      owner, _, last = entry["alias_of"].rpartition(".")
      setattr(module, leaf, getattr(root.get_submodule(owner), last))
  return root
