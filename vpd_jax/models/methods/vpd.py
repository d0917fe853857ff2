"""VPD: the text-prompted UNet of Stable Diffusion as a perception backbone.

Figure 2 of the paper, left to right: the image is encoded by the frozen VAE (mode of the posterior, no noise); the
class or scene names, encoded by the frozen CLIP text encoder into `class_vectors`, pass the text adapter; the UNet runs
once at a constant timestep with the adapted text as its context; its four feature maps go on to the task's neck and
head. Depth uses one token, the vector of the scene's class; neck "fusion", head "deconv". The class is told, as in the
release, also at test time, or predicted from the image by CLIP. Segmentation uses the vectors of all classes, whose
cross-attention maps are joined to the features; neck and head "fpn". Referring segmentation uses the states of a
sentence, token by token, and their maps; no neck, head "lavt".

Source: Zhao et al. 2023, https://arxiv.org/abs/2303.02153; VPD depth/models_depth/model.py, vpd/models.py.
"""

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.attention import Implementation
from vpd_jax.models.backbones.clip_image import ImageSizes
from vpd_jax.models.backbones.clip_text import TextSizes, as_buffers
from vpd_jax.models.backbones.unet import UNet, UNetSizes
from vpd_jax.models.backbones.vae import VaeEncoder, VaeSizes
from vpd_jax.models.context import class_context, sentences
from vpd_jax.models.methods import image_input
from vpd_jax.types import Array, Batch, Branch, Buffer, Example, Features


class TextAdapter(nnx.Module):
  """Two linear layers around an exact GELU."""

  def __init__(self, width: int, **kinds: Any):
    torch_default = {"kernel_init": initializers.torch_default}
    self.fc = nnx.List(
      [
        layers.linear(width, width, **torch_default, **kinds),
        layers.GELU(),
        layers.linear(width, width, **torch_default, **kinds),
      ]
    )

  def __call__(self, text: Array) -> Array:
    return layers.chain(self.fc, text)


