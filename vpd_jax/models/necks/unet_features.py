"""Necks for the feature maps of a UNet."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, Features, MapInfo

# The releases use timm's trunc_normal_(std=0.02), which truncates at -2 and 2, i.e. at a hundred standard deviations.
NORMAL = initializers.normal(0.02)


class NoNeck(nnx.Module):
  """Returns the maps unchanged."""

  def __init__(self, maps: MapInfo, common: Common):
    """Stores `maps` for the head; `common` is unused."""
    self.map_info = maps

  def __call__(self, features: Features, *, training: bool = False) -> Features:
    """The same features."""
    return features


class Fusion(nnx.Module):
  """VPD's depth fusion: four maps to one at stride 32, cropped to the image without padding.

  Map 0 passes two convolutions of stride 2, map 1 one, and map 3 is upsampled by two (nearest); all are concatenated
  with map 2 and fused by a 1x1 convolution. The crop has ceil(H / 32) rows and ceil(W / 32) columns, which removes the
  method's padding (in the release 16 -> 15 for 480 padded to 512).

  Source: VPD depth/models_depth/model.py VPDDepthEncoder.
  """

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    width: int = 1536,
    cut_padding: bool = True,
  ):
    """Builds the layers.

    Args:
      maps: of the input, four.
      common: dtypes, random keys, groups of batch normalization.
      width: of the output map.
      cut_padding: False keeps the padding, which the head crops later. Release of VPD: True, of EcoDepth: False.

    Raises:
      ValueError: not four maps, or maps of a resized image.
    """
    if len(maps.widths) != 4:
      raise UserError(f"neck 'fusion' joins four maps, but the method gives {len(maps.widths)}.")
    if maps.map_extent != "padded":
      raise UserError(
        f"neck 'fusion' cuts padding off, but the method's image is {maps.map_extent}; use neck 'einsum'."
      )
    widths = maps.widths
    self.cut_padding = cut_padding
    norm = lambda w: normalization.GroupNorm(w, groups=16, epsilon=1e-5, **common.layer)
    half = lambda w: layers.conv(w, w, 3, stride=2, kernel_init=NORMAL, **common.layer)
    self.map_info = dataclasses.replace(maps, widths=(width,), strides=(maps.strides[2],))
    self.layer1 = nnx.List([half(widths[0]), norm(widths[0]), layers.ReLU(), half(widths[0])])
    self.layer2 = nnx.List([half(widths[1])])
    mixed = layers.conv(sum(widths), width, 1, kernel_init=NORMAL, **common.layer)
    self.out_layer = nnx.List([mixed, norm(width), layers.ReLU()])

  def __call__(self, features: Features, *, training: bool = False) -> Features:
    """The fused map; `training` has no effect."""
    finest, fine, coarse, coarsest = features.maps
    coarsest = layers.resize(coarsest, coarse.shape[1:3], method="nearest")
    joined = [layers.chain(self.layer1, finest), layers.chain(self.layer2, fine), coarse, coarsest]
    x = layers.chain(self.out_layer, jnp.concatenate(joined, axis=-1))  # [B, h, w, width]
    if self.cut_padding:
      rows, columns = (-(-side // self.map_info.strides[0]) for side in features.image_size)
      x = x[:, :rows, :columns]
    return features._replace(maps=(x,))


class _Upsampled(nnx.Module):
  """Transposed convolutions that upsample by two each, then a 3x3 convolution to `width`; all normalized."""

  def __init__(self, width: int, doublings: int, common: Common, *, inner: int):
    layer = common.layer
    norm = lambda w: normalization.BatchNorm(w, group=common.norm_group, **layer)
    # PyTorch's default, as in the release; its fan of a transposed convolution is that of the outputs.
    default = initializers.variance_scaling(1 / 3, "fan_out", "uniform")
    deconvs, last = [], width
    for _ in range(doublings):
      deconvs += [layers.ConvTranspose(last, inner, 4, padding=1, kernel_init=default, **layer), norm(inner)]
      deconvs.append(layers.ReLU())
      last = inner
    self.deconv_layers = nnx.List(deconvs)
    self.conv_layers = nnx.List([layers.conv(last, width, 3, kernel_init=NORMAL, **layer), norm(width), layers.ReLU()])

  def __call__(self, x: Array, *, training: bool) -> Array:
    x = layers.chain(self.deconv_layers, x, training=training)
    return layers.chain(self.conv_layers, x, training=training)  # [B, h * 2^doublings, w * 2^doublings, width]


class EinsumLevels(nnx.Module):
  """MetaPrompts' neck for segmentation: four maps to four maps with one channel per prompt.

  Each map is upsampled by two (bilinear) and projected to the width of the prompts by a 3x3 convolution; channel n of
  the result is the inner product with prompt n of the last pass of the UNet.

  Source: MetaPrompts segmentation, extract_feat (upconv1 to upconv4).
  """

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
  ):
    """Builds the layers.

    Args:
      maps: of the input, four.
      common: dtypes, random keys, groups of batch normalization.

    Raises:
      ValueError: not four maps.
    """
    if len(maps.widths) != 4:
      raise UserError(f"neck 'einsum_levels' takes four maps, but the method gives {len(maps.widths)}.")
    (prompts, width), layer = maps.tokens, common.layer
    default = initializers.torch_default
    norm = lambda w: normalization.GroupNorm(w, groups=16, epsilon=1e-5, **layer)
    level = lambda w: nnx.List([layers.conv(w, width, 3, kernel_init=default, **layer), norm(width), layers.ReLU()])
    self.map_info = dataclasses.replace(maps, widths=(prompts,) * 4, strides=tuple(s // 2 for s in maps.strides))
    self.upconv1, self.upconv2, self.upconv3, self.upconv4 = (level(w) for w in maps.widths)

  def __call__(self, features: Features, *, training: bool) -> Features:
    """Four maps at half the strides; `training` has no effect."""
    maps = []
    for convolved, x in zip((self.upconv1, self.upconv2, self.upconv3, self.upconv4), features.maps, strict=True):
      x = layers.resize(x, (2 * x.shape[1], 2 * x.shape[2]))
      maps.append(jnp.einsum("bhwc,bnc->bhwn", layers.chain(convolved, x), features.context))
    return features._replace(maps=tuple(maps))


class Einsum(nnx.Module):
  """MetaPrompts' neck for depth: four maps to one map with one channel per prompt.

  Map 0 passes a convolution, maps 1 to 3 one to three transposed convolutions of kernel 4 that upsample them to its
  size; all are concatenated and fused by a 3x3 convolution to the width of the prompts. Channel n of the result is the
  inner product with prompt n of the last pass of the UNet. Since the method has resized the image, the map is resized
  to one cell per 8 pixels of the original image.

  Source: MetaPrompts depth/models_depth/model.py VPDDepthEncoder, VPDDepth.
  """

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    inner: int = 32,
  ):
    """Builds the layers.

    Args:
      maps: of the input, four.
      common: dtypes, random keys, groups of batch normalization.
      inner: width of the transposed convolutions.

    Raises:
      ValueError: not four maps; strides that do not double from map to map; a padded image.
    """
    if len(maps.widths) != 4:
      raise UserError(f"neck 'einsum' joins four maps, but the method gives {len(maps.widths)}.")
    if maps.map_extent != "resized":
      raise UserError(f"neck 'einsum' shows a resized image, but the method's is {maps.map_extent}; use neck 'fusion'.")
    if maps.strides != tuple(maps.strides[0] * 2**i for i in range(4)):
      raise UserError(f"neck 'einsum' joins maps whose strides double, but the method's are {maps.strides}.")
    (prompts, width), widths, layer = maps.tokens, maps.widths, common.layer
    norm = lambda w: normalization.GroupNorm(w, groups=16, epsilon=1e-5, **layer)
    mixed = lambda i, o: nnx.List([layers.conv(i, o, 3, kernel_init=NORMAL, **layer), norm(o), layers.ReLU()])
    self.map_info = dataclasses.replace(maps, widths=(prompts,), strides=maps.strides[:1])
    self.layer1 = mixed(widths[0], widths[0])
    upsampled = lambda i: _Upsampled(widths[i], i, common, inner=inner)
    self.layer2, self.layer3, self.layer4 = upsampled(1), upsampled(2), upsampled(3)
    self.out_layer = mixed(sum(widths), width)

  def __call__(self, features: Features, *, training: bool) -> Features:
    """One map [B, H // 8, W // 8, prompts] with at least one cell."""
    return features._replace(maps=(self.cells(self.products(features, training=training), features.image_size),))

  def products(self, features: Features, *, training: bool) -> Array:
    """The inner products at the size of map 0: float [B, h, w, prompts]."""
    finest, *coarser = features.maps
    upsampled = zip((self.layer2, self.layer3, self.layer4), coarser, strict=True)
    joined = [layers.chain(self.layer1, finest), *(layer(x, training=training) for layer, x in upsampled)]
    x = layers.chain(self.out_layer, jnp.concatenate(joined, axis=-1))  # [B, h, w, width]
    return jnp.einsum("bhwc,bnc->bhwn", x, features.context)

  def cells(self, x: Array, image_size: tuple[int, int]) -> Array:
    """Resizes to a cell per `strides[0]` pixels of the image, rounded down as in the release."""
    rows, columns = (max(side // self.map_info.strides[0], 1) for side in image_size)
    return layers.resize(x, (rows, columns))
