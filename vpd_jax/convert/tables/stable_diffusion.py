"""Stable Diffusion 1.x and 2.x: the single CompVis file and the diffusers folder -> method/unet, method/vae.

Our names are those of CompVis, so its table has only four prefixes. diffusers numbers blocks per level, CompVis across
all levels, hence the loops.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping

from etils import epath

from vpd_jax.convert import fetch
from vpd_jax.convert.formats import weight_files
from vpd_jax.convert.rules import Drop, Rule, bias, conv, linear_as_conv
from vpd_jax.errors import UserError
from vpd_jax.types import Fields, Options

DECODER = "the VAE's decoder is not used"
NOT_IN_ALL = {"time_embed": "the model learns its time vectors", "out": "the model ends at the features"}
ENDS = {  # first and last layers of a diffusers UNet, by our part
  "time_embed": {"time_embedding.linear_1": "0", "time_embedding.linear_2": "2"},
  "out": {"conv_norm_out": "0", "conv_out": "2"},
}
# Models by the channels of their UNet and of their VAE.
OTHER_INPUTS = {
  (9, 4): "Stable Diffusion for inpainting",
  (5, 4): "Stable Diffusion with depth (depth2img)",
  (8, 4): "InstructPix2Pix, Marigold or another model of two pictures",
  (7, 4): "Stable Diffusion's upscaler",
}
UNET_PARTS = ("time_embed", "input_blocks", "middle_block", "output_blocks", "out")
SCHEDULE = (
  r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
  r"|lvlb_weights|logvar|scale_factor"
)


def unet(source: str, *, time_embed: bool = True, out: bool) -> list[Rule]:
  """CompVis names below `source`, optionally with the time embedding and the last block."""
  included = {"time_embed": time_embed, "out": out}
  return [Rule(f"{source}.{part}", f"method/unet/{part}") for part in UNET_PARTS if included.get(part, True)]


def first_stage(source: str) -> list[Rule]:
  """The encoder of the VAE, CompVis names below `source`."""
  return [Rule(f"{source}.{part}", f"method/vae/{part}") for part in ("encoder", "quant_conv", "post_quant_conv")]


def compvis(targets: Iterable[str]) -> list[Rule | Drop]:
  """Table of a single file, e.g. v1-5-pruned-emaonly.ckpt."""
  included = {part: _has(part, targets) for part in NOT_IN_ALL}
  return [
    *unet("model.diffusion_model", **included),
    *first_stage("first_stage_model"),
    *(
      Drop(rf"model\.diffusion_model\.{part}\..*", why, optional=True)
      for part, why in NOT_IN_ALL.items()
      if not included[part]
    ),
    Drop(r"first_stage_model\.decoder\..*", DECODER, optional=True),
    Drop(r"first_stage_model\.loss\..*", "the VAE is not trained", optional=True),
    Drop(r"model_ema\..*", "the plain weights are used", optional=True),
    Drop(r"cond_stage_model\..*", "the text encoder is loaded by itself", optional=True),
    Drop(SCHEDULE, "constants of the noise schedule", optional=True),
  ]


def diffusers(source: Iterable[str], targets: Iterable[str]) -> list[Rule | Drop]:
  """Table of a folder's unet/ and vae/; the number of levels and blocks follows from the names."""
  names = list(source)
  return [
    *_diffusers_unet(names),
    *_diffusers_vae(names),
    *(
      Rule(f"unet.{old}", f"method/unet/{part}/{new}")
      if _has(part, targets)
      else Drop(rf"unet\.{re.escape(old)}\..*", NOT_IN_ALL[part], optional=True)
      for part, pairs in ENDS.items()
      for old, new in pairs.items()
    ),
    Drop(r"vae\.decoder\..*", DECODER, optional=True),
  ]


