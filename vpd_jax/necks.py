"""Features to Features: what stands between a method's maps and a head."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from vpd_jax.backbones import layers
from vpd_jax.types import Features


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
    width: int = 1536,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
  ):
    """`widths`, `strides`: of the four maps that come in; `width`: of the one that goes out."""
    if len(widths) != 4:
      raise ValueError(f"neck 'fusion' joins four maps, but the method gives {len(widths)}.")
    kinds = {
      "dtype": dtype,
      "param_dtype": param_dtype,
      "rngs": rngs,
      "kernel_init": nnx.initializers.truncated_normal(0.02),
    }
    norms = {"groups": 16, "epsilon": 1e-5, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    half = lambda w: layers.conv(w, w, 3, stride=2, **kinds)
    self.strides, self.widths = (strides[2],), (width,)
    self.layer1 = nnx.List([half(widths[0]), layers.GroupNorm(widths[0], **norms), layers.ReLU(), half(widths[0])])
    self.layer2 = nnx.List([half(widths[1])])
    self.out_layer = nnx.List(
      [layers.conv(sum(widths), width, 1, **kinds), layers.GroupNorm(width, **norms), layers.ReLU()]
    )

  def __call__(self, features: Features) -> Features:
    finest, fine, coarse, coarsest = features.maps
    coarsest = layers.resize(coarsest, coarse.shape[1:3], method="nearest")
    joined = [layers.chain(self.layer1, finest), layers.chain(self.layer2, fine), coarse, coarsest]
    x = layers.chain(self.out_layer, jnp.concatenate(joined, axis=-1))  # [B, h, w, width]
    rows, columns = (-(-side // self.strides[0]) for side in features.image_size)
    return features._replace(maps=(x[:, :rows, :columns],))