class Vpd(nnx.Module):
  """Image and class of the scene to the four maps of the UNet."""

  def __init__(
    self,
    *,
    unet: UNetSizes,
    vae: VaeSizes,
    text: TextSizes | None = None,
    image: ImageSizes | None = None,
    classes: int,
    tokenize: Callable[[tuple[str, ...]], np.ndarray] | None = None,
    prompt: str = "scene_class",
    token_length: int = 40,
    residual_scale: float = 1e-4,
    timestep: int = 1,
    latent_scale: float = 1.0,
    pad_multiple: int = 64,
    pad_value: float = 0.0,
    attention_maps: bool = False,
    attention_max_size: int = 32,
    attention_gradient: bool = False,
    keep_unused: bool = False,
    attention: Implementation = "auto",
    remat: bool = False,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds VAE, UNet and adapter.

    Args:
      unet, vae, text, image: sizes of the backbones; the image encoder's only count for prompt "predicted", the text
        encoder's for "sentence".
      classes: rows of `class_vectors`, which "sentence" has not.
      tokenize: sentences to int32 [sentences, token_length + 1], for "sentence"; see sentences.SentenceTokens.
      prompt: the UNet attends to one token, the vector of a class: "scene_class", that of `batch["class_id"]` (-1: the
        mean of all); or "predicted", that which CLIP tells from the image, window by window where there are windows. A
        "class_id" of 0 or more in the batch goes before it. "all_classes": to the vectors of all classes. "sentence":
        to the states of each image's sentence.
      token_length: tokens of a sentence. Release: 40 on RefCOCO and RefCOCO+, 77 on RefCOCOg.
      residual_scale: start of gamma in text + gamma * adapter(text). Release: 1e-4.
      timestep: the diffusion timestep, the same for every image. Release: 1 (the paper says 0).
      latent_scale: factor on the latents. Release: 1.0; Stable Diffusion itself was trained with 0.18215.
      pad_multiple: the image grows at right and bottom to the next multiple. Release: 64, as 480 -> 512 and 352 -> 384.
      pad_value: of the padding, after scaling to [-1, 1]. Release: 0, mid gray.
      attention_maps: join the cross-attention maps to the features. Release: in segmentation and referring.
      attention_max_size, attention_gradient: which maps, and whether they carry a gradient; see images.joined_maps.
        Release: 32, False (they are stored by a pass without gradient).
      keep_unused: hold the UNet's last block, which nothing here uses, as the released segmentation checkpoints do.
      attention, remat, dtype, param_dtype, rngs: see UNet.

    Raises:
      ValueError: unknown prompt; no classes; a padding the UNet cannot take.
    """
    if prompt not in class_context.PROMPTS:
      raise UserError(f"method.prompt={prompt!r} is unknown to vpd; choose one of {class_context.PROMPTS}.")
    if classes < 1 and prompt != "sentence":
      raise UserError(
        f"method.prompt={prompt!r} chooses among the classes of the data set, which names none; set config.data.scene "
        "to one name for all pictures, or take a method that is told no class."
      )
    if pad_multiple % 64:
      raise UserError(f"method.pad_multiple={pad_multiple} must be a multiple of 64, the UNet's coarsest stride.")
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    tokens = {"all_classes": classes, "sentence": token_length}.get(prompt, 1)
    self.timestep, self.latent_scale = timestep, latent_scale
    self.pad_multiple, self.pad_value, self.dtype = pad_multiple, pad_value, dtype
    self.prompt = prompt
    self.needs = frozenset({"scene_class": {"class_id"}, "sentence": {"tokens"}}.get(prompt, ()))
    self.adds, self.prepare_reads = frozenset(), frozenset()
    self.join = image_input.joined_maps(
      unet, tokens, use=attention_maps, max_size=attention_max_size, gradient=attention_gradient
    )
    self.strides, self.widths = tuple(8 * 2**i for i in range(len(unet.widths))), self.join.widths
    self.frame, self.tokens = "padded", (tokens, unet.context_dim)
    self.sentence_tokens = self.tokens if prompt == "sentence" else None
    self.gamma = nnx.Param(initializers.constant(residual_scale)(rngs.params(), (unet.context_dim,), param_dtype))
    if prompt == "sentence":
      self.adds, self.prepare_reads = frozenset({"tokens"}), frozenset({"sentence"})
      self.text_encoder = sentences.text_encoder(text or TextSizes(), token_length, unet.context_dim, **kinds)
      self._prepare = sentences.SentenceTokens(cast(Any, tokenize), token_length)
    else:
      vectors = initializers.normal(1.0)(rngs.params(), (classes, unet.context_dim), param_dtype)
      self.class_vectors, self._prepare = Buffer(vectors), class_context.unchanged
    self.vae = VaeEncoder(vae, attention=attention, **kinds)
    self.unet = UNet(unet, with_out=keep_unused, attention=attention, remat=remat, **kinds)
    if keep_unused:
      self.unet.out = as_buffers(self.unet.out)
    self.text_adapter = TextAdapter(unet.context_dim, **kinds)
    if prompt == "predicted":
      self.class_predictor = class_context.ClassPredictor(image or ImageSizes(), classes, **kinds)

  notes, training_only = (), ()

  @property
  def prepare(self) -> Callable[[Example], Example]:
    """For "sentence" adds the "tokens" of an example's sentence, int32 [N]; else does nothing."""
    return self._prepare

  def branches(self, training: bool) -> tuple[Branch, ...]:
    """One pass, in training and in evaluation."""
    del training
    return (Branch("text", 1.0),)

  def context(self, batch: Batch) -> Array:
    """Adapted text: float [B, 1, D] of each image's class, [B, K, D] of all classes, or [B, N, D] of sentences."""
    if self.prompt == "sentence":
      return self.adapted(self.text_states(batch))
    vectors = self.class_vectors[...].astype(self.dtype)
    if self.prompt == "all_classes":
      return jnp.broadcast_to(self.adapted(vectors[None]), (batch["image"].shape[0], *vectors.shape))
    table = jnp.concatenate([vectors, vectors.mean(axis=0, keepdims=True)])  # [K + 1, D]; row -1 is the mean
    return self.adapted(table[self.class_ids(batch)][:, None])

  def adapted(self, text: Array) -> Array:
    """text + gamma * adapter(text), float [B, N, D]."""
    return text + self.gamma[...].astype(self.dtype)[None, None] * self.text_adapter(text)

  def latents(self, batch: Batch) -> Array:
    """The VAE's mode of the padded images, float [B, h, w, 4], unscaled."""
    image = image_input.padded(image_input.network_input(batch, self.dtype), self.pad_multiple, self.pad_value)
    return self.vae(image).mean

  def text_states(self, batch: Batch) -> Array:
    """The frozen text encoder's states of "tokens", float [B, N, D], or the ready ones."""
    return sentences.states(self.text_encoder, batch, self.dtype)

  def class_ids(self, batch: Batch) -> Array:
    """The classes of a batch, told or predicted: int [B], -1 for the mean of all."""
    if self.prompt == "scene_class":
      return batch["class_id"]
    told, predicted = batch.get("class_id"), self.class_predictor(batch["image"])
    return predicted if told is None else jnp.where(told < 0, predicted, told)

  def __call__(self, batch: Batch, *, training: bool) -> Features:
    """Four maps at strides 8 to 64 of the padded image.

    Args:
      batch: "image" uint8 [B, H, W, 3], or float in [0, 1], of any sides; "class_id" int [B] where `needs` says so;
        "tokens" int [B, N] likewise, or "text_states" float [B, N, D] in their place; "latents" float [B, h, w, 4],
        unscaled, in place of the VAE where they are ready; "valid_size", see images.network_input.
      training: makes no difference here.
    """
    del training
    latents = batch["latents"] if "latents" in batch else self.latents(batch)
    context = self.context(batch)
    kept = self.join.positions(latents)
    out = self.unet(latents * self.latent_scale, context, timesteps=int(self.timestep), map_max_positions=kept)
    height, width = batch["image"].shape[1:3]
    return Features(self.join(out), context, (height, width))

  @property
  def attends_to_classes(self) -> bool:
    """Whether there are attention maps, one for each class."""
    return self.prompt == "all_classes" and bool(self.join.levels)

  def class_attention(self, batch: Batch) -> Array:
    """How much each place attends to each class: float [B, h, w, K] at the finest stride whose maps are joined.

    Shares of all tokens, so that a place's add up to 1; mean over heads and layers.
    """
    return self(batch, training=False).maps[min(self.join.levels)][..., -self.tokens[0] :]
