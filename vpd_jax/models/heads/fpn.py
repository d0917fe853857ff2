"""VPD's segmentation decoder: a feature pyramid as the neck, and the Semantic FPN head.

Source: Lin et al. 2017 (the pyramid), Kirillov et al. 2019, https://arxiv.org/abs/1901.02446 (the head);
mmsegmentation 0.30 models/necks/fpn.py, models/decode_heads/fpn_head.py; VPD segmentation/configs/_base_/models.
"""

import dataclasses
import math
from typing import cast

from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers
from vpd_jax.models.heads import conv_module
from vpd_jax.models.heads.conv_module import ConvModule
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, Features, MapInfo, Outputs

XAVIER = initializers.variance_scaling(1.0, "fan_avg", "uniform")


class BiasedConv(nnx.Module):
  """A convolution with bias only, nested as in mmcv's ConvModule."""

  def __init__(self, in_width: int, out_width: int, size: int, common: Common):
    self.conv = layers.conv(in_width, out_width, size, kernel_init=XAVIER, **common.layer)

  def __call__(self, x: Array) -> Array:
    return self.conv(x)


class Fpn(nnx.Module):
  """Feature pyramid: 1x1 convolutions to one width, sums from coarse to fine (nearest), a 3x3 convolution per level.

  No normalization and no activation.
  """

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    width: int = 256,
  ):
    """Builds the layers.

    Args:
      maps: of the input.
      common: dtypes, random keys, groups of batch normalization.
      width: of the output maps.
    """
    self.map_info = dataclasses.replace(maps, widths=(width,) * len(maps.widths))
    self.lateral_convs = nnx.List([BiasedConv(w, width, 1, common) for w in maps.widths])
    self.fpn_convs = nnx.List([BiasedConv(width, width, 3, common) for _ in maps.widths])

  def __call__(self, features: Features, *, training: bool = False) -> Features:
    """The same number of maps, all of one width; `training` has no effect."""
    maps = [lateral(x) for lateral, x in zip(self.lateral_convs, features.maps, strict=True)]
    for i in range(len(maps) - 1, 0, -1):
      maps[i - 1] = maps[i - 1] + layers.resize(maps[i], maps[i - 1].shape[1:3], method="nearest")
    return features._replace(maps=tuple(conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)))


class Doubling(nnx.Module):
  """Bilinear upsampling by two; a module, so that list indices match those of the source checkpoint."""

  def __call__(self, x: Array) -> Array:
    return layers.resize(x, (2 * x.shape[1], 2 * x.shape[2]))


class FpnHead(nnx.Module):
  """Pyramid levels to class scores at the finest resolution: each level is upsampled to it, then all are summed."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    classes: int,
    width: int,
    dropout: float,
  ):
    self.dropout = dropout
    scale_heads, strides = [], maps.strides
    for in_width, stride in zip(maps.widths, strides, strict=True):
      doublings = math.log2(stride / strides[0])
      if doublings != int(doublings) or doublings < 0:
        raise UserError(f"head 'fpn' doubles every map to stride {strides[0]}, which strides {strides} do not allow.")
      steps = []
      for i in range(max(1, int(doublings))):
        steps.append(ConvModule(in_width if i == 0 else width, width, 3, common))
        steps += [Doubling()] if doublings else []
      scale_heads.append(nnx.List(steps))
    self.scale_heads = nnx.List(scale_heads)
    self.conv_seg = conv_module.classifier(width, classes, common)

  def __call__(self, maps: tuple[Array, ...], *, training: bool, key: Array | None = None) -> Array:
    """Scores, float [B, h, w, K] at the size of the first map."""
    size, total = maps[0].shape[1:3], 0
    for steps, x in zip(self.scale_heads, maps, strict=True):
      for step in steps:
        x = step(x, training=training) if isinstance(step, ConvModule) else step(x)
      total = total + layers.resize(x, size)
    return self.conv_seg(conv_module.dropout2d(cast(Array, total), self.dropout, training=training, key=key))


class SemanticFpn(nnx.Module):
  """The head of VPD on ADE20K: class scores of every pixel."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    classes: int,
    width: int = 256,
    dropout: float = 0.1,
  ):
    """Builds the layers.

    Args:
      maps: of the input. The release uses strides 4 to 32, but only their ratios matter.
      common: dtypes, random keys, groups of batch normalization.
      classes: K.
      width: of all convolutions except the last.
      dropout: probability of dropping a channel before the classifier in training. Release: 0.1.

    Raises:
      ValueError: the ratio of strides is not a power of two; the dropout rate is not a probability.
    """
    conv_module.check_dropout(dropout)
    self.map_info = maps
    self.decode_head = FpnHead(maps, common, classes=classes, width=width, dropout=dropout)

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"logits": float32 or wider [B, H, W, K] at the size of the image}.

    Args:
      features: maps of the neck.
      training: use batch statistics and dropout.
      key: random key for dropout, required in training if its rate is above 0.
    """
    logits = self.decode_head(features.maps, training=training, key=key)
    return {"logits": conv_module.resize_logits(logits, features, self.map_info)}
