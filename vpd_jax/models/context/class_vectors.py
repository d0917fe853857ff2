"""Vectors of the data set's classes: of the given or predicted class of the image, or of all classes.

The vectors are encoded once from the class names by CLIP's text encoder, before training.
"""

from typing import Unpack, cast

import jax.numpy as jnp
from flax import nnx

from vpd_jax.models import initializers
from vpd_jax.models.backbones.clip_image import ClipImage, ImageSizes, pixels
from vpd_jax.models.backbones.clip_text import as_buffers
from vpd_jax.models.context.adapters import Adapter
from vpd_jax.models.context.context import Context
from vpd_jax.models.layer_options import LayerOptions
from vpd_jax.types import Array, Batch, Buffer


class ClassPredictor(nnx.Module):
  """The class of an image among the names of the data set: CLIP's zero-shot classification.

  `names` contains a unit vector per class name. It is frozen and uses no labels.

  Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1.
  """

  def __init__(self, sizes: ImageSizes, classes: int, **common: Unpack[LayerOptions]):
    self.dtype = common["dtype"]
    self.names = Buffer(
      initializers.normal(1.0)(common["rngs"].params(), (classes, sizes.projection), common["param_dtype"])
    )
    self.image_encoder = as_buffers(ClipImage(sizes, projected=True, **common))

  def __call__(self, image: Array) -> Array:
    """Class ids, int32 [B], of uint8 [B, H, W, 3] or float in [0, 1], of any size."""
    embeds = cast(Array, self.image_encoder(pixels(image, self.image_encoder.image_size, dtype=self.dtype)).embeds)
    scores = embeds @ self.names[...].astype(embeds.dtype).T  # [B, K]; the norm of the image vectors is irrelevant
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


class AllClasses(Context):
  """The adapted vectors of all classes, the same for every image."""

  of_classes = True

  def __init__(self, classes: int, width: int, adapt: Adapter, **common: Unpack[LayerOptions]):
    """Builds one vector per class.

    Args:
      classes: K.
      width: D, of the UNet's context.
      adapt: module from vectors to tokens.
      **common: dtype, param_dtype and rngs.
    """
    self.tokens, self.dtype, self.adapt = (classes, width), common["dtype"], adapt
    vectors = initializers.normal(1.0)(common["rngs"].params(), (classes, width), common["param_dtype"])
    self.class_vectors = Buffer(vectors)

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, K, D]."""
    vectors = self.class_vectors[...].astype(self.dtype)
    return jnp.broadcast_to(self.adapt(vectors[None]), (batch["image"].shape[0], *vectors.shape))


class SceneClass(AllClasses):
  """One token, the adapted vector of the class from the data set; -1 is the mean of all classes."""

  of_classes = False
  needs = frozenset({"class_id"})

  def __init__(self, classes: int, width: int, adapt: Adapter, **common: Unpack[LayerOptions]):
    super().__init__(classes, width, adapt, **common)
    self.tokens = (1, width)

  def class_ids(self, batch: Batch) -> Array:
    """The classes of a batch: int [B], -1 for the mean of all."""
    return batch["class_id"]

  def __call__(self, batch: Batch, step: int = 0) -> Array:
    """Float [B, 1, D]."""
    vectors = self.class_vectors[...].astype(self.dtype)
    table = jnp.concatenate([vectors, vectors.mean(axis=0, keepdims=True)])  # [K + 1, D]; row -1 is the mean
    return self.adapt(table[self.class_ids(batch)][:, None])


class PredictedClass(SceneClass):
  """As SceneClass, of the class that CLIP predicts from the image; a given class id of 0 or more has precedence."""

  needs = frozenset()

  def __init__(self, classes: int, width: int, adapt: Adapter, *, image: ImageSizes, **common: Unpack[LayerOptions]):
    """`image`: sizes of CLIP's image encoder."""
    super().__init__(classes, width, adapt, **common)
    self.class_predictor = ClassPredictor(image, classes, **common)

  def class_ids(self, batch: Batch) -> Array:
    """See SceneClass.class_ids."""
    class_id, predicted = batch.get("class_id"), cast(ClassPredictor, self.class_predictor)(batch["image"])
    return predicted if class_id is None else jnp.where(class_id < 0, predicted, class_id)
