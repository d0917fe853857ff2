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
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.attention import Implementation
from vpd_jax.models.backbones.clip_text import TextSizes, as_buffers
from vpd_jax.models.backbones.unet import UNet, UNetSizes
from vpd_jax.models.backbones.vae import VaeEncoder, VaeSizes
from vpd_jax.models.context import class_context as sources
from vpd_jax.models.context import sentences
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.vpd import TextAdapter
from vpd_jax.types import Array, Batch, Branch, Features

PROMPTS = ("learned", "sentence+learned")
REFINE_INITS = ("released", "fan_in")


class MetaPrompts(nnx.Module):
  """Image to the four maps of the UNet's last pass."""

  def __init__(
    self,
    *,
    unet: UNetSizes,
    vae: VaeSizes,
    text: TextSizes | None = None,
    tokenize: Callable[[tuple[str, ...]], np.ndarray] | None = None,
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
    attention: Implementation = "auto",
    remat: bool = False,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds VAE, UNet, prompts, time vectors and adapters.

    Args:
      unet, vae, text: sizes of the backbones; the text encoder's only count for prompt "sentence+learned".
      tokenize, token_length: see Vpd.
      prompt: what the UNet attends to: "learned", the prompts; "sentence+learned", the states of each image's sentence,
        as CLIP's frozen text encoder gives them, and then the prompts. Ours, for referring segmentation.
      prompts: tokens the UNet attends to. Release: 50 in depth, 150 in segmentation.
      refine_steps: passes of the UNet. Release: 3.
      trained_steps: steps the weights hold, 0 for `refine_steps`. Evaluation may stop earlier; training may not.
      share_prompts: one set of prompts for all steps. Release: not in depth; in segmentation.
      adapt_prompts: each step's prompts pass a TextAdapter of its own, without residual. Release: in depth; not in
        segmentation.
      time_embedding: "learned", one vector per step for the residual blocks, without Stable Diffusion's two layers
        for the time, which are then absent (release); "timestep:N", those two layers at the diffusion timestep N.
      resize_scale: s in ((side // 64 + s) * 64), the sides the image is resized to, bilinearly; -1 keeps the image as
        it is. Release: 1 on NYU (480 -> 512), 2 on KITTI (352 -> 448); segmentation keeps the image.
      latent_scale: factor on the latents of the VAE. Release: 1.0; Stable Diffusion was trained with 0.18215.
      refine_init: start of the convolution that turns the finest feature back into latents, where no weights fill it.
        "released": zeros, as Stable Diffusion's own, so that the second step sees nothing of the image until they have
        grown; "fan_in": scaled by its inputs, for training from nothing.
      keep_unused: hold Stable Diffusion's layers for the time, and with one step the UNet's last block, though nothing
        here uses them, as the released segmentation checkpoints do.
      attention, remat, dtype, param_dtype, rngs: see UNet.

    Raises:
      ValueError: a number out of its range; an unknown time embedding or start.
    """
    timestep = re.fullmatch(r"timestep:(\d+)", time_embedding)
    if prompt not in PROMPTS:
      raise UserError(f"method.prompt={prompt!r} is unknown to meta_prompts; choose one of {PROMPTS}.")
    if prompts < 1:
      raise UserError(f"method.prompts={prompts} must be at least 1.")
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
    if resize_scale < -1:
      raise UserError(f"method.resize_scale={resize_scale} must be -1 (the image as it is), 0 or more.")
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.steps, self.trained_steps, self.resize_scale = refine_steps, held, resize_scale
    self.timestep, self.latent_scale, self.dtype = timestep and int(timestep[1]), latent_scale, dtype
    told = prompt == "sentence+learned"
    self.needs = self.adds = frozenset({"tokens"} if told else ())
    self.prepare_reads = frozenset({"sentence"} if told else ())
    self.prepare = sources.unchanged
    self.sentence_tokens = (token_length, unet.context_dim) if told else None
    if told:
      self.text_encoder = sentences.text_encoder(text or TextSizes(), token_length, unet.context_dim, **kinds)
      self.prepare = sentences.SentenceTokens(cast(Any, tokenize), token_length)
    self.strides, self.widths = tuple(8 * 2**i for i in range(len(unet.widths))), unet.widths
    self.frame, self.tokens = "resized", (prompts + (token_length if told else 0), unet.context_dim)
    normal = lambda *shape: nnx.Param(initializers.normal(1.0)(rngs.params(), shape, param_dtype))
    self.meta_prompts = nnx.List([normal(prompts, unet.context_dim) for _ in range(1 if share_prompts else held)])
    if timestep is None:
      self.t = nnx.List([normal(1, 4 * unet.model_channels) for _ in range(held)])
    if adapt_prompts:
      self.text_adapter = nnx.List([TextAdapter(unet.context_dim, **kinds) for _ in range(held)])
    self.adapt_prompts = adapt_prompts
    self.vae = VaeEncoder(vae, attention=attention, **kinds)
    # The last block stands under the UNet's names here. The release has it under three, all of which contain "unet".
    has = {"with_time_embed": timestep is not None or keep_unused, "with_out": held > 1 or keep_unused}
    self.unet = UNet(unet, **has, attention=attention, remat=remat, **kinds)
    if held > 1 and refine_init == "fan_in":
      self.unet.out[-1] = layers.conv(unet.widths[0], unet.out_channels, 3, **kinds)
    if keep_unused and timestep is None:
      self.unet.time_embed = as_buffers(self.unet.time_embed)
    if keep_unused and held == 1:
      self.unet.out = as_buffers(self.unet.out)

  notes, training_only = (), ()

  def branches(self, training: bool) -> tuple[Branch, ...]:
    """One, in training and in evaluation."""
    del training
    return (Branch("prompts", 1.0),)

  def context(self, step: int) -> Array:
    """The prompts of a step, counted from 0: float [N, D]."""
    prompts = self.meta_prompts[min(step, len(self.meta_prompts) - 1)][...].astype(self.dtype)
    return self.text_adapter[step](prompts) if self.adapt_prompts else prompts

  def text_states(self, batch: Batch) -> Array:
    """See Vpd.text_states."""
    return sentences.states(self.text_encoder, batch, self.dtype)

  def latents(self, batch: Batch) -> Array:
    """The VAE's mode of the resized images, float [B, h, w, 4], unscaled."""
    image = image_input.network_input(batch, self.dtype)
    return self.vae(layers.resize(image, self.size(*image.shape[1:3]))).mean

  def size(self, height: int, width: int) -> tuple[int, int]:
    """The (H, W) that an image of height x width is resized to.

    Raises:
      ValueError: nothing would be left of the image.
    """
    if self.resize_scale < 0:
      return height, width
    size = (height // 64 + self.resize_scale) * 64, (width // 64 + self.resize_scale) * 64
    if not all(size):
      raise UserError(
        f"an image of {height}x{width} becomes {size[0]}x{size[1]} at method.resize_scale={self.resize_scale}; use 1."
      )
    return size

  def __call__(self, batch: Batch, *, training: bool) -> Features:
    """Four maps at strides 8 to 64 of the resized image, and the last step's tokens.

    Args:
      batch: "image" uint8 [B, H, W, 3], or float in [0, 1], of any sides; "latents" float [B, h, w, 4], unscaled, in
        place of the VAE where they are ready; "valid_size", see images.network_input. Where h or w is no multiple of 8,
        the maps are those of the next one.
      training: runs all steps that the weights hold.

    Raises:
      ValueError: in training, with fewer steps than the weights hold: the others would learn nothing, yet decay.
    """
    if training and self.steps < self.trained_steps:
      raise UserError(
        f"training needs all {self.trained_steps} steps that the weights hold, but "
        f"method.refine_steps={self.steps}; fewer are for evaluation."
      )
    latents = (batch["latents"] if "latents" in batch else self.latents(batch)) * self.latent_scale
    before = [self.text_states(batch)] if self.sentence_tokens else []
    for step in range(self.steps):
      tokens = self.context(step)
      context = jnp.broadcast_to(tokens, (latents.shape[0], *tokens.shape))
      context = jnp.concatenate([*before, context], axis=1)  # [B, N, D]
      time: dict[str, Any] = (
        {"time_embedding": self.t[step][...]} if self.timestep is None else {"timesteps": self.timestep}
      )
      out = self.unet(latents, context, predict_noise=step < self.steps - 1, **time)
      latents = cast(Array, out.noise)  # none of the last step
    height, width = batch["image"].shape[1:3]
    return Features(out.features, context, (height, width))