def unet_of(sizes: Options) -> list[Rule]:
  """Table of a diffusers UNet from its sizes, config.backbone.unet."""
  levels, blocks, attention_levels = len(sizes["channel_mult"]), sizes["num_res_blocks"], sizes["attention_levels"]
  names = [f"unet.down_blocks.{i}.resnets.{j}." for i in range(levels) for j in range(blocks)]
  for i in attention_levels:
    names += [f"unet.down_blocks.{i}.attentions.{j}.transformer_blocks." for j in range(blocks)]
    names += [f"unet.up_blocks.{levels - 1 - i}.attentions.{j}.transformer_blocks." for j in range(blocks + 1)]
  ends = [(old, f"{part}/{new}") for part, pairs in ENDS.items() for old, new in pairs.items()]
  return [*_diffusers_unet(names), *(Rule(f"unet.{old}", f"method/unet/{new}") for old, new in ends)]


def _has(part: str, targets: Iterable[str]) -> bool:
  return any(name.startswith(f"method/unet/{part}/") for name in targets)


def _count(names: list[str], pattern: str) -> int:
  """One more than the largest number that `pattern` captures."""
  return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def _residual(source: str, target: str) -> list[Rule]:
  """A residual block of the UNet."""
  pairs = {"norm1": "in_layers/0", "conv1": "in_layers/2", "time_emb_proj": "emb_layers/1"}
  pairs |= {"norm2": "out_layers/0", "conv2": "out_layers/3"}
  return [
    *(Rule(f"{source}.{old}", f"{target}/{new}") for old, new in pairs.items()),
    Rule(f"{source}.conv_shortcut", f"{target}/skip_connection", optional=True),  # If the width changes.
  ]


def _diffusers_unet(names: list[str]) -> list[Rule]:
  levels, blocks = (
    _count(names, r"unet\.down_blocks\.(\d+)\."),
    _count(names, r"unet\.down_blocks\.0\.resnets\.(\d+)\."),
  )
  rules = [
    Rule("unet.conv_in", "method/unet/input_blocks/0/0"),
    *_residual("unet.mid_block.resnets.0", "method/unet/middle_block/0"),
    Rule("unet.mid_block.attentions.0", "method/unet/middle_block/1"),
    *_residual("unet.mid_block.resnets.1", "method/unet/middle_block/2"),
  ]
  with_attention = {name.rpartition(".transformer_blocks.")[0] for name in names}
  for level in range(levels):
    # Down: input block 0 is conv_in, then each level has its residual blocks and, except for the last, a downsampler.
    # Up: each level has one more residual block; its last output block also has the upsampler, as the last module.
    down, up = f"unet.down_blocks.{level}", f"unet.up_blocks.{level}"
    first_in, first_out = 1 + level * (blocks + 1), level * (blocks + 1)
    for source, target, count in ((down, "input_blocks", blocks), (up, "output_blocks", blocks + 1)):
      first = first_in if source == down else first_out
      for i in range(count):
        rules += _residual(f"{source}.resnets.{i}", f"method/unet/{target}/{first + i}/0")
        if f"{source}.attentions.{i}" in with_attention:
          rules.append(Rule(f"{source}.attentions.{i}", f"method/unet/{target}/{first + i}/1"))
    if level < levels - 1:
      position = 2 if f"{up}.attentions.{blocks}" in with_attention else 1
      rules += [
        Rule(f"{down}.downsamplers.0.conv", f"method/unet/input_blocks/{first_in + blocks}/0/op"),
        Rule(f"{up}.upsamplers.0.conv", f"method/unet/output_blocks/{first_out + blocks}/{position}/conv"),
      ]
  return rules


