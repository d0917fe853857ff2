"""MetaPrompts: learned prompts in place of text, and a UNet that refines its own features.

From image to maps: the image is encoded by the frozen VAE (mode of the posterior, no
noise); the UNet attends to learned prompts, told a learned vector where a diffusion model is told the time; Stable
Diffusion's own last block turns the finest feature back into latents, with which the same UNet runs again, attending
to the prompts of the next step; the four maps of the last step go on to the neck, which multiplies them with the
prompts of that step. Gradients pass through all steps. Depth has prompts and an adapter for each step, neck "einsum"
and head "deconv"; segmentation one set of prompts and no adapter, neck "einsum_levels" and head "upernet". Referring
segmentation, an experiment of ours, has the states of each image's sentence before segmentation's prompts, and head
"lavt".

Source: Wan et al. 2023, https://arxiv.org/abs/2312.14733; MetaPrompts depth/models_depth/model.py,
meta_prompts/models.py.
"""

import re

from vpd_jax.errors import UserError
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.models.context.context import Context, SentenceThen
from vpd_jax.models.context.learned_prompts import LearnedPrompts
from vpd_jax.models.context.sentences import Sentence
from vpd_jax.models.methods.diffusion import ConstantTime, DiffusionMethod, LearnedTime, MethodSetup
from vpd_jax.models.methods.image_input import ResizedInput
from vpd_jax.types import Array, Batch, Features

PROMPTS = ("learned", "sentence+learned")
REFINE_INITS = ("released", "fan_in")


class MetaPrompts(DiffusionMethod):
  """Image to the four maps of the UNet's last pass."""

  branch = "prompts"

  def __init__(
    self,
    setup: MethodSetup,
    *,
    prompt: str = "learned",
    token_length: int = 40,
    prompts: int = 50,
    refine_steps: int = 3,
    trained_steps: int = 0,
    share_prompts: bool = False,
    adapt_prompts: bool = True,
    time_embedding: str = "learned",
    resize_scale: int = 1,
    latent_scale: float = 1.0,
    refine_init: str = "released",
    keep_unused: bool = False,
  ):
    """Builds the parts.

    Args:
      setup: see MethodSetup; text encoder and tokenizer only count for prompt "sentence+learned".
      token_length: see Vpd.
      prompt: what the UNet attends to: "learned", the prompts; "sentence+learned", the states of each image's sentence,
        as CLIP's frozen text encoder gives them, and then the prompts. Ours, for referring segmentation.
      prompts: tokens the UNet attends to. Release: 50 in depth, 150 in segmentation.
      refine_steps: passes of the UNet. Release: 3. What the last block gives for the next pass is Stable Diffusion's
        prediction: of the noise in 1.x and 2.1-base, of v in 2.1 (768 pixels). Here it is trained on in either case.
      trained_steps: steps the weights hold, 0 for `refine_steps`. Evaluation may stop earlier; training may not.
      share_prompts: one set of prompts for all steps. Release: not in depth; in segmentation.
      adapt_prompts: each step's prompts pass a TextAdapter of its own, without residual. Release: in depth; not in
        segmentation.
      time_embedding: "learned", one vector per step for the residual blocks, without Stable Diffusion's two layers
        for the time, which are then absent (release); "timestep:N", those two layers at the diffusion timestep N.
      resize_scale: s in ((side // 64 + s) * 64), the sides the image is resized to, bilinearly; -1 keeps the image as
        it is. Release: 1 on NYU (480 -> 512), 2 on KITTI (352 -> 448); segmentation keeps the image.
      latent_scale: factor on the latents of the VAE. Release: 1.0; 0 for that with which the backbone was trained.
      refine_init: start of the convolution that turns the finest feature back into latents, where no weights fill it.
        "released": zeros, as Stable Diffusion's own, so that the second step sees nothing of the image until they have
        grown; "fan_in": scaled by its inputs, for training from nothing.
      keep_unused: hold Stable Diffusion's layers for the time, and with one step the UNet's last block, though nothing
        here uses them, as the released segmentation checkpoints do.

    Raises:
      ValueError: a number out of its range; an unknown time embedding or start.
    """
    timestep = re.fullmatch(r"timestep:(\d+)", time_embedding)
    if prompt not in PROMPTS:
      raise UserError(f"method.prompt={prompt!r} is unknown to meta_prompts; choose one of {PROMPTS}.")
    if refine_steps < 1:
      raise UserError(f"method.refine_steps={refine_steps} must be at least 1, the number of passes of the UNet.")
    if trained_steps < 0:
      raise UserError(f"method.trained_steps={trained_steps} must be 0 (as many as refine_steps) or more.")
    held = trained_steps or refine_steps
    if refine_steps > held:
      raise UserError(
        f"method.refine_steps={refine_steps} is more than the {held} steps that the weights hold "
        f"(method.trained_steps); use 1 to {held}."
      )
    if timestep is None and time_embedding != "learned":
      raise UserError(f"method.time_embedding={time_embedding!r} is unknown; use 'learned' or 'timestep:N'.")
    if refine_init not in REFINE_INITS:
      raise UserError(f"method.refine_init={refine_init!r} is unknown; choose one of {REFINE_INITS}.")
    layer, unet = setup.common.layer, setup.unet
    width = unet.context_dim
    context: Context = LearnedPrompts(prompts, width, held, share=share_prompts, adapt=adapt_prompts, **layer)
    if prompt == "sentence+learned":
      context = SentenceThen(
        Sentence(setup.text, token_length, width, setup.tokenize, layers.Identity(), **layer), context
      )
    self.trained_steps = held
    super().__init__(
      setup,
      fit=ResizedInput(resize_scale),
      context=context,
      time=ConstantTime(int(timestep[1])) if timestep else LearnedTime(held, 4 * unet.model_channels, **layer),
      latent_scale=latent_scale,
      steps=refine_steps,
      # The last block stands under the UNet's names here. The release has it under three, all of which contain "unet".
      with_time_embed=timestep is not None or keep_unused,
      with_out=held > 1 or keep_unused,
    )
    if held > 1 and refine_init == "fan_in":
      self.unet.out[-1] = layers.conv(unet.widths[0], unet.out_channels, 3, **layer)
    if keep_unused and timestep is None:
      self.unet.time_embed = as_buffers(self.unet.time_embed)
    if keep_unused and held == 1:
      self.unet.out = as_buffers(self.unet.out)

  def __call__(self, batch: Batch, *, training: bool, key: Array | None = None) -> Features:
    """See DiffusionMethod; in training all steps that the weights hold.

    Raises:
      ValueError: in training, with fewer steps than the weights hold: the others would learn nothing, yet decay.
    """
    if training and self.steps < self.trained_steps:
      raise UserError(
        f"training needs all {self.trained_steps} steps that the weights hold, but "
        f"method.refine_steps={self.steps}; fewer are for evaluation."
      )
    return super().__call__(batch, training=training, key=key)
