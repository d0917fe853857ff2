"""IEDP: implicit and explicit language guidance of Stable Diffusion's UNet as a perception backbone.

Two branches share the UNet and everything behind it. *Implicit*: CLIP's frozen image encoder sees the image; its
tokens, projected, are read by learned queries in one block of attention, which gives the context of the UNet.
*Explicit*, in training only: what the labels say becomes a sentence, which CLIP's frozen text encoder turns into the
context. Evaluation runs the implicit branch alone: no label, no text encoder. The latent and CLIP's tokens are made
once for both. Neck and head are VPD's: "fusion" and "deconv" for depth; "fpn" for segmentation, where the attention
maps are joined to the features and the sentence is made of the names of the classes in the picture. Referring
segmentation, an experiment of ours, has one branch: each image's sentence, adapted, and the implicit tokens behind it.

No code was released, and the text of the paper's method section could not be had: what is an assumption here is an
option, and all of them stand in `presets.iedp_assumptions()`.

Source: Wang et al. 2024, https://arxiv.org/abs/2404.07600.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones.attention import Implementation
from vpd_jax.models.backbones.clip_image import RESIZES, ClipImage, ImageSizes, pixels
from vpd_jax.models.backbones.clip_text import ClipText, TextSizes, as_buffers
from vpd_jax.models.backbones.unet import UNet, UNetSizes
from vpd_jax.models.backbones.vae import VaeEncoder, VaeSizes
from vpd_jax.models.context import class_context, sentences
from vpd_jax.models.context.clip_queries import ImplicitText
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.vpd import TextAdapter
from vpd_jax.types import Array, Batch, Branch, Example, Features

CHOICES = {
  "prompt": ("image", "sentence+image"),
  "branch_mode": ("both", "implicit"),
  "clip_resize": tuple(RESIZES),
  "clip_features": ("last", "penultimate"),
  "output_norm": ("none", "ln"),
  "text_output": ("last", "pooled"),
  "explicit_adapter": ("residual", "none"),
  "tower_dtype": ("bfloat16", "float32"),
}


class Iedp(nnx.Module):
  """Image, and in training a sentence, to the four maps of the UNet."""

  def __init__(
    self,
    *,
    unet: UNetSizes,
    vae: VaeSizes,
    text: TextSizes,
    image: ImageSizes,
    class_names: tuple[str, ...],
    tokenize: Callable[[tuple[str, ...]], np.ndarray],
    training: bool = True,
    prompt: str = "image",
    token_length: int = 40,
    branch_mode: str = "both",
    lambda_exp: float = 1.0,
    sentence: str = "a photo of a {}",
    clip_resize: str = "bicubic",
    clip_features: str = "last",
    num_queries: int = 77,
    query_init: float = 0.02,
    num_blocks: int = 1,
    num_heads: int = 8,
    ffn_ratio: int = 4,
    output_norm: str = "none",
    text_output: str = "last",
    explicit_adapter: str = "residual",
    residual_scale: float = 1e-4,
    tower_dtype: str = "bfloat16",
    timestep: int = 1,
    latent_scale: float = 1.0,
    pad_multiple: int = 64,
    pad_value: float = 0.0,
    attention_maps: bool = False,
    attention_max_size: int = 32,
    attention_gradient: bool = False,
    attention: Implementation = "auto",
    remat: bool = False,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds VAE, UNet, CLIP's image encoder, the implicit module and, for training, the explicit branch.

    Args:
      unet, vae, text, image: sizes of the backbones.
      class_names: by class id, for the sentences.
      tokenize: sentences to int32 [sentences, text.positions]; called when `prepare` is asked for.
      training: False leaves the parts in `training_only` out.
      prompt: "image", the branches above; "sentence+image", one branch also in evaluation, which attends to the states
        of each image's sentence and then to the implicit tokens. Ours, for referring segmentation.
      token_length: tokens of such a sentence.
      branch_mode: "both", or "implicit" for training without text.
      lambda_exp: weight of the explicit branch's loss; that of the implicit branch is 1.
      sentence: of an image, with {} for the name of its class; without {} the same for all images; "names" for the
        names of the classes in its label map, see prompts.Names.
      clip_resize: of the image to CLIP's square, "bicubic" or "bilinear".
      clip_features: "last", the tokens after the last layer, or "penultimate".
      num_queries, query_init: number of learned queries and their deviation at the start.
      num_blocks, num_heads, ffn_ratio: of the block that reads CLIP's tokens.
      output_norm: "none", or "ln" for a LayerNorm after the last block.
      text_output: "last", all states of the text encoder, or "pooled", the one at the end of the sentence.
      explicit_adapter: "residual", C + gamma * adapter(C), as VPD's; or "none".
      residual_scale: start of gamma.
      tower_dtype: in which CLIP's towers are kept; they compute in `dtype`.
      timestep, latent_scale, pad_multiple, pad_value, attention_maps, attention_max_size, attention_gradient: see Vpd.
      attention, remat, dtype, param_dtype, rngs: see UNet.

    Raises:
      ValueError: an unknown word, a number out of range, widths that do not fit, a sentence of classes without any.
    """
    options = {name: value for name, value in locals().items() if name in OPTIONS}
    told = prompt == "sentence+image"
    _check({**options, "prompt": prompt}, unet, text, maps=attention_maps)
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    towers: dict[str, Any] = {**kinds, "param_dtype": jnp.dtype(tower_dtype)}
    explicit = branch_mode == "both" and training
    if explicit and "{}" in sentence and not class_names:
      raise UserError(
        f"method.sentence={sentence!r} names the class of an image, but the data set names none; set config.data.scene "
        "to one name for all pictures, or method.sentence to one without {}."
      )
    self._options, self._tokenize, self._lambda_exp = tuple(options.items()), tokenize, float(lambda_exp)
    self._class_names, self._sentence = class_names, sentence if explicit else ""
    of_names = sentence == class_context.NAMES
    if explicit and not of_names:
      class_context.sentences_of(sentence, class_names)  # checks the template
    self.clip_resize, self.clip_features, self.text_output = clip_resize, clip_features, text_output
    self.timestep, self.latent_scale = timestep, latent_scale
    self.pad_multiple, self.pad_value, self.dtype = pad_multiple, pad_value, dtype
    self.explicit, self.adapted = explicit, (explicit or told) and explicit_adapter == "residual"
    self.training_only = () if told else ("text_encoder", "text_adapter", "gamma")
    self.needs = self.adds = frozenset({"tokens"} if explicit or told else ())
    read = {"label"} if of_names else {"class_id"} if "{}" in sentence else ()
    self.prepare_reads = frozenset({"sentence"} if told else read if explicit else ())
    count = num_queries + (token_length if told else 0)
    self.join = image_input.joined_maps(
      unet, count, use=attention_maps, max_size=attention_max_size, gradient=attention_gradient
    )
    self.strides, self.widths = tuple(8 * 2**i for i in range(len(unet.widths))), self.join.widths
    self.frame, self.tokens = "padded", (count, unet.context_dim)
    self.sentence_tokens = (token_length, unet.context_dim) if told else None
    self.vae = VaeEncoder(vae, attention=attention, **kinds)
    self.unet = UNet(unet, with_out=False, attention=attention, remat=remat, **kinds)
    self.image_encoder = as_buffers(ClipImage(image, projected=False, **towers))
    block = {name: options[name] for name in ("num_queries", "query_init", "num_blocks", "num_heads", "ffn_ratio")}
    self.implicit = ImplicitText(
      image.width, unet.context_dim, output_norm=output_norm, attention=attention, **block, **kinds
    )
    if told:
      self.text_encoder = sentences.text_encoder(text, token_length, unet.context_dim, **towers)
    elif self.explicit:
      self.text_encoder = as_buffers(ClipText(text, **towers))
    if self.adapted:
      self.gamma = nnx.Param(initializers.constant(residual_scale)(rngs.params(), (unet.context_dim,), param_dtype))
      self.text_adapter = TextAdapter(unet.context_dim, **kinds)

  @property
  def notes(self) -> tuple[str, ...]:
    """Lines for the reader at the start of a run: the assumptions in force."""
    listed = ", ".join(f"{name}={value!r}" for name, value in self._options)
    return (f"IEDP assumptions in force (explained in presets.iedp_assumptions): {listed}",)

  @property
  def prepare(self) -> Callable[[Example], Example]:
    """Adds the "tokens" of an example's sentence, int32 [N]; looks for the tokenizer.

    Raises:
      ValueError: there is none.
    """
    if self.sentence_tokens:
      return sentences.SentenceTokens(self._tokenize, self.sentence_tokens[0])
    if not self.explicit:
      return class_context.unchanged
    if self._sentence == class_context.NAMES:
      return class_context.Names(self._tokenize(class_context.sentences_of("{}", self._class_names)))
    table = self._tokenize(class_context.sentences_of(self._sentence, self._class_names))
    return functools.partial(class_context.with_tokens, table=table)

  def branches(self, training: bool) -> tuple[Branch, ...]:
    """Implicit, and in training explicit."""
    both = (Branch("implicit", 1.0), Branch("explicit", self._lambda_exp))
    return both if training and self.explicit else both[:1]

  def latents(self, batch: Batch) -> Array:
    """See Vpd.latents."""
    image = image_input.padded(image_input.network_input(batch, self.dtype), self.pad_multiple, self.pad_value)
    return self.vae(image).mean

  def implicit_context(self, image: Array) -> Array:
    """Implicit text embeddings of uint8 [B, H, W, 3] or float in [0, 1]: float [B, N, D]."""
    seen = pixels(image, self.image_encoder.image_size, dtype=self.dtype, resize=self.clip_resize)
    states = self.image_encoder(seen)
    return self.implicit(states.last if self.clip_features == "last" else states.hidden[-2])

  def explicit_context(self, tokens: Array) -> Array:
    """Adapted states of the text encoder for int [B, M]: float [B, M, D], or [B, 1, D] where pooled."""
    states = self.text_encoder(tokens)
    return self.adapt(states.last if self.text_output == "last" else states.pooled[:, None])

  def adapt(self, text: Array) -> Array:
    """text + gamma * adapter(text), float [B, N, D], or the text as it is."""
    return text + self.gamma[...].astype(self.dtype)[None, None] * self.text_adapter(text) if self.adapted else text

  def text_states(self, batch: Batch) -> Array:
    """See Vpd.text_states."""
    return sentences.states(self.text_encoder, batch, self.dtype)

  def __call__(self, batch: Batch, *, training: bool) -> Features:
    """Four maps at strides 8 to 64 of the padded image; in training those of the explicit branch below the others.

    Args:
      batch: "image" uint8 [B, H, W, 3], or float in [0, 1], of any sides; "latents" float [B, h, w, 4], unscaled, in
        place of the VAE where they are ready; "valid_size", see images.network_input; in training "tokens" int [B, M].
      training: whether the explicit branch runs too.

    Returns:
      maps of len(branches(training)) * B rows. Where the branches have different numbers of tokens, the UNet runs once
      for each, and `context` is filled with zeros.
    """
    latents = batch["latents"] if "latents" in batch else self.latents(batch)
    height, width = batch["image"].shape[1:3]
    latents, size = latents * self.latent_scale, (height, width)
    contexts = [self.implicit_context(batch["image"])]
    if self.sentence_tokens:
      contexts = [jnp.concatenate([self.adapt(self.text_states(batch)), *contexts], axis=1)]
    if training and self.explicit:
      contexts.append(self.explicit_context(batch["tokens"]))
    kept = self.join.positions(latents)
    run = lambda z, text: self.join(self.unet(z, text, timesteps=int(self.timestep), map_max_positions=kept))
    tokens = max(context.shape[1] for context in contexts)
    filled = jnp.concatenate([jnp.pad(c, ((0, 0), (0, tokens - c.shape[1]), (0, 0))) for c in contexts])
    if len({context.shape[1] for context in contexts}) == 1:
      return Features(run(jnp.concatenate([latents] * len(contexts)), filled), filled, size)
    passes = [run(latents, context) for context in contexts]
    return Features(tuple(jnp.concatenate(maps) for maps in zip(*passes, strict=True)), filled, size)


