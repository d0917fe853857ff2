"""The depth head of VPD and MetaPrompts: transposed convolutions to stride 4, bilinear upsampling, sigmoid.

Source: VPD depth/models_depth/model.py Decoder, VPDDepth; EcoDepth model.py, class EcoDepth (v2.0.0).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from vpd_jax.errors import UserError, check_choice
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, Features, MapInfo, Outputs

INITS = {"released": initializers.normal(0.001), "fan_in": initializers.he_normal}
NEAREST = "fan_in_nearest"
CUTS = ("prediction", "features")


def kernel_init(init: str) -> initializers.Initializer:
  """The initializer of a head's kernels; raises ValueError for an unknown name."""
  check_choice("head.init", init, sorted(INITS))
  return INITS[init]


class Deconv(nnx.Module):
  """One map to metric depth at the size of the image."""

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    max_depth: float,
    filters: tuple[int, ...] = (32, 32, 32),
    width: int = 192,
    init: str = "released",
    cut_padding: str = "prediction",
  ):
    """Builds the layers.

    Args:
      maps: of the input; only the first is used.
      common: dtypes, random keys, groups of batch normalization.
      max_depth: meters, the upper end of the sigmoid.
      filters: widths of the transposed convolutions, kernel 2 and stride 2 each.
      width: of the convolutions after them.
      init: initializer of all kernels: "released", normal with standard deviation 0.001, which initially passes almost
        no gradient to the backbone and suits a pretrained one; "fan_in", He normal, for training from scratch;
        "fan_in_nearest", the same, where the transposed convolutions begin as upsampling to the nearest neighbor and
        leave no checkerboard in the maps of a short training.
      cut_padding: where padding is cropped: "prediction", as released; "features", the input of the last two
        convolutions, which then see zeros outside the image. EcoDepth v2: "features".

    Raises:
      ValueError: more filters than the stride of the map allows, or an unknown option.
    """
    doublings = math.log2(maps.strides[0]) - len(filters)
    if doublings < 0 or doublings != int(doublings):
      raise UserError(
        f"head 'deconv' with {len(filters)} filters cannot read a map of stride {maps.strides[0]}; "
        f"use at most {int(math.log2(maps.strides[0]))} filters."
      )
    check_choice("head.cut_padding", cut_padding, CUTS)
    check_choice("head.init", init, sorted((*INITS, NEAREST)))
    layer = {"kernel_init": kernel_init("fan_in" if init == NEAREST else init), **common.layer}
    self.cut_padding = cut_padding
    self.max_depth, self.doublings = max_depth, int(doublings)
    norm = lambda w: normalization.BatchNorm(w, group=common.norm_group, **common.layer)
    upsampling = {**layer, "kernel_init": initializers.nearest(layer["kernel_init"])} if init == NEAREST else layer
    deconvs, last = [], maps.widths[0]
    for filter_width in filters:
      deconvs += [layers.ConvTranspose(last, filter_width, 2, **upsampling), norm(filter_width), layers.ReLU()]
      last = filter_width
    self.deconv_layers = nnx.List(deconvs)
    self.conv_layers = nnx.List([layers.conv(last, width, 3, **layer), norm(width), layers.ReLU()])
    self.last_layer_depth = nnx.List(
      [layers.conv(width, width, 3, **layer), layers.ReLU(), layers.conv(width, 1, 3, **layer)]
    )

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"depth": float32 or wider [B, H, W], meters, in (0, max_depth)}; `key` is unused."""
    x = layers.chain(self.deconv_layers, features.maps[0], training=training)
    x = layers.chain(self.conv_layers, x, training=training)
    for _ in range(self.doublings):
      x = layers.resize(x, (2 * x.shape[1], 2 * x.shape[2]))  # [B, 2h, 2w, width]
    height, width = features.image_size
    if self.cut_padding == "features":
      x = x[:, :height, :width]
    x = layers.chain(self.last_layer_depth, x)  # [B, H', W', 1]
    # For sides that the stride does not divide, necks round up if the map includes padding, and down if it covers the
    # image only.
    x = layers.resize(x[:, :height, :width], (height, width))[..., 0]  # [B, H, W]
    return {"depth": jax.nn.sigmoid(x.astype(jnp.promote_types(x.dtype, jnp.float32))) * self.max_depth}
