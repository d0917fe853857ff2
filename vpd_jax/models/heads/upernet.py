"""MetaPrompts' segmentation head: UPerNet with an auxiliary FCN head.

Source: Xiao et al. 2018, https://arxiv.org/abs/1807.10221; mmsegmentation 0.30 models/decode_heads/uper_head.py,
psp_head.py, fcn_head.py; metaprompts/segmentation/configs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models.backbones import layers
from vpd_jax.models.heads import conv_module
from vpd_jax.models.heads.conv_module import ConvModule
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, Features, MapInfo, Outputs


class Pooling(nnx.Module):
  """Adaptive average pooling to size x size; a module, so that list indices match those of the source checkpoint."""

  def __init__(self, size: int):
    self.size = size

  def __call__(self, x: Array) -> Array:
    return layers.adaptive_avg_pool(x, self.size)


class UperHead(nnx.Module):
  """Pyramid pooling on the coarsest map, and a feature pyramid over all maps, fused at the finest resolution."""

  def __init__(
    self,
    widths: tuple[int, ...],
    common: Common,
    *,
    classes: int,
    width: int,
    pool_scales: tuple[int, ...],
    dropout: float,
  ):
    self.dropout = dropout
    conv = lambda in_width, size: ConvModule(in_width, width, size, common)
    self.psp_modules: Any = nnx.List([nnx.List([Pooling(scale), conv(widths[-1], 1)]) for scale in pool_scales])
    self.bottleneck = conv(widths[-1] + len(pool_scales) * width, 3)
    self.lateral_convs = nnx.List([conv(w, 1) for w in widths[:-1]])
    self.fpn_convs = nnx.List([conv(width, 3) for _ in widths[:-1]])
    self.fpn_bottleneck = conv(len(widths) * width, 3)
    self.conv_seg = conv_module.classifier(width, classes, common)

  def __call__(self, maps: tuple[Array, ...], *, training: bool, key: Array | None = None) -> Array:
    """Scores, float [B, h, w, K] at the size of the first map."""
    laterals = [conv(x, training=training) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
    laterals.append(self.pooled(maps[-1], training=training))
    for i in range(len(laterals) - 1, 0, -1):
      laterals[i - 1] = laterals[i - 1] + layers.resize(laterals[i], laterals[i - 1].shape[1:3])
    levels = [conv(x, training=training) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)]
    size = levels[0].shape[1:3]
    levels = [layers.resize(x, size) for x in (*levels, laterals[-1])]
    x = self.fpn_bottleneck(jnp.concatenate(levels, axis=-1), training=training)  # [B, h, w, width]
    return self.conv_seg(conv_module.dropout2d(x, self.dropout, training=training, key=key))

  def pooled(self, x: Array, *, training: bool) -> Array:
    """Pyramid pooling: the map concatenated with its means over bins of several sizes, float [B, h, w, width]."""
    parts = [x]
    for pool, conv in self.psp_modules:
      parts.append(layers.resize(conv(pool(x), training=training), x.shape[1:3]))
    return self.bottleneck(jnp.concatenate(parts, axis=-1), training=training)


class FcnHead(nnx.Module):
  """A 3x3 convolution and a classifier on one map; an auxiliary head that is only used in training."""

  def __init__(self, in_width: int, common: Common, *, classes: int, width: int, dropout: float):
    self.dropout = dropout
    self.convs = nnx.List([ConvModule(in_width, width, 3, common)])
    self.conv_seg = conv_module.classifier(width, classes, common)

  def __call__(self, x: Array, *, training: bool, key: Array | None = None) -> Array:
    """Scores, float [B, h, w, K] at the size of the map."""
    x = self.convs[0](x, training=training)
    return self.conv_seg(conv_module.dropout2d(x, self.dropout, training=training, key=key))


class UperNet(nnx.Module):
  """The head of MetaPrompts on ADE20K and Cityscapes: class scores of every pixel, and those of an auxiliary head."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    classes: int,
    width: int = 512,
    auxiliary_width: int | None = None,
    auxiliary_map: int = 2,
    pool_scales: tuple[int, ...] = (1, 2, 3, 6),
    dropout: float = 0.0,
  ):
    """Builds the layers.

    Args:
      maps: of the input.
      common: dtypes, random keys, groups of batch normalization.
      classes: K.
      width: of all convolutions of the main head except the last.
      auxiliary_width: of the auxiliary head; None: `width`; 0: no auxiliary head.
      auxiliary_map: index of its input map.
      pool_scales: bins per side of the pyramid pooling.
      dropout: probability of dropping a channel before both classifiers in training. Release: 0.0 on
        ADE20K, 0.1 on Cityscapes.

    Raises:
      ValueError: no such map; the dropout rate is not a probability.
    """
    conv_module.check_dropout(dropout)
    if not 0 <= auxiliary_map < len(maps.widths):
      raise UserError(
        f"head.auxiliary_map={auxiliary_map} must be the number of one of {len(maps.widths)} maps, from 0."
      )
    self.map_info, self.auxiliary_map = maps, auxiliary_map
    self.decode_head = UperHead(
      maps.widths, common, classes=classes, width=width, pool_scales=tuple(pool_scales), dropout=dropout
    )
    aux_width = width if auxiliary_width is None else auxiliary_width
    self.auxiliary_head = (
      FcnHead(maps.widths[auxiliary_map], common, classes=classes, width=aux_width, dropout=dropout)
      if aux_width
      else None
    )

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Class scores of the main and the auxiliary head.

    Args:
      features, training, key: see fpn.SemanticFpn.

    Returns:
      {"logits": float32 or wider [B, H, W, K], "aux_logits": float32 or wider [B, h, w, K], or, in training with
      padded maps, [B, H, W, K]}; the second only with an auxiliary head.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    logits = self.decode_head(features.maps, training=training, key=keys[0])
    outputs = {"logits": conv_module.resize_logits(logits, features, self.map_info)}
    if self.auxiliary_head is not None:
      aux = self.auxiliary_head(features.maps[self.auxiliary_map], training=training, key=keys[1])
      aux = aux.astype(jnp.promote_types(aux.dtype, jnp.float32))
      if training and self.map_info.map_extent == "padded":  # the loss does not know of the padding
        aux = conv_module.resize_logits(aux, features, self.map_info, self.auxiliary_map)
      outputs["aux_logits"] = aux
    return outputs
