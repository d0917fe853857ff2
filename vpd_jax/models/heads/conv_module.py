"""Common parts of the segmentation heads of mmsegmentation 0.30: layer, classifier, resizing to the image."""

import jax.numpy as jnp
from flax import nnx

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.models.backbones import layers, normalization
from vpd_jax.models.layer_options import Common
from vpd_jax.types import Array, Features, MapInfo

# Initializers of mmseg: He normal (fan_out), and normal with standard deviation 0.01 for the classifier.
HE_FAN_OUT = initializers.variance_scaling(2.0, "fan_out", "normal")
CLASSIFIER = initializers.normal(0.01)


class ConvModule(nnx.Module):
  """Convolution without bias, batch normalization, ReLU.

  Source: mmcv 1.7 cnn/bricks/conv_module.py.
  """

  def __init__(self, in_width: int, out_width: int, size: int, common: Common):
    self.conv = layers.conv(in_width, out_width, size, use_bias=False, kernel_init=HE_FAN_OUT, **common.layer)
    self.bn = normalization.BatchNorm(out_width, group=common.norm_group, **common.layer)

  def __call__(self, x: Array, *, training: bool) -> Array:
    return layers.ReLU()(self.bn(self.conv(x), training=training))


def classifier(width: int, classes: int, common: Common) -> nnx.Conv:
  """The 1x1 convolution `conv_seg` from features to one score per class."""
  return layers.conv(width, classes, 1, kernel_init=CLASSIFIER, **common.layer)


def dropout2d(x: Array, rate: float, *, training: bool, key: Array | None) -> Array:
  """Dropout of full channels before the classifier, in training.

  Raises:
    ValueError: training with a rate above 0, but no random key.
  """
  if not training or not rate:
    return x
  if key is None:
    raise UserError(f"head.dropout={rate} needs a random key in training; give the model one, or set it to 0.")
  return layers.drop_channels(x, rate, key)


def check_dropout(rate: float) -> None:
  """Raises unless `rate` is a probability below 1."""
  if not 0 <= rate < 1:
    raise UserError(f"head.dropout={rate} must be at least 0 and below 1.")


def resize_logits(logits: Array, features: Features, maps: MapInfo, index: int = 0) -> Array:
  """Bilinearly resizes scores to the size of the image, in float32 or wider.

  Args:
    logits: float [B, h, w, K].
    features: for the size of the image.
    maps: inputs of the head. If they are "padded", the padding of the image at right and bottom to h * stride is
      cropped; if "resized", its sides do not have to be multiples of the stride.
    index: of the map whose stride the logits have.

  Returns:
    float [B, H, W, K].
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  height, width = features.image_size
  if maps.map_extent == "resized":
    return layers.resize(logits, (height, width))
  stride = maps.strides[index]
  return layers.resize(logits, (logits.shape[1] * stride, logits.shape[2] * stride))[:, :height, :width]
