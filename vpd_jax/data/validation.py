"""Checks of options that several data sets and transforms share."""

from vpd_jax.errors import UserError


def check_size(option: str, size: tuple[int, int]) -> tuple[int, int]:
  """Checks that `size` is (height, width), two positive integers; raises ValueError with the name of the option."""
  sides = tuple(size) if isinstance(size, tuple | list) else (size,)
  if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
    raise UserError(f"{option}={size!r} must be (height, width), two positive whole numbers.")
  return sides
