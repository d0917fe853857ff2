"""MetaPrompts: learned prompts instead of text, and a UNet that refines its features recurrently.

The frozen VAE encodes the image (mode of the posterior, no noise); the UNet attends to learned prompts, with a learned
vector instead of the time embedding; Stable Diffusion's last block converts the finest feature back to latents, on
which the same UNet runs again with the prompts of the next step; the neck multiplies the four maps of the last step
with the prompts of that step. Gradients pass through all steps. Depth has prompts and an adapter for each step, neck
"einsum" and head "deconv"; segmentation one set of prompts and no adapter, neck "einsum_levels" and head "upernet".
Referring segmentation, which is not part of the publication, attends to the states of each image's sentence followed by
the prompts, with head "lavt".

Source: Wan et al. 2023, https://arxiv.org/abs/2312.14733; MetaPrompts depth/models_depth/model.py,
meta_prompts/models.py.
"""

import re

from vpd_jax.errors import UserError, check_choice
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
      setup: see MethodSetup; text encoder and tokenizer are used for prompt "sentence+learned" only.
      token_length: see Vpd.
      prompt: tokens that the UNet attends to: "learned", the prompts; "sentence+learned", the states of each image's
        sentence from CLIP's frozen text encoder, followed by the prompts, for referring segmentation (not published).
      prompts: number of learned prompts. Release: 50 in depth, 150 in segmentation.
      refine_steps: passes of the UNet. Release: 3. The last block, whose output is the input of the next pass, was
        trained to predict noise in Stable Diffusion 1.x and 2.1-base, and v in 2.1 (768 pixels). It is finetuned in
        both cases.
      trained_steps: number of steps in the weights, 0: `refine_steps`. Evaluation may use fewer; training may not.
      share_prompts: one set of prompts for all steps. Release: not in depth; in segmentation.
      adapt_prompts: a TextAdapter without residual for the prompts of each step. Release: in depth; not in
        segmentation.
      time_embedding: "learned", one vector per step for the residual blocks instead of Stable Diffusion's two layers
        for the time embedding, which are omitted (release); "timestep:N", these two layers at the diffusion timestep N.
      resize_scale: s in ((side // 64 + s) * 64), the sides to which the image is resized bilinearly; -1: not resized.
        Release: 1 on NYU (480 -> 512), 2 on KITTI (352 -> 448); segmentation does not resize.
      latent_scale: see DiffusionMethod. Release: 1.0.
      refine_init: initializer of the convolution that converts the finest feature to latents, if it is not loaded.
        "released": zeros, as in Stable Diffusion, so that initially the second step has no information about the image;
        "fan_in": scaled by its inputs, for training from scratch.
      keep_unused: include Stable Diffusion's layers for the time embedding, and with one step the UNet's last block,
        which are unused, as in the released segmentation checkpoints.

    Raises:
      ValueError: a number out of range; unknown `time_embedding` or `refine_init`.
    """
    timestep = re.fullmatch(r"timestep:(\d+)", time_embedding)
    check_choice("method.prompt", prompt, PROMPTS, owner="meta_prompts")
    if refine_steps < 1:
      raise UserError(f"method.refine_steps={refine_steps} must be at least 1, the number of passes of the UNet.")
    if trained_steps < 0:
      raise UserError(f"method.trained_steps={trained_steps} must be 0 (as many as refine_steps) or more.")
    num_steps = trained_steps or refine_steps
    if refine_steps > num_steps:
      raise UserError(
        f"method.refine_steps={refine_steps} is more than the {num_steps} steps that the weights hold "
        f"(method.trained_steps); use 1 to {num_steps}."
      )
    if timestep is None and time_embedding != "learned":
      raise UserError(f"method.time_embedding={time_embedding!r} is unknown; use 'learned' or 'timestep:N'.")
    check_choice("method.refine_init", refine_init, REFINE_INITS)
    layer, unet = setup.common.layer, setup.unet
    width = unet.context_dim
    context: Context = LearnedPrompts(prompts, width, num_steps, share=share_prompts, adapt=adapt_prompts, **layer)
    if prompt == "sentence+learned":
      context = SentenceThen(
        Sentence(setup.text, token_length, width, setup.tokenize, layers.Identity(), **layer), context
      )
    self.trained_steps = num_steps
    super().__init__(
      setup,
      fit=ResizedInput(resize_scale),
      context=context,
      time=ConstantTime(int(timestep[1])) if timestep else LearnedTime(num_steps, 4 * unet.model_channels, **layer),
      latent_scale=latent_scale,
      steps=refine_steps,
      # The last block is named as part of the UNet. The release has it under three names, which all contain "unet".
      with_time_embed=timestep is not None or keep_unused,
      with_out=num_steps > 1 or keep_unused,
    )
    if num_steps > 1 and refine_init == "fan_in":
      self.unet.out[-1] = layers.conv(unet.widths[0], unet.out_channels, 3, **layer)
    if keep_unused and timestep is None:
      self.unet.time_embed = as_buffers(self.unet.time_embed)
    if keep_unused and num_steps == 1:
      self.unet.out = as_buffers(self.unet.out)

  def __call__(self, batch: Batch, *, training: bool, key: Array | None = None) -> Features:
    """See DiffusionMethod; training requires all steps of the weights.

    Raises:
      ValueError: training with fewer steps than in the weights: weight decay would still affect the others.
    """
    if training and self.steps < self.trained_steps:
      raise UserError(
        f"training needs all {self.trained_steps} steps that the weights hold, but "
        f"method.refine_steps={self.steps}; fewer are for evaluation."
      )
    return super().__call__(batch, training=training, key=key)
