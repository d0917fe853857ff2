"""A single file of Stable Diffusion 2.x: its names and shapes, and diffusers' and transformers' names turned into them.

Restated, not read from the tables of the package.

Source: Stability-AI/stablediffusion ldm/modules, mlfoundations/open_clip src/open_clip/transformer.py.
"""

import re

import numpy as np

from tests.helpers import oracle

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
RESIDUAL = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
ENDS = {
  "conv_in": "input_blocks.0.0",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "mid_block.resnets.0": "middle_block.0",
  "mid_block.attentions.0": "middle_block.1",
  "mid_block.resnets.1": "middle_block.2",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
}
VAE_WORDS = {
  r"down_blocks\.(\d+)\.resnets\.(\d+)": r"down.\1.block.\2",
  r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
  r"mid_block\.resnets\.0": "mid.block_1",
  r"mid_block\.resnets\.1": "mid.block_2",
  r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
  r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
  r"mid_block\.attentions\.0\.to_": "mid.attn_1.",
  "conv_shortcut": "nin_shortcut",
  "conv_norm_out": "norm_out",
}
LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
LAYER |= {"self_attn.out_proj": "attn.out_proj"}


def unet(state, *, blocks, attended):
  """diffusers' UNet in the names of CompVis.

  Args:
    state: arrays by name.
    blocks: residual blocks per level.
    attended: levels of the way up with attention.
  """

  def renamed(name):
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", name):
      way, level, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
      first = level * (blocks + 1) + (way == "down")
      if kind == "downsamplers":
        return f"input_blocks.{first + blocks}.0.{rest.replace('conv', 'op')}"
      if kind == "upsamplers":
        return f"output_blocks.{first + blocks}.{2 if level in attended else 1}.{rest}"
      place = f"{'input' if way == 'down' else 'output'}_blocks.{first + i}.{int(kind == 'attentions')}"
      return f"{place}.{rest}" if kind == "attentions" else f"{place}.{residual(rest)}"
    start = next(start for start in ENDS if name.startswith(f"{start}."))
    rest = name.removeprefix(f"{start}.")
    return f"{ENDS[start]}.{residual(rest) if 'resnets' in start else rest}"

  return {UNET + renamed(name): value for name, value in state.items()}


def residual(name):
  part, _, last = name.rpartition(".")
  return f"{RESIDUAL[part]}.{last}"


def vae(state):
  """The encoder's half of diffusers' autoencoder in the names of CompVis, whose attention is made of convolutions."""
  result = {}
  for name, value in state.items():
    if "decoder" in name:
      continue
    for old, new in VAE_WORDS.items():
      name = re.sub(old, new, name)
    result[VAE + name] = value[:, :, None, None] if "attn_1" in name and value.ndim == 2 else value
  return result


def text(state, *, layers, last=True):
  """transformers' CLIPTextModel in the names of OpenCLIP, with one layer more that nothing reads.

  Args:
    state: arrays by name, below `text_model.` or not.
    layers: of the model.
    last: whether the layer more is there; files made from a diffusers folder lack it.
  """
  state = {name.removeprefix("text_model."): value for name, value in state.items()}
  result = {
    "token_embedding.weight": state["embeddings.token_embedding.weight"],
    "positional_embedding": state["embeddings.position_embedding.weight"],
    "ln_final.weight": state["final_layer_norm.weight"],
    "ln_final.bias": state["final_layer_norm.bias"],
  }
  for i in range(layers + last):
    block, ours = f"transformer.resblocks.{i}", f"encoder.layers.{min(i, layers - 1)}"
    for kind in ("weight", "bias"):
      thirds = [state[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
      result[f"{block}.attn.in_proj_{kind}"] = np.concatenate(thirds)
      result |= {f"{block}.{new}.{kind}": state[f"{ours}.{old}.{kind}"] for old, new in LAYER.items()}
  width = result["ln_final.bias"].shape[0]
  if last:
    extra = f"transformer.resblocks.{layers}."
    result |= {name: value + 1 for name, value in result.items() if name.startswith(extra)}
  result["text_projection"] = np.ones((width, width), np.float32)
  result["logit_scale"] = np.ones((), np.float32)
  result["attn_mask"] = np.triu(np.full((77, 77), -1e9, np.float32), 1)
  return {TEXT + name: value for name, value in result.items()}


def shapes():
  """{name: shape} of v2-1_512-ema-pruned.safetensors and v2-1_768-ema-pruned.safetensors, which are equal.

  The UNet is that of SD 1.5, but attends to 1024 numbers, and its projections are matrices; the VAE is the same.
  """
  result = {}
  for entry in oracle.manifest("sd_unet_hier", "full") + oracle.manifest("sd_vae_encoder", "full"):
    name, shape = entry["name"], tuple(entry["shape"])
    if re.search(r"attn2\.to_[kv]\.weight$", name):
      shape = (shape[0], 1024)
    result[name] = shape[:2] if re.search(r"\.1\.proj_(in|out)\.weight$", name) and UNET in name else shape
  width, hidden = 1024, 4096
  layer = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
  for part, shape in {
    "ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width), "mlp.c_fc": (hidden, width),
    "mlp.c_proj": (width, hidden),
  }.items():  # fmt: skip
    layer |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
  words = {"token_embedding.weight": (49408, width), "positional_embedding": (77, width)}
  words |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, width)}
  words |= {"logit_scale": (), "attn_mask": (77, 77)}
  words |= {f"transformer.resblocks.{i}.{name}": shape for i in range(24) for name, shape in layer.items()}
  result |= {TEXT + name: shape for name, shape in words.items()}
  return result | dict.fromkeys(("betas", "alphas_cumprod", "sqrt_alphas_cumprod"), (1000,))
