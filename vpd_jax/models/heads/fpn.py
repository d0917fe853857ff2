"""VPD's segmentation decoder: a feature pyramid as the neck, the Semantic FPN head on it.

Source: Lin et al. 2017 (the pyramid), Kirillov et al. 2019, https://arxiv.org/abs/1901.02446 (the head);
mmsegmentation 0.30 models/necks/fpn.py, models/decode_heads/fpn_head.py; VPD segmentation/configs/_base_/models.
"""

import math
from typing import Any, cast

from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers
from vpd_jax.models.heads import conv_module
from vpd_jax.models.heads.conv_module import ConvModule
from vpd_jax.types import Array, Features, Outputs

XAVIER = initializers.variance_scaling(1.0, "fan_avg", "uniform")


class BiasedConv(nnx.Module):
  """A convolution with bias and nothing else, one level below its name as in mmcv's ConvModule."""

  def __init__(self, in_width: int, out_width: int, size: int, **kinds: Any):
    self.conv = layers.conv(in_width, out_width, size, kernel_init=XAVIER, **kinds)

  def __call__(self, x: Array) -> Array:
    return self.conv(x)


class Fpn(nnx.Module):
  """Feature pyramid: 1x1 convolutions to one width, sums from coarse to fine (nearest), one 3x3 convolution a level.

  No normalization and no activation.
  """

  needs_maps = 4

  def __init__(
    self,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    width: int = 256,
    frame: str = "padded",
    tokens: tuple[int, int] = (0, 0),
    norm_group: int = 0,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      widths, strides: of the maps that come in, finest first.
      width: of those that go out.
      frame, tokens, norm_group: what the maps show, the size of the context and groups of batch normalization, which
        every neck is told of; no use of them here.
    """
    del frame, tokens, norm_group
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.strides, self.widths = tuple(strides), (width,) * len(widths)
    self.lateral_convs = nnx.List([BiasedConv(w, width, 1, **kinds) for w in widths])
    self.fpn_convs = nnx.List([BiasedConv(width, width, 3, **kinds) for _ in widths])

  def __call__(self, features: Features, *, training: bool = False) -> Features:
    """As many maps of one width; training makes no difference."""
    del training
    maps = [lateral(x) for lateral, x in zip(self.lateral_convs, features.maps, strict=True)]
    for i in range(len(maps) - 1, 0, -1):
      maps[i - 1] = maps[i - 1] + layers.resize(maps[i], maps[i - 1].shape[1:3], method="nearest")
    return features._replace(maps=tuple(conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)))


class Doubling(nnx.Module):
  """Bilinear to twice the size; stands in lists so that positions keep the source checkpoint's numbers."""

  def __call__(self, x: Array) -> Array:
    return layers.resize(x, (2 * x.shape[1], 2 * x.shape[2]))


class FpnHead(nnx.Module):
  """Levels of a pyramid to class scores at the size of the finest: each level doubles up to it, then all are summed."""

  def __init__(
    self,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    classes: int,
    *,
    width: int,
    dropout: float,
    norm_group: int,
    **kinds: Any,
  ):
    self.dropout = dropout
    scale_heads = []
    for in_width, stride in zip(widths, strides, strict=True):
      doublings = math.log2(stride / strides[0])
      if doublings != int(doublings) or doublings < 0:
        raise UserError(f"head 'fpn' doubles every map to stride {strides[0]}, which strides {strides} do not allow.")
      steps = []
      for i in range(max(1, int(doublings))):
        steps.append(ConvModule(in_width if i == 0 else width, width, 3, norm_group=norm_group, **kinds))
        steps += [Doubling()] if doublings else []
      scale_heads.append(nnx.List(steps))
    self.scale_heads = nnx.List(scale_heads)
    self.conv_seg = conv_module.classifier(width, classes, **kinds)

  def __call__(self, maps: tuple[Array, ...], *, training: bool, key: Array | None = None) -> Array:
    """Scores, float [B, h, w, K] at the size of the first map."""
    size, total = maps[0].shape[1:3], 0
    for steps, x in zip(self.scale_heads, maps, strict=True):
      for step in steps:
        x = step(x, training=training) if isinstance(step, ConvModule) else step(x)
      total = total + layers.resize(x, size)
    return self.conv_seg(conv_module.dropped(cast(Array, total), self.dropout, training=training, key=key))


class SemanticFpn(nnx.Module):
  """The head of VPD on ADE20K: class scores of every pixel."""

  def __init__(
    self,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    classes: int,
    width: int = 256,
    dropout: float = 0.1,
    frame: str = "padded",
    norm_group: int = 0,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Args:
      widths, strides: of the maps that come in, finest first. The release calls the strides 4 to 32; only their ratios
        count.
      classes: K.
      width: of all convolutions but the last.
      dropout: probability of a whole channel to be dropped before the classifier in training. Release: 0.1.
      frame: what the maps show, as the method says: "padded" or "resized"; see `conv_module.resize_logits`.
      norm_group: images per group of batch normalization, 0 for the whole batch (SyncBN, as released).

    Raises:
      ValueError: strides that are not powers of two apart; an unknown word; a rate that is no probability.
    """
    conv_module.check_dropout(dropout)
    conv_module.check_frame(frame)
    self.stride, self.frame = strides[0], frame
    options = {"width": width, "dropout": dropout, "norm_group": norm_group}
    kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.decode_head = FpnHead(widths, strides, classes, **options, **kinds)

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"logits": float32 or wider [B, H, W, K] at the size of the image}.

    Args:
      features: maps of the neck.
      training: batch statistics and dropout.
      key: random key of the dropout, needed in training where its rate is above 0.
    """
    logits = self.decode_head(features.maps, training=training, key=key)
    return {"logits": conv_module.resize_logits(logits, features, self.stride, self.frame)}