# Options that the paper does not settle.
OPTIONS = (
  *("branch_mode", "lambda_exp", "sentence", "clip_resize", "clip_features", "num_queries", "query_init"),
  *("num_blocks", "num_heads", "ffn_ratio", "output_norm", "text_output", "explicit_adapter", "residual_scale"),
  *("tower_dtype", "timestep", "latent_scale"),
)


def _check(options: dict[str, Any], unet: UNetSizes, text: TextSizes, *, maps: bool) -> None:
  """Raises one ValueError with everything that cannot be."""
  width = unet.context_dim
  problems = [
    f"method.{name}={options[name]!r} is unknown; choose one of {words}."
    for name, words in CHOICES.items()
    if options[name] not in words
  ]
  problems += [
    f"method.{name}={options[name]!r} must be a whole number of at least 1."
    for name in ("num_queries", "num_blocks", "num_heads", "ffn_ratio")
    if not (isinstance(options[name], int) and options[name] >= 1)
  ]
  if options["lambda_exp"] < 0:
    problems.append(f"method.lambda_exp={options['lambda_exp']} must not be negative.")
  if not problems and width % options["num_heads"]:
    problems.append(f"method.num_heads={options['num_heads']} must divide {width}, the width of the UNet's context.")
  if options["branch_mode"] == "both" and text.width != width:
    problems.append(
      f"the text encoder (config.backbone.text) is {text.width} wide, the UNet's context {width}; both branches need "
      "them equal, method.branch_mode='implicit' does not."
    )
  explicit = 1 if options["text_output"] == "pooled" else text.positions
  if options["prompt"] == "sentence+image" and options["branch_mode"] == "both":
    problems.append("method.prompt='sentence+image' has one branch; set method.branch_mode='implicit'.")
  if maps and options["branch_mode"] == "both" and options["num_queries"] != explicit:
    problems.append(
      f"method.attention_maps needs as many tokens in both branches, but method.num_queries={options['num_queries']} "
      f"and a sentence has {explicit}; make them equal."
    )
  if problems:
    raise UserError(" ".join(problems))
