"""Weights of a model's ImageNet classifier: from `init.vit`, or random for smoke tests."""

from collections.abc import Mapping

from vpd_jax.checkpoints.class_name_encoding import random_seed
from vpd_jax.checkpoints.clip_towers import LoadedArrays, random_tower
from vpd_jax.convert.rules import Shaped
from vpd_jax.convert.tables import vit
from vpd_jax.errors import UserError

OPTION = "init.vit"


def classifier(shapes: Mapping[str, Shaped], *, source: str) -> LoadedArrays:
  """The arrays of the classifier by its own names, and a line that states their source.

  Args:
    shapes: shape and dtype by name.
    source: `init.vit`: a folder or file in the Hugging Face format, or random:SEED.

  Raises:
    ValueError: it is missing, or its arrays have other shapes.
  """
  if not source:
    raise UserError(
      f"there is no classifier of ImageNet: config.{OPTION} is empty; set it to {vit.EXPECTED}, or to random:SEED for "
      "smoke tests."
    )
  seed = random_seed(source, OPTION)
  if seed is not None:
    return random_tower(shapes, seed), f"classifier of ImageNet: random (seed {seed}), for smoke tests only"
  return vit.load(source, shapes), f"classifier of ImageNet: {source}"
