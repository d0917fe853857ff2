"""The classifier of ImageNet inside a model: from `init.vit`, or random, for smoke tests."""

from collections.abc import Mapping

from vpd_jax.checkpoints.class_name_encoding import random_seed
from vpd_jax.checkpoints.clip_towers import Found, random_tower
from vpd_jax.convert.rules import Shaped
from vpd_jax.convert.tables import vit
from vpd_jax.errors import UserError

OPTION = "init.vit"


def classifier(wanted: Mapping[str, Shaped], *, source: str) -> Found:
  """The classifier by its own names, and a line that says where from.

  Args:
    wanted: shape and dtype by name.
    source: `init.vit`: a folder or file of Hugging Face, or random:SEED.

  Raises:
    ValueError: there is none, or one that does not fit.
  """
  if not source:
    raise UserError(
      f"there is no classifier of ImageNet: config.{OPTION} is empty; set it to {vit.EXPECTED}, or to random:SEED for "
      "smoke tests."
    )
  seed = random_seed(source, OPTION)
  if seed is not None:
    return random_tower(wanted, seed), f"classifier of ImageNet: random (seed {seed}), for smoke tests only"
  return vit.load(source, wanted), f"classifier of ImageNet: {source}"
