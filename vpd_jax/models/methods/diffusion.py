"""The base class of all methods, which is composed of five parts.

The *image* is padded or resized and encoded by the frozen VAE; the *context* provides the tokens that the UNet attends
to; the *time* replaces the diffusion timestep; the UNet runs one or more *passes*, each on the latents that the
previous pass predicts; its *cross-attention maps* are optionally concatenated to its features.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.models import initializers
from vpd_jax.models.backbones.attention import Implementation
from vpd_jax.models.backbones.clip_image import ImageSizes
from vpd_jax.models.backbones.clip_text import TextSizes
from vpd_jax.models.backbones.unet import RematPolicy, UNet, UNetSizes
from vpd_jax.models.backbones.vae import VaeEncoder, VaeSizes
from vpd_jax.models.backbones.vit import VitSizes
from vpd_jax.models.context.context import Context
from vpd_jax.models.layer_options import Common
from vpd_jax.models.methods import image_input
from vpd_jax.models.methods.image_input import JoinedMaps, PaddedInput, ResizedInput
from vpd_jax.models.parameters import Inlined
from vpd_jax.types import Array, Batch, Branch, Example, Features, Fields, MapInfo


def no_tokenizer(texts: tuple[str, ...]) -> np.ndarray:
  """Raises TypeError; the default for methods that read no text."""
  raise TypeError(f"no tokenizer was given for {len(texts)} texts; give MethodSetup one.")


@dataclasses.dataclass(frozen=True)
class MethodSetup:
  """The constructor argument shared by all methods.

  Attributes:
    unet, vae, text, image, vit: sizes of the backbones.
    common: dtypes and random keys.
    class_names: of the data set, by class id.
    tokenize: sentences to int32 [sentences, N], where N is the length of the method's texts; loads the tokenizer when
      it is called.
    training: False omits the parts in `Method.training_only`.
    attention, remat: see UNet.
  """

  unet: UNetSizes
  vae: VaeSizes
  common: Common
  text: TextSizes = dataclasses.field(default_factory=TextSizes)
  image: ImageSizes = dataclasses.field(default_factory=ImageSizes)
  vit: VitSizes = dataclasses.field(default_factory=VitSizes)
  class_names: tuple[str, ...] = ()
  tokenize: Callable[[tuple[str, ...]], np.ndarray] = no_tokenizer
  training: bool = True
  attention: Implementation = "auto"
  remat: RematPolicy | None = None


@dataclasses.dataclass(frozen=True)
class ConstantTime:
  """The same diffusion timestep for every image and pass."""

  timestep: int

  def __call__(self, step: int) -> Fields:
    """Keyword arguments for the UNet in a pass."""
    return {"timesteps": int(self.timestep)}


class LearnedTime(Inlined):
  """A learned vector for each pass, which replaces the embedded timestep."""

  def __init__(self, steps: int, width: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    draw = lambda: initializers.normal(1.0)(rngs.params(), (1, width), param_dtype)
    self.t = nnx.List([nnx.Param(draw()) for _ in range(steps)])

  def __call__(self, step: int) -> Fields:
    """See ConstantTime."""
    return {"time_embedding": self.t[step][...]}


class DiffusionMethod(nnx.Module):
  """Image and tokens to the four maps of the UNet; see types.Method for the attributes."""

  text_options: ClassVar[tuple[str, ...]] = ("tokenizer",)
  notes: tuple[str, ...] = ()
  training_only: tuple[str, ...] = ()
  branch = "text"  # name of the one pass of the batch through the network

  def __init__(
    self,
    setup: MethodSetup,
    *,
    fit: PaddedInput | ResizedInput,
    context: Context,
    time: ConstantTime | LearnedTime,
    latent_scale: float,
    samples_latents: bool = False,
    steps: int = 1,
    join: JoinedMaps | None = None,
    with_time_embed: bool = True,
    with_out: bool = False,
  ):
    """Builds VAE and UNet, in addition to the given parts.

    Args:
      setup: see MethodSetup.
      fit: pads or resizes the image before the VAE.
      context: source of the tokens.
      time: replaces the diffusion timestep.
      latent_scale: factor of the latents. 0, which is no factor, stands for that of the backbone, see VaeSizes; it is
        a number and not a word since an option of a config has one type.
      samples_latents: use a sample of the VAE's posterior instead of its mode.
      steps: passes of the UNet.
      join: selects the attention maps to concatenate to the features; None: none.
      with_time_embed, with_out: see UNet.
    """
    layer, unet = setup.common.layer, setup.unet
    self.dtype, self.steps = setup.common.dtype, steps
    self.latent_scale = latent_scale or setup.vae.latent_scale
    self.samples_latents = samples_latents
    self.fit, self.context, self.time = fit, context, time
    self.join = join or image_input.joined_maps(unet, context.tokens[0], use=False)
    self.map_info = MapInfo(
      self.join.widths, tuple(setup.vae.stride * 2**i for i in range(len(unet.widths))), context.tokens, fit.map_extent
    )
    self.needs, self.prepare_inputs = context.needs, context.prepare_inputs
    self.prepare_outputs, self.sentence_tokens = context.prepare_outputs, context.sentence_tokens
    self.vae = VaeEncoder(setup.vae, attention=setup.attention, **layer)
    self.unet = UNet(
      unet,
      with_time_embed=with_time_embed,
      with_out=with_out,
      attention=setup.attention,
      remat=setup.remat,
      **layer,
    )

  @property
  def prepare(self) -> Callable[[Example], Example]:
    """Host transform of the context."""
    return self.context.prepare

  @property
  def class_predictor(self) -> Callable[[Array], Array] | None:
    """Images to the ids of their classes; None if the context does not predict them."""
    return self.context.class_predictor

  @property
  def sentence_summary(self) -> Callable[[Iterable[str]], str] | None:
    """See Context."""
    return self.context.sentence_summary

  @property
  def attends_to_classes(self) -> bool:
    """Whether there is an attention map for each class."""
    return self.context.of_classes and bool(self.join.levels)

  def branches(self, training: bool) -> tuple[Branch, ...]:
    """A single branch, in training and in evaluation."""
    return (Branch(self.branch, 1.0),)

  def latents(self, batch: Batch, key: Array | None = None) -> Array:
    """The VAE's mode of the padded or resized images, or a sample, float [B, h, w, 4], unscaled.

    Args:
      batch: "image", and optionally "valid_size".
      key: for the noise of samples; None: a fixed key, with the same noise for all images of a size, so that the result
        for an image does not depend on the rest of the batch.
    """
    posterior = self.vae(self.fit(image_input.network_input(batch, self.dtype)))
    if not self.samples_latents:
      return posterior.mean
    rows, *shape = posterior.mean.shape
    # Folded, since the head uses the key itself for dropout.
    noise_key = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
    noise = jax.random.normal(noise_key, (1 if key is None else rows, *shape), jnp.float32)
    return posterior.sample(noise.astype(posterior.mean.dtype))

  def text_states(self, batch: Batch) -> Array:
    """The frozen text encoder's states of "tokens", float [B, N, D], or the precomputed ones."""
    return self.context.text_states(batch)

  def __call__(self, batch: Batch, *, training: bool, key: Array | None = None) -> Features:
    """Four maps at strides 8 to 64 of the padded or resized image, and the tokens of the last pass.

    Args:
      batch: "image" uint8 [B, H, W, 3], or float in [0, 1], of any size; the keys in `needs`: "class_id" int [B],
        "tokens" int [B, N], or precomputed "text_states" float [B, N, D]; optionally precomputed "latents" float
        [B, h, w, 4], unscaled; optionally "valid_size", see image_input.network_input. If h or w is not a multiple of
        8, the maps have the sizes of the next multiple.
      training: whether to run training-only branches too.
      key: for the noise of the latents, see `latents`.

    Returns:
      maps and context with len(branches(training)) * B rows.
    """
    latents = (batch["latents"] if "latents" in batch else self.latents(batch, key)) * self.latent_scale
    height, width = batch["image"].shape[1:3]
    maps, context = self.passes(latents, batch, training=training)
    return Features(maps, context, (height, width))

  def passes(self, latents: Array, batch: Batch, *, training: bool) -> tuple[tuple[Array, ...], Array]:
    """The maps of the last pass and its tokens, float [B, N, D]."""
    batch = self.context.once(batch)
    for step in range(self.steps):
      context = self.context(batch, step)
      latents, maps = self.run_unet(latents, context, step)
    return maps, context

  def run_unet(self, latents: Array, context: Array, step: int = 0) -> tuple[Array, tuple[Array, ...]]:
    """Runs one pass; returns the latents for the next one, None in the last pass, and the maps."""
    out = self.unet(
      latents,
      context,
      map_max_positions=self.join.positions(latents),
      predict_noise=step < self.steps - 1,
      **self.time(step),
    )
    return cast(Array, out.noise), self.join(out)

  def class_attention(self, batch: Batch) -> Array:
    """Attention of each position to each class: float [B, h, w, K] at the finest stride of the joined maps.

    Probabilities over all tokens, which sum to 1 at each position; mean over heads and layers.
    """
    return self(batch, training=False).maps[min(self.join.levels)][..., -self.context.tokens[0] :]