def _diffusers_vae(names: list[str]) -> list[Rule]:
  levels = _count(names, r"vae\.encoder\.down_blocks\.(\d+)\.")
  blocks = _count(names, r"vae\.encoder\.down_blocks\.0\.resnets\.(\d+)\.")
  residual = [(f"down_blocks.{i}.resnets.{j}", f"down/{i}/block/{j}") for i in range(levels) for j in range(blocks)]
  residual += [("mid_block.resnets.0", "mid/block_1"), ("mid_block.resnets.1", "mid/block_2")]
  rules = [Rule(f"vae.encoder.{part}", f"method/vae/encoder/{part}") for part in ("conv_in", "conv_out")]
  rules += [Rule(f"vae.{part}", f"method/vae/{part}") for part in ("quant_conv", "post_quant_conv")]
  rules.append(Rule("vae.encoder.conv_norm_out", "method/vae/encoder/norm_out"))
  for old, new in residual:
    source, target = f"vae.encoder.{old}", f"method/vae/encoder/{new}"
    rules += [Rule(f"{source}.{part}", f"{target}/{part}") for part in ("norm1", "conv1", "norm2", "conv2")]
    rules.append(Rule(f"{source}.conv_shortcut", f"{target}/nin_shortcut", optional=True))
  for i in range(levels - 1):
    rules.append(
      Rule(f"vae.encoder.down_blocks.{i}.downsamplers.0.conv", f"method/vae/encoder/down/{i}/downsample/conv")
    )
  source, target = "vae.encoder.mid_block.attentions.0", "method/vae/encoder/mid/attn_1"
  rules.append(Rule(f"{source}.group_norm", f"{target}/norm"))
  # Files before diffusers 0.18 use older names. Most tensors are matrices, which are 1x1 convolutions in CompVis.
  pairs = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
  pairs |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
  attention = (linear_as_conv, conv, bias)
  return rules + [Rule(f"{source}.{old}", f"{target}/{new}", attention, optional=True) for old, new in pairs.items()]


def sizes(path: str | epath.PathLike) -> dict[str, Fields] | None:
  """Sizes of the three networks from the config files of a diffusers folder; None for a single file.

  Args:
    path: any source of weights, see fetch.py. Flax and PyTorch folders have the same config files.

  Returns:
    {"unet": ..., "vae": ..., "text": ...}: keyword arguments of UNetSizes, VaeSizes and TextSizes. A network whose
    folder is missing is omitted.

  Raises:
    ValueError: for a config that cannot be read or describes an unsupported network; one line.
  """
  path = fetch.local(path)
  if not path.is_dir():
    return None
  readers = {"unet": ("unet", _unet_sizes), "vae": ("vae", _vae_sizes), "text": ("text_encoder", _text_sizes)}
  result = {}
  for part, (folder, reader) in readers.items():
    if not (path / folder).is_dir():
      continue
    config = weight_files.read_config(path / folder)
    try:
      result[part] = reader(config)
    except KeyError as error:
      raise UserError(f"{path / folder / 'config.json'} lacks {error.args[0]!r}; complete the folder.") from error
    except UserError as error:
      raise UserError(f"{path / folder / 'config.json'} {error}") from error
  _check_latents(path, result)
  return result


def predicts_v(path: str | epath.PathLike) -> bool:
  """Whether the UNet of a diffusers folder was trained for v-prediction, as that of SD 2.1 (768 pixels)."""
  folder, name = fetch.local(path) / "scheduler", "scheduler_config.json"
  return (folder / name).is_file() and weight_files.read_config(folder, name).get("prediction_type") == "v_prediction"


def _check_latents(path: pathlib.Path, networks: Mapping[str, Options]) -> None:
  """Raises if the UNet's input is not only the latents of the VAE; names the probable model."""
  if not {"unet", "vae"} <= networks.keys():
    return
  unet_channels, vae_channels = networks["unet"]["in_channels"], networks["vae"]["z_channels"]
  if unet_channels == vae_channels:
    return
  model = OTHER_INPUTS.get((unet_channels, vae_channels), "another model")
  if (path / "model_index.json").is_file():
    model += f" ({weight_files.read_config(path, 'model_index.json').get('_class_name')})"
  raise UserError(
    f"{path}: its UNet takes {unet_channels} channels, its VAE gives {vae_channels}: this is {model}; give a "
    "Stable Diffusion 1.x or 2.x that makes pictures from text alone."
  )


