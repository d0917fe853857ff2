"""Preparation of images for the VAE, and concatenation of attention maps to the UNet's features."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vpd_jax.errors import UserError
from vpd_jax.models.backbones import layers
from vpd_jax.models.backbones.unet import UNetOutput, UNetSizes
from vpd_jax.types import Array, Batch


def signed(image: Array, dtype: DTypeLike) -> Array:
  """uint8 [B, H, W, 3], or float in [0, 1], to float in [-1, 1]; scaled in float32 or wider, then cast."""
  high = jnp.promote_types(dtype, jnp.float32)
  image = image.astype(high) / 255 if jnp.issubdtype(image.dtype, jnp.integer) else image.astype(high)
  return (image * 2 - 1).astype(dtype)


def network_input(batch: Batch, dtype: DTypeLike) -> Array:
  """The images of a batch, float [B, H, W, 3] in [-1, 1], with padding set to 0.

  Args:
    batch: "image" uint8 [B, H, W, 3], or float in [0, 1]; optionally "valid_size" int [B, 2], the (height, width)
      without padding at right and bottom, whose value uint8 cannot represent exactly.
    dtype: of the result.

  Source: mmseg pads with 0 after normalization (mmseg/datasets/pipelines/transforms.py Pad).
  """
  image = signed(batch["image"], dtype)
  if "valid_size" not in batch:
    return image
  height, width = batch["valid_size"][:, 0, None, None], batch["valid_size"][:, 1, None, None]  # [B, 1, 1]
  rows, columns = jnp.arange(image.shape[1])[None, :, None], jnp.arange(image.shape[2])[None, None, :]
  return jnp.where(((rows < height) & (columns < width))[..., None], image, 0)


def padded(image: Array, multiple: int, value: float) -> Array:
  """Pads [B, H, W, C] at the right and bottom to multiples of `multiple` with `value`."""
  bottom, right = (-side % multiple for side in image.shape[1:3])
  return jnp.pad(image, ((0, 0), (0, bottom), (0, right), (0, 0)), constant_values=value)


@dataclasses.dataclass(frozen=True)
class PaddedInput:
  """Pads the image at the right and bottom to multiples of `multiple` with `value`.

  Attributes:
    multiple: of the sides. Release of VPD: 64, as 480 -> 512 and 352 -> 384.
    value: of the padding, after scaling to [-1, 1]. Release: 0, mid gray.
  """

  multiple: int
  value: float
  map_extent: ClassVar[str] = "padded"

  def __post_init__(self):
    if self.multiple % 64:
      raise UserError(f"method.pad_multiple={self.multiple} must be a multiple of 64, the UNet's coarsest stride.")

  def __call__(self, image: Array) -> Array:
    """Float [B, H, W, 3] in [-1, 1], padded."""
    return padded(image, self.multiple, self.value)


@dataclasses.dataclass(frozen=True)
class ResizedInput:
  """Bilinearly resizes the image to sides of (side // 64 + scale) * 64; -1 does not resize."""

  scale: int
  map_extent: ClassVar[str] = "resized"

  def __post_init__(self):
    if self.scale < -1:
      raise UserError(f"method.resize_scale={self.scale} must be -1 (the image as it is), 0 or more.")

  def size(self, height: int, width: int) -> tuple[int, int]:
    """The resized (H, W) of an image of height x width.

    Raises:
      ValueError: a side would be 0.
    """
    if self.scale < 0:
      return height, width
    size = (height // 64 + self.scale) * 64, (width // 64 + self.scale) * 64
    if not all(size):
      raise UserError(
        f"an image of {height}x{width} becomes {size[0]}x{size[1]} at method.resize_scale={self.scale}; use 1."
      )
    return size

  def __call__(self, image: Array) -> Array:
    """Float [B, H, W, 3] in [-1, 1], resized."""
    return layers.resize(image, self.size(*image.shape[1:3]))


@dataclasses.dataclass(frozen=True)
class JoinedMaps:
  """Concatenates cross-attention maps, one channel per token, to the UNet's features of the same size.

  Attributes:
    levels: of the features with an attention map.
    widths: of the features including the maps.
    gradient: whether to backpropagate through the maps.

  Source: VPD vpd/models.py UNetWrapper.process_attn, register_attention_control.
  """

  levels: tuple[int, ...]
  widths: tuple[int, ...]
  gradient: bool

  def positions(self, latents: Array) -> int:
    """Largest number of positions of the maps that the UNet must return; 0 if none."""
    if not self.levels:
      return 0
    height, width = (-(-side // 2 ** min(self.levels)) for side in latents.shape[1:3])
    return height * width

  def __call__(self, out: UNetOutput) -> tuple[Array, ...]:
    """The features, finest first, with the maps appended to their channels."""
    joined = list(out.features)
    for level in self.levels:
      probabilities = out.maps[joined[level].shape[1:3]]
      probabilities = probabilities if self.gradient else jax.lax.stop_gradient(probabilities)
      joined[level] = jnp.concatenate([joined[level], probabilities], axis=-1)
    return tuple(joined)


def joined_maps(unet: UNetSizes, tokens: int, *, use: bool, max_size: int = 32, gradient: bool = False) -> JoinedMaps:
  """Selects the attention maps to concatenate.

  Args:
    unet: sizes of the UNet.
    tokens: channels of a map.
    use: False selects none.
    max_size: side of the largest selected map, for an image of 512 x 512: 32 is stride 16.
    gradient: whether to backpropagate through the maps.

  Raises:
    ValueError: no level with attention has this size.
  """
  sides = {64 // 2**level: level for level in unet.attention_levels}
  if use and max_size not in sides:
    raise UserError(
      f"method.attention_max_size={max_size} must be the side of a map for an image of 512: one of {sorted(sides)}."
    )
  levels = tuple(level for side, level in sides.items() if use and side <= max_size)
  return JoinedMaps(levels, tuple(w + tokens * (i in levels) for i, w in enumerate(unet.widths)), gradient)
