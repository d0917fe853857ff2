"""Features to Features: what stands between a method's maps and a head."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.types import Array, Features

# timm's trunc_normal_(std=0.02) of the release cuts at -2 and 2, a hundred deviations away.
NORMAL = initializers.normal(0.02)


class NoNeck(nnx.Module):
  """Hands the maps on as they are."""

  needs_maps = 1

  def __init__(
    self,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    tokens: tuple[int, int] = (0, 0),
    frame: str = "padded",
    norm_group: int = 0,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Takes what every neck is told; only `widths` and `strides` matter, to the head."""
    del tokens, frame, norm_group, dtype, param_dtype, rngs
    self.widths, self.strides = tuple(widths), tuple(strides)

  def __call__(self, features: Features, *, training: bool = False) -> Features:
    """The same features."""
    del training
    return features


class Fusion(nnx.Module):
  """VPD's depth fusion: four maps to one at stride 32, cropped to the part that shows the image.

  Map 0 passes two convolutions of stride 2, map 1 one, map 3 is doubled (nearest) and joined to map 2; all are
  joined and mixed by a 1x1 convolution. The crop keeps ceil(H / 32) rows and ceil(W / 32) columns, which drops what
  only shows the method's padding (the release: 16 -> 15 for 480 padded to 512).

  Source: VPD depth/models_depth/model.py VPDDepthEncoder.
  """

  needs_maps = 4

  def __init__(
    self,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    frame: str,
    width: int = 1536,
    tokens: tuple[int, int] = (0, 0),
    norm_group: int = 0,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      widths, strides: of the four maps that come in.
      frame: what they show; see Method.
      width: of the map that goes out.
      tokens, norm_group: of the context and of batch normalization, which every neck is told of; no use of them here.

    Raises:
      ValueError: another number of maps than four, or maps of a resized image.
    """
    del tokens, norm_group
    if len(widths) != 4:
      raise UserError(f"neck 'fusion' joins four maps, but the method gives {len(widths)}.")
    if frame != "padded":
      raise UserError(f"neck 'fusion' cuts padding off, but the method's image is {frame}; use neck 'einsum'.")
    kinds = {
      "dtype": dtype,
      "param_dtype": param_dtype,
      "rngs": rngs,
      "kernel_init": initializers.truncated_normal(0.02),
    }
    norms = {"groups": 16, "epsilon": 1e-5, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    half = lambda w: layers.conv(w, w, 3, stride=2, **kinds)
    self.strides, self.widths = (strides[2],), (width,)
    self.layer1 = nnx.List(
      [half(widths[0]), normalization.GroupNorm(widths[0], **norms), layers.ReLU(), half(widths[0])]
    )
    self.layer2 = nnx.List([half(widths[1])])
    self.out_layer = nnx.List(
      [layers.conv(sum(widths), width, 1, **kinds), normalization.GroupNorm(width, **norms), layers.ReLU()]
    )

  def __call__(self, features: Features, *, training: bool = False) -> Features:
    """The fused map; training makes no difference."""
    del training
    finest, fine, coarse, coarsest = features.maps
    coarsest = layers.resize(coarsest, coarse.shape[1:3], method="nearest")
    joined = [layers.chain(self.layer1, finest), layers.chain(self.layer2, fine), coarse, coarsest]
    x = layers.chain(self.out_layer, jnp.concatenate(joined, axis=-1))  # [B, h, w, width]
    rows, columns = (-(-side // self.strides[0]) for side in features.image_size)
    return features._replace(maps=(x[:, :rows, :columns],))


class _Raised(nnx.Module):
  """Transposed convolutions, each doubling the size, then a 3x3 convolution back to the width; all normalized."""

  def __init__(self, width: int, doublings: int, *, inner: int, norm_group: int, **kinds: Any):
    norm = lambda w: normalization.BatchNorm(w, group=norm_group, **kinds)
    # PyTorch's default, whose fan of a transposed convolution counts the outputs: the release leaves it.
    default = initializers.variance_scaling(1 / 3, "fan_out", "uniform")
    deconvs, last = [], width
    for _ in range(doublings):
      deconvs += [layers.ConvTranspose(last, inner, 4, padding=1, kernel_init=default, **kinds), norm(inner)]
      deconvs.append(layers.ReLU())
      last = inner
    self.deconv_layers = nnx.List(deconvs)
    self.conv_layers = nnx.List([layers.conv(last, width, 3, kernel_init=NORMAL, **kinds), norm(width), layers.ReLU()])

  def __call__(self, x: Array, *, training: bool) -> Array:
    x = layers.chain(self.deconv_layers, x, training=training)
    return layers.chain(self.conv_layers, x, training=training)  # [B, h * 2^doublings, w * 2^doublings, width]


class EinsumLevels(nnx.Module):
  """MetaPrompts' re-arrangement for segmentation: four maps to four of as many channels as there are prompts.

  Each map is doubled (bilinear) and passes a 3x3 convolution to the width of the prompts; channel n of the result is
  the inner product with prompt n, the prompts being those the UNet attended to in its last pass.

  Source: MetaPrompts segmentation, extract_feat (upconv1 to upconv4).
  """

  needs_maps = 4

  def __init__(
    self,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    tokens: tuple[int, int],
    frame: str = "resized",
    norm_group: int = 0,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      widths, strides: of the four maps that come in.
      tokens: number and width of the tokens of the method's context.
      frame, norm_group: what the maps show and groups of batch normalization, which every neck is told of; no use of
        them here.

    Raises:
      ValueError: another number of maps than four.
    """
    del frame, norm_group
    if len(widths) != 4:
      raise UserError(f"neck 'einsum_levels' takes four maps, but the method gives {len(widths)}.")
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    default = initializers.torch_default
    norm = lambda w: normalization.GroupNorm(w, groups=16, epsilon=1e-5, **kinds)
    level = lambda w: nnx.List(
      [layers.conv(w, tokens[1], 3, kernel_init=default, **kinds), norm(tokens[1]), layers.ReLU()]
    )
    self.strides, self.widths = tuple(stride // 2 for stride in strides), (tokens[0],) * 4
    self.upconv1, self.upconv2, self.upconv3, self.upconv4 = (level(w) for w in widths)

  def __call__(self, features: Features, *, training: bool) -> Features:
    """Four maps at half the strides; training makes no difference."""
    del training
    maps = []
    for convolved, x in zip((self.upconv1, self.upconv2, self.upconv3, self.upconv4), features.maps, strict=True):
      x = layers.resize(x, (2 * x.shape[1], 2 * x.shape[2]))
      maps.append(jnp.einsum("bhwc,bnc->bhwn", layers.chain(convolved, x), features.context))
    return features._replace(maps=tuple(maps))


class Einsum(nnx.Module):
  """MetaPrompts' depth re-arrangement: four maps to one of as many channels as there are prompts.

  Map 0 passes a convolution, maps 1 to 3 one to three transposed convolutions of kernel 4 that raise them to its
  size; all are joined and mixed by a 3x3 convolution to the width of the prompts. Channel n of the result is the inner
  product with prompt n, the prompts being those the UNet attended to in its last pass. The method has resized the
  image, so the map is resized in turn: to one cell per 8 pixels of the image.

  Source: MetaPrompts depth/models_depth/model.py VPDDepthEncoder, VPDDepth.
  """

  needs_maps = 4

  def __init__(
    self,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    frame: str,
    tokens: tuple[int, int],
    inner: int = 32,
    norm_group: int = 0,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      widths, strides: of the four maps that come in.
      frame: what they show; see Method.
      tokens: number and width of the tokens of the method's context; the number is the channels of the map that goes
        out.
      inner: width of the transposed convolutions.
      norm_group: images per group of batch normalization, 0 for the whole batch.

    Raises:
      ValueError: another number of maps than four; strides that are not doubled from map to map; a padded image.
    """
    if len(widths) != 4:
      raise UserError(f"neck 'einsum' joins four maps, but the method gives {len(widths)}.")
    if frame != "resized":
      raise UserError(f"neck 'einsum' shows a resized image, but the method's is {frame}; use neck 'fusion'.")
    if tuple(strides) != tuple(strides[0] * 2**i for i in range(4)):
      raise UserError(f"neck 'einsum' joins maps whose strides double, but the method's are {tuple(strides)}.")
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    norm = lambda w: normalization.GroupNorm(w, groups=16, epsilon=1e-5, **kinds)
    mixed = lambda i, o: nnx.List([layers.conv(i, o, 3, kernel_init=NORMAL, **kinds), norm(o), layers.ReLU()])
    self.strides, self.widths = (strides[0],), (tokens[0],)
    self.layer1 = mixed(widths[0], widths[0])
    raised = lambda i: _Raised(widths[i], i, inner=inner, norm_group=norm_group, **kinds)
    self.layer2, self.layer3, self.layer4 = raised(1), raised(2), raised(3)
    self.out_layer = mixed(sum(widths), tokens[1])

  def __call__(self, features: Features, *, training: bool) -> Features:
    """One map [B, H // 8, W // 8, prompts], of at least one cell, whatever the sizes of the four."""
    return features._replace(maps=(self.cells(self.products(features, training=training), features.image_size),))

  def products(self, features: Features, *, training: bool) -> Array:
    """The inner products at the size of map 0: float [B, h, w, prompts]."""
    finest, *coarser = features.maps
    raised = zip((self.layer2, self.layer3, self.layer4), coarser, strict=True)
    joined = [layers.chain(self.layer1, finest), *(layer(x, training=training) for layer, x in raised)]
    x = layers.chain(self.out_layer, jnp.concatenate(joined, axis=-1))  # [B, h, w, width]
    return jnp.einsum("bhwc,bnc->bhwn", x, features.context)

  def cells(self, x: Array, image_size: tuple[int, int]) -> Array:
    """Resized to a cell per `strides[0]` pixels of the image, rounded down as the release does."""
    rows, columns = (max(side // self.strides[0], 1) for side in image_size)
    return layers.resize(x, (rows, columns))
