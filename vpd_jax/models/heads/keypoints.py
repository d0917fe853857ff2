"""Heads that turn feature maps into heatmaps of keypoints, at a quarter of the image's sides.

"fused" concatenates all maps, "simple" and "classic" use one, "direct" has no layers. The neck is "einsum_levels",
with one channel per prompt, or "none", with the maps of the method. If the maps include padding at right and bottom,
heatmaps are cropped; if they are of a resized image, heatmaps are resized.

Source: mmpose 0.x models/heads/topdown_heatmap_simple_head.py as ViTPose configures it (simple, classic); Xiao et al.
2018, https://arxiv.org/abs/1804.06208 (classic). Fused and direct are new: MetaPrompts' pose head is not published.
"""

import math

import jax.numpy as jnp
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.heads.deconv import kernel_init
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, Features, MapInfo, Outputs

STRIDE = 4  # of heatmaps


def heatmap_size(image_size: tuple[int, int]) -> tuple[int, int]:
  """(h, w) of the heatmaps of an image (H, W)."""
  height, width = image_size
  return height // STRIDE, width // STRIDE


def to_heatmaps(x: Array, features: Features, map_extent: str) -> Outputs:
  """{"heatmaps": float32 or wider [B, H / 4, W / 4, K]} from scores of stride 4, cropped or slightly resized."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  height, width = heatmap_size(features.image_size)
  return {"heatmaps": x[:, :height, :width] if map_extent == "padded" else layers.resize(x, (height, width))}


def up_size(x: Array, stride: int) -> tuple[int, int]:
  """(h, w) of a map of the given stride when resized to stride 4."""
  return x.shape[1] * stride // STRIDE, x.shape[2] * stride // STRIDE


def up(x: Array, stride: int) -> Array:
  """Bilinearly resizes a map of the given stride to stride 4."""
  return layers.resize(x, up_size(x, stride))


def _map_index(stride: int, strides: tuple[int, ...], name: str) -> int:
  """Index of the map with a stride."""
  if stride not in strides:
    raise UserError(f"head.stride={stride} of head {name!r} must be one of the strides of its maps, {strides}.")
  return strides.index(stride)


class FusedHead(nnx.Module):
  """Concatenates all maps at stride 4 (bilinear); 3x3 convolution, batch normalization, ReLU; 1x1 convolution to K."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    keypoints: int,
    width: int = 256,
    init: str = "released",
  ):
    """Builds the layers.

    Args:
      maps: of the input.
      common: dtypes, random keys, groups of batch normalization.
      keypoints: K.
      width: of the convolution over all maps.
      init: initializer of kernels: "released", normal with standard deviation 0.001 as in mmpose's heads; "fan_in", He
        normal, for training from scratch.

    Raises:
      ValueError: unknown `init`.
    """
    layer = common.layer
    self.stride, self.map_extent = maps.strides[0], maps.map_extent
    self.conv = layers.conv(sum(maps.widths), width, 3, use_bias=False, kernel_init=kernel_init(init), **layer)
    self.bn = normalization.BatchNorm(width, group=common.norm_group, **layer)
    self.final_layer = layers.conv(width, keypoints, 1, kernel_init=kernel_init(init), **layer)

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"heatmaps": float32 or wider [B, H / 4, W / 4, K]}; `key` is unused."""
    size = up_size(features.maps[0], self.stride)
    joined = jnp.concatenate([layers.resize(x, size) for x in features.maps], axis=-1)  # [B, H / 4, W / 4, sum(widths)]
    x = layers.ReLU()(self.bn(self.conv(joined), training=training))
    return to_heatmaps(self.final_layer(x), features, self.map_extent)


class ViTPoseSimpleHead(nnx.Module):
  """ViTPose's simple decoder on one map: ReLU, bilinear to stride 4, 3x3 convolution to K."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    keypoints: int,
    stride: int = 8,
    init: str = "released",
  ):
    """Builds the layer.

    Args:
      maps, common, keypoints, init: see FusedHead.
      stride: of the map that is used. ViTPose only has one of stride 16.

    Raises:
      ValueError: unknown `init`; no map of that stride.
    """
    layer = common.layer
    self.map, self.stride, self.map_extent = _map_index(stride, maps.strides, "simple"), stride, maps.map_extent
    self.final_layer = layers.conv(maps.widths[self.map], keypoints, 3, kernel_init=kernel_init(init), **layer)

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"heatmaps": float32 or wider [B, H / 4, W / 4, K]}; `training` and `key` are unused."""
    x = up(layers.ReLU()(features.maps[self.map]), self.stride)
    return to_heatmaps(self.final_layer(x), features, self.map_extent)


class DeconvHead(nnx.Module):
  """Transposed convolutions of kernel 4, stride 2 on one map up to stride 4, each normalized; 1x1 convolution to K."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    keypoints: int,
    stride: int = 16,
    width: int = 256,
    init: str = "released",
  ):
    """Builds the layers.

    Args:
      maps, common, keypoints, init: see FusedHead.
      stride: of the map that is used, 4 times a power of two. Release: 16, hence two transposed convolutions.
      width: of the transposed convolutions.

    Raises:
      ValueError: unknown `init`; no map of that stride, or a stride that is not 4 times a power of two.
    """
    self.map, self.map_extent = _map_index(stride, maps.strides, "classic"), maps.map_extent
    doublings = math.log2(stride / STRIDE)
    if doublings < 0 or doublings != int(doublings):
      raise UserError(f"head.stride={stride} of head 'classic' must be {STRIDE} times a power of two.")
    layer = common.layer
    steps, last = [], maps.widths[self.map]
    for _ in range(int(doublings)):
      steps.append(layers.ConvTranspose(last, width, 4, padding=1, kernel_init=kernel_init(init), **layer))
      steps += [normalization.BatchNorm(width, group=common.norm_group, **layer), layers.ReLU()]
      last = width
    self.deconv_layers = nnx.List(steps)
    self.final_layer = layers.conv(last, keypoints, 1, kernel_init=kernel_init(init), **layer)

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"heatmaps": float32 or wider [B, H / 4, W / 4, K]}; `key` is unused."""
    x = layers.chain(self.deconv_layers, features.maps[self.map], training=training)  # [B, h * 2^n, w * 2^n, width]
    return to_heatmaps(self.final_layer(x), features, self.map_extent)


class IdentityHead(nnx.Module):
  """Returns the finest map, with one channel, hence one prompt of the einsum neck, per keypoint. No parameters."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    keypoints: int,
  ):
    """Checks the map.

    Args:
      maps, common, keypoints: see FusedHead.

    Raises:
      ValueError: the finest map does not have K channels.
    """
    if maps.widths[0] != keypoints:
      raise UserError(
        f"head 'direct' takes the {maps.widths[0]} channels of the finest map for {keypoints} keypoints; "
        f"set method.prompts={keypoints} with a neck that multiplies by the prompts, or choose another head."
      )
    self.stride, self.map_extent = maps.strides[0], maps.map_extent

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"heatmaps": float32 or wider [B, H / 4, W / 4, K]}; `training` and `key` are unused."""
    return to_heatmaps(up(features.maps[0], self.stride), features, self.map_extent)
