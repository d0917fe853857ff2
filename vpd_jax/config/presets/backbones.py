"""Backbone sizes."""

from vpd_jax.config.fields import Section


def sd_v1() -> Section:
  """Stable Diffusion 1.x; a diffusers folder in `init.pretrained` overrides these sizes."""
  return {
    "unet": {
      "in_channels": 4,
      "out_channels": 4,
      "model_channels": 320,
      "channel_mult": (1, 2, 4, 4),
      "num_res_blocks": 2,
      "attention_levels": (0, 1, 2),
      "num_heads": 8,
      "head_width": 0,
      "context_dim": 768,
      "linear_projection": False,
    },
    "vae": {
      "channels": 128,
      "channel_mult": (1, 2, 4, 4),
      "num_res_blocks": 2,
      "z_channels": 4,
      "latent_scale": 0.18215,
    },
    "text": {
      "vocab_size": 49408,
      "width": 768,
      "layers": 12,
      "heads": 12,
      "mlp_width": 3072,
      "positions": 77,
      "activation": "quick_gelu",
      "padding": -1,  # as the tokenizer pads
    },
    "image": clip_image(tiny=False),
    "attention": "auto",
    "remat": False,
    "remat_policy": "full",
  }


def sd21() -> Section:
  """Stable Diffusion 2.1 and 2.1-base: heads of 64 channels, and the text encoder of OpenCLIP ViT-H/14.

  The last of its 24 layers is unused. The CLIP image encoder, for IEDP and predicted classes, remains OpenAI's.

  Source: Stability-AI/stablediffusion configs/stable-diffusion/v2-inference-v.yaml.
  """
  config = sd_v1()
  config["unet"] |= {"num_heads": 0, "head_width": 64, "context_dim": 1024, "linear_projection": True}
  config["text"] |= {"width": 1024, "layers": 23, "heads": 16, "mlp_width": 4096, "activation": "gelu", "padding": 0}
  return config


def sd_tiny() -> Section:
  """The tiny network: a tenth of the width, otherwise Stable Diffusion 1.x."""
  config = sd_v1()
  config["unet"] |= {"model_channels": 32, "context_dim": 64}
  config["vae"] |= {"channels": 32}
  config["image"] = clip_image(tiny=True)
  config["text"] |= {"vocab_size": 1000, "width": 64, "layers": 3, "heads": 4, "mlp_width": 256}
  return config


def rooms_small() -> Section:
  """The network of the weights "rooms/small": a stride of 4 and 16 latent channels, for images of a few hundred pixels.

  There is no attention at the finest level, where it would dominate the cost.
  """
  config = sd_tiny()
  config["unet"] |= {"in_channels": 16, "out_channels": 16, "channel_mult": (1, 2, 3, 3), "num_res_blocks": 1}
  config["unet"] |= {"attention_levels": (1, 2)}
  config["vae"] |= {"channel_mult": (1, 1, 1), "num_res_blocks": 0, "z_channels": 16, "latent_scale": 1.0}
  return config


SIZES = {"full": sd_v1, "sd21": sd21, "tiny": sd_tiny}  # by config word


def sizes(default: str = "full") -> tuple[str, ...]:
  """The config words for a size, the default first."""
  return (default, *(name for name in SIZES if name != default))


def backbone(size: str) -> Section:
  """The section `backbone` for a size of SIZES."""
  return SIZES[size]()


def vit(*, tiny: bool) -> Section:
  """Sizes of the ImageNet classifier google/vit-base-patch16-224; a folder in `init.vit` overrides them."""
  full = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "image_size": 224, "patch": 16}
  small = {"width": 64, "layers": 3, "heads": 4, "mlp_width": 256, "image_size": 56, "patch": 14}
  return {**(small if tiny else full), "labels": 1000}


def clip_image(*, tiny: bool) -> Section:
  """Sizes of CLIP's image encoder, ViT-L/14 at 224 pixels; a folder in `init.clip` overrides them."""
  full = {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096, "image_size": 224, "projection": 768}
  small = {"width": 64, "layers": 3, "heads": 4, "mlp_width": 256, "image_size": 56, "projection": 48}
  return {**(small if tiny else full), "patch": 14, "activation": "quick_gelu"}
