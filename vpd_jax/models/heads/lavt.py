"""VPD's decoder for referring segmentation: maps from coarse to fine, two convolutions per level, two classes.

The coarsest map is resized to the next one, concatenated before it, and passed through two 3x3 convolutions; this is
repeated up to the finest map, where a 1x1 convolution computes the scores of background and object. All maps are
resized with aligned corners.

Source: Yang et al. 2022, https://arxiv.org/abs/2112.02244 (LAVT, lib/mask_predictor.py SimpleDecoding); VPD
refer/models_refer/model.py.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, Features, MapInfo, Outputs

# PyTorch's default for convolutions, which the release uses; biases are initialized with 0 here.
TORCH = initializers.torch_default


def resize_corners(x: Array, size: Sequence[int]) -> Array:
  """Bilinearly resizes [B, H, W, C] with aligned centers of the corner pixels, without antialiasing.

  Row i of n reads the H rows at i (H - 1) / (n - 1); a single row reads the first.

  Args:
    x: float [B, H, W, C].
    size: (H, W) of the result.

  Returns:
    float [B, *size, C] of the same dtype, computed in float32 or wider.

  Source: torch.nn.functional.interpolate(mode="bilinear", align_corners=True).
  """
  if x.shape[1:3] == tuple(size):
    return x
  high = jnp.promote_types(x.dtype, jnp.float32)
  rows, columns = (
    jnp.asarray(_interpolation_weights(old, new), high) for old, new in zip(x.shape[1:3], size, strict=True)
  )
  resized_rows = jnp.einsum("nh,bhwc->bnwc", rows, x.astype(high), precision="highest")
  return jnp.einsum("mw,bnwc->bnmc", columns, resized_rows, precision="highest").astype(x.dtype)


def _interpolation_weights(old: int, new: int) -> np.ndarray:
  """Weights of the `old` positions for each of the `new` ones: float64 [new, old]."""
  positions = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
  low = np.minimum(positions.astype(int), old - 1)
  high = np.minimum(low + 1, old - 1)
  weights = np.zeros((new, old))
  np.add.at(weights, (np.arange(new), low), 1 - (positions - low))
  np.add.at(weights, (np.arange(new), high), positions - low)
  return weights


class Lavt(nnx.Module):
  """Maps to two scores per pixel.

  The layers are named as in the release: conv1_4 to bn2_4 fuse the two coarsest maps, conv1_3 and conv1_2 are the
  first layers of the next levels, conv1_1 is the classifier.
  """

  def __init__(
    self,
    maps: MapInfo,
    common: Common,
    *,
    classes: int = 2,
    width: int = 640,
  ):
    """Builds the layers.

    Args:
      maps: of the input, at least two.
      common: dtypes, random keys, groups of batch normalization.
      classes: scores per pixel. Release: 2.
      width: of all convolutions except the last. Release: 640.

    Raises:
      ValueError: fewer than two maps.
    """
    widths = maps.widths
    if len(widths) < 2:
      raise UserError(f"head 'lavt' joins maps of several strides, but widths={widths} is one; choose another.")
    layer = common.layer
    self.map_info = maps
    # Suffixes of the layer names by level: 4, 3, 2 for four maps.
    self.levels = tuple(range(len(widths), 1, -1))
    below = widths[-1]
    for level in self.levels:
      for part, in_width in ((1, below + widths[level - 2]), (2, width)):
        conv = layers.conv(in_width, width, 3, use_bias=False, kernel_init=TORCH, **layer)
        setattr(self, f"conv{part}_{level}", conv)
        setattr(self, f"bn{part}_{level}", normalization.BatchNorm(width, group=common.norm_group, **layer))
      below = width
    self.conv1_1 = layers.conv(width, classes, 1, kernel_init=TORCH, **layer)

  def scores(self, maps: tuple[Array, ...], *, training: bool) -> Array:
    """Scores at the size of the first map, float [B, h, w, K]."""
    x = maps[-1]
    for level in self.levels:
      finer = maps[level - 2]
      x = jnp.concatenate([resize_corners(x, finer.shape[1:3]), finer], axis=-1)
      for part in (1, 2):
        conv, norm = getattr(self, f"conv{part}_{level}"), getattr(self, f"bn{part}_{level}")
        x = layers.ReLU()(norm(conv(x), training=training))
    return self.conv1_1(x)

  def __call__(self, features: Features, *, training: bool, key: Array | None = None) -> Outputs:
    """Returns {"logits": float32 or wider [B, H, W, K] at the size of the image}.

    Args:
      features: maps of the neck.
      training: use batch statistics.
      key: unused.
    """
    logits = self.scores(features.maps, training=training)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    height, width = features.image_size
    if self.map_info.map_extent == "resized":
      return {"logits": resize_corners(logits, (height, width))}
    stride = self.map_info.strides[0]
    padded = resize_corners(logits, (logits.shape[1] * stride, logits.shape[2] * stride))
    return {"logits": padded[:, :height, :width]}
