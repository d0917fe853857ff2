"""TADP: a UNet that attends to a caption of each picture.

From image to maps: the frozen VAE encodes the padded image, and a sample of its posterior, scaled as Stable Diffusion
was trained, is what the UNet sees; it attends to all states of the picture's caption, as CLIP's frozen text encoder
gives them, without an adapter, and runs once at a constant timestep. The captions are written by BLIP-2 beforehand and
come from a file, see data/captions.py. Depth goes on as in VPD: neck "fusion", head "deconv". Segmentation joins the
maps of all tokens to the features; neck and head "fpn".

Source: Kondapaneni et al. 2024, https://arxiv.org/abs/2310.00031; TADP TADP/tadp_depth.py, TADP/tadp_seg_mm.py.
"""

from vpd_jax.errors import UserError
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.models.context.sentences import Sentence
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod, MethodSetup

LATENTS = ("sample", "mode")


class Tadp(DiffusionMethod):
  """Image and caption to the four maps of the UNet."""

  def __init__(
    self,
    setup: MethodSetup,
    *,
    token_length: int = 77,
    latents: str = "sample",
    latent_scale: float = 0.0,
    timestep: int = 1,
    pad_multiple: int = 64,
    pad_value: float = 0.0,
    attention_maps: bool = False,
    attention_max_size: int = 32,
    attention_gradient: bool = False,
    keep_unused: bool = False,
  ):
    """Builds the parts.

    Args:
      setup: see MethodSetup.
      token_length: tokens of a caption; longer ones are cut. Release: 77, all that CLIP knows.
      latents: "sample" of the VAE's posterior, see DiffusionMethod.latents; or "mode", which leaves nothing to chance.
        Release: "sample", drawn anew at every call, in evaluation too.
      latent_scale: factor on the latents; 0 for that with which the backbone was trained. Release: 0, which is 0.18215.
      timestep, pad_multiple, pad_value, attention_maps, attention_max_size, attention_gradient, keep_unused: see Vpd.

    Raises:
      ValueError: an unknown word; a padding the UNet cannot take; a text encoder that does not fit.
    """
    if latents not in LATENTS:
      raise UserError(f"method.latents={latents!r} is unknown to tadp; choose one of {LATENTS}.")
    unet, layer = setup.unet, setup.common.layer
    super().__init__(
      setup,
      fit=image_input.PaddedInput(pad_multiple, pad_value),
      context=Sentence(setup.text, token_length, unet.context_dim, setup.tokenize, layers.Identity(), **layer),
      time=ConstantTime(timestep),
      latent_scale=latent_scale,
      samples_latents=latents == "sample",
      join=image_input.joined_maps(
        unet, token_length, use=attention_maps, max_size=attention_max_size, gradient=attention_gradient
      ),
      with_out=keep_unused,
    )
    if keep_unused:
      self.unet.out = as_buffers(self.unet.out)
