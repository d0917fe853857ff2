"""Options that several data sets and transforms share: checks, and the share that is held out for evaluation."""

from typing import NamedTuple

from vpd_jax.errors import UserError


class Absent(NamedTuple):
  """Stands for a value of an Example that cannot be made; a batch that needs it raises a UserError with the reason."""

  reason: str


def check_size(option: str, size: tuple[int, int]) -> tuple[int, int]:
  """Checks that `size` is (height, width), two positive integers; raises ValueError with the name of the option."""
  sides = tuple(size) if isinstance(size, tuple | list) else (size,)
  if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
    raise UserError(f"{option}={size!r} must be (height, width), two positive whole numbers.")
  return sides


def train_count(count: int, holdout: float) -> int:
  """Number of records for training where the last `holdout` of `count`, a fraction, at least one, are held out."""
  return count - max(1, round(holdout * count))
