"""LoRA files of the UNet under diffusers' names: written from the A and B of a run, and merged into weights.

Three naming schemes are supported for reading, with MODULE = down_blocks.0.attentions.0...to_q:

  diffusers, peft    unet.MODULE.lora_A.weight, .lora_B.weight; alpha in the metadata
  diffusers, older   unet.MODULE.lora.down.weight, .lora.up.weight, or ...attn1.processor.to_q_lora.down.weight
  kohya              lora_unet_MODULE.lora_down.weight, .lora_up.weight, .alpha, with "_" for "."; CompVis' names too

A missing alpha defaults to the rank. Files are written with peft's names, with alpha / rank multiplied into B, so that
every reader applies a factor of 1.

Sources: diffusers 0.39 loaders/lora_pipeline.py, loaders/peft.py, utils/state_dict_utils.py; kohya-ss/sd-scripts
networks/lora.py.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors

from vpd_jax.convert import fetch, finite, rules
from vpd_jax.convert.formats import weight_files
from vpd_jax.convert.tables import stable_diffusion
from vpd_jax.errors import UserError
from vpd_jax.models import lora
from vpd_jax.types import Options, ParamDict

METADATA = "lora_adapter_metadata"
PARTS = {"lora_A": "a", "lora_down": "a", "lora.down": "a", "lora_B": "b", "lora_up": "b", "lora.up": "b"}
_PAIR = re.compile(
  r"(?:unet\.|lora_unet_)(.+?)\.(?:(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)\.weight|alpha)"
)
_PROCESSOR = re.compile(r"\.processor\.(to_\w+)_lora\.")
_TEXT = ("text_encoder.", "lora_te_")


def state_dict(named: ParamDict, alpha: float, sizes: Options) -> dict[str, np.ndarray]:
  """A and B of a run in diffusers' names and PyTorch's layouts.

  Args:
    named: arrays of the run, the base among them.
    alpha: config.lora.alpha.
    sizes: config.backbone.unet.

  Raises:
    ValueError: if there are no LoRA arrays.
  """
  kernels = [name.removeprefix(lora.PREFIX).removesuffix("/a") for name in named if name.startswith(lora.PREFIX)]
  kernels = [name for name in kernels if name in named]
  if not kernels:
    raise UserError("the run was trained without LoRA, so there is none to write; remove --only_lora.")
  result = {}
  for kernel, module in _modules({name: named[name].shape for name in kernels}, sizes).items():
    a, b = (np.asarray(named[f"{lora.PREFIX}{kernel}/{part}"], np.float32) for part in "ab")
    *window, width, _ = named[kernel].shape
    down = a.reshape(*window, width, -1)
    result[f"{module}.lora_A.weight"] = np.moveaxis(down, (-1, -2), (0, 1))  # [rank, in, ..]
    up = b.T * np.float32(alpha / a.shape[1])
    result[f"{module}.lora_B.weight"] = up.reshape(*up.shape, *(1 for _ in window))  # [out, rank, ..]
  return result


def merged(named: ParamDict, path: str | pathlib.Path, sizes: Options) -> tuple[ParamDict, str]:
  """Adds the LoRA of a file to the UNet's kernels; returns the weights and a line for the log.

  Args:
    named: arrays by our names.
    path: of the file, see fetch.py.
    sizes: config.backbone.unet.

  Raises:
    ValueError: for a source that cannot be fetched, a folder, a file without LoRA, unknown modules or wrong shapes; one
      line.
  """
  file = fetch.local(path)
  if file.is_dir():
    raise UserError(f"LoRA {path} is a folder; give its file, from the hub as hf://ORG/NAME/FILE.safetensors.")
  tensors, stated = weight_files.open_file(file).tensors, _stated_options(file)
  modules = {}
  if not any(name.startswith(lora.UNET) for name in named):
    raise UserError(
      f"LoRA {path} is merged into weights of a UNet, of which there are none; give config.init.pretrained or "
      "config.init.run."
    )
  for kernel, module in _modules({n: x.shape for n, x in named.items() if _is_kernel(n, x.ndim)}, sizes).items():
    ours = kernel.removeprefix(lora.UNET).removesuffix("/kernel")
    names = [module.removeprefix("unet."), module.removeprefix("unet.").removesuffix(".0"), ours.replace("/", ".")]
    modules |= {name.replace(".", "_"): kernel for name in names}
  pairs: dict[str, dict[str, np.ndarray]] = {}
  dotted: dict[str, str] = {}
  unknown, text = [], 0
  for name, tensor in tensors.items():
    if name.startswith(_TEXT):
      text += 1
    elif (match := _PAIR.fullmatch(_PROCESSOR.sub(r".\1.lora.", name))) and (
      key := match[1].replace(".", "_")
    ) in modules:
      dotted[key] = match[1]
      pairs.setdefault(key, {})[PARTS[match[2]] if match[2] else "alpha"] = np.asarray(tensor, np.float32)
    else:
      unknown.append(name)
  unknown += [f"{key} without its other half" for key, pair in pairs.items() if not {"a", "b"} <= pair.keys()]
  if unknown or not pairs:
    raise UserError(
      f"{path}: {len(unknown)} of {len(tensors)} tensors are no LoRA of this UNet, like {unknown[:3]}; give a file of "
      "diffusers or kohya for the Stable Diffusion of the config."
    )
  result = dict(named)
  for key, pair in pairs.items():
    a, b, kernel = pair["a"], pair["b"], modules[key]
    rank = a.shape[0]
    alpha = float(pair["alpha"] if "alpha" in pair else stated.alpha(dotted[key], rank))
    change = (b.reshape(-1, rank) @ a.reshape(rank, -1)).reshape(-1, *a.shape[1:])  # [out, in, ..]
    change = np.moveaxis(change, (0, 1), (-1, -2))  # [.., in, out]
    if math.prod(change.shape) != named[kernel].size or change.shape[-2:] != named[kernel].shape[-2:]:
      raise UserError(f"{path}: {key} changes {list(change.shape)}, {kernel} is {list(named[kernel].shape)}.")
    scale = np.float32(alpha / (math.sqrt(rank) if stated.rank_stabilized else rank))
    result[kernel] = named[kernel] + change.reshape(named[kernel].shape) * scale
  finite.check({modules[key]: result[modules[key]] for key in pairs}, f"LoRA {path}")
  skipped = f", {text} tensors of the text encoder left out" if text else ""
  return result, f"LoRA: {path}: merged into {len(pairs)} kernels of the UNet{skipped}"


def _is_kernel(name: str, ndim: int) -> bool:
  return name.startswith(lora.UNET) and ndim > 1


def _modules(shapes: Mapping[str, tuple[int, ...]], sizes: Options) -> dict[str, str]:
  """diffusers' module name, with the prefix "unet.", for each kernel of the UNet."""
  table = stable_diffusion.unet_of(sizes)
  name = lambda kernel: next(iter(rules.to_source({kernel: rules.phantom(shapes[kernel])}, table)))
  return {kernel: name(kernel).removesuffix(".weight") for kernel in shapes}


class _StatedOptions(NamedTuple):
  """Options in the metadata of peft's files.

  Attributes:
    module_alphas: alpha by the pattern of a module's name.
    default_alpha: of all other modules; None: their rank.
    rank_stabilized: whether a change is scaled by alpha / sqrt(rank) instead of alpha / rank.
  """

  module_alphas: dict[str, float]
  default_alpha: float | None
  rank_stabilized: bool

  def alpha(self, module: str, rank: int) -> float:
    """The alpha of a module with a dotted name, by peft's rule: a pattern matches whole names at its end."""
    default = rank if self.default_alpha is None else self.default_alpha
    return next((x for name, x in self.module_alphas.items() if re.fullmatch(rf"(.*\.)?({name})", module)), default)


def _stated_options(path: pathlib.Path) -> _StatedOptions:
  """The options that a file states, or peft's defaults."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      stated = json.loads((file.metadata() or {}).get(METADATA, "{}"))
  except (safetensors.SafetensorError, ValueError):  # .pt files of older versions
    stated = {}
  return _StatedOptions(
    stated.get("unet.alpha_pattern", {}), stated.get("unet.lora_alpha"), bool(stated.get("unet.use_rslora"))
  )