def _check_options(config: Options, allowed: Mapping[str, tuple[object, ...]]) -> None:
  """Raises if an option has an unsupported value; a missing one counts as the first of `allowed`."""
  wrong = [f"{key}={config[key]!r}" for key, values in allowed.items() if config.get(key, values[0]) not in values]
  if wrong:
    raise UserError(f"asks for {', '.join(wrong)}, which is not Stable Diffusion 1.x or 2.x; use one of those.")


def _multiples(widths: list[int]) -> tuple[int, ...]:
  if any(width % widths[0] for width in widths):
    raise UserError(f"asks for widths {widths}, which are not multiples of the first.")
  return tuple(width // widths[0] for width in widths)


def _unet_sizes(config: Options) -> Fields:
  block_types = config["down_block_types"]
  _check_options(
    config,
    {
      "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
      "class_embed_type": (None,),
      "addition_embed_type": (None,),
      "num_class_embeds": (None,),
      "encoder_hid_dim": (None,),
      "transformer_layers_per_block": (1, [1] * len(block_types)),
      "resnet_time_scale_shift": ("default",),
      "dual_cross_attention": (False,),
      "only_cross_attention": (False,),
      "act_fn": ("silu",),
      "norm_num_groups": (32,),
    },
  )
  unknown = sorted(set(block_types) - {"CrossAttnDownBlock2D", "DownBlock2D"})
  if unknown:
    raise UserError(f"asks for blocks {unknown}, which Stable Diffusion 1.x and 2.x do not have; use one of those.")
  widths = config["block_out_channels"]
  # diffusers calls the number of heads attention_head_dim: one for all levels in SD 1.x, one per level in SD 2.x.
  heads = config.get("num_attention_heads") or config["attention_head_dim"]
  per_level = heads if isinstance(heads, list) else [heads] * len(widths)
  head_widths = {width // count for width, count in zip(widths, per_level, strict=True)}
  if len(set(per_level)) > 1 and len(head_widths) > 1:
    raise UserError(f"asks for {per_level} heads, neither equal in number nor in width on all levels.")
  return {
    "in_channels": config["in_channels"],
    "out_channels": config["out_channels"],
    "model_channels": widths[0],
    "channel_mult": _multiples(widths),
    "num_res_blocks": config["layers_per_block"],
    "attention_levels": tuple(i for i, block_type in enumerate(block_types) if block_type == "CrossAttnDownBlock2D"),
    "num_heads": per_level[0] if len(set(per_level)) == 1 else None,
    "head_width": None if len(set(per_level)) == 1 else head_widths.pop(),
    "context_dim": config["cross_attention_dim"],
    "linear_projection": bool(config.get("use_linear_projection", False)),
  }


def _vae_sizes(config: Options) -> Fields:
  _check_options(config, {"act_fn": ("silu",), "norm_num_groups": (32,), "in_channels": (3,)})
  widths = config["block_out_channels"]
  return {
    "channels": widths[0],
    "channel_mult": _multiples(widths),
    "num_res_blocks": config["layers_per_block"],
    "z_channels": config["latent_channels"],
    "latent_scale": config.get("scaling_factor", 0.18215),  # absent in files before diffusers 0.11
  }


def _text_sizes(config: Options) -> Fields:
  _check_options(config, {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)})
  return {
    "vocab_size": config["vocab_size"],
    "width": config["hidden_size"],
    "layers": config["num_hidden_layers"],
    "heads": config["num_attention_heads"],
    "mlp_width": config["intermediate_size"],
    "positions": config["max_position_embeddings"],
    "activation": config["hidden_act"],
    # As in OpenCLIP and in the tokenizers of SD 2.x. (pad_token_id of this file is unused and wrong.)
    "padding": 0 if config["hidden_act"] == "gelu" else -1,
  }
