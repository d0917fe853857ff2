"""Diffusion backbones for visual perception, in JAX.

`vpd_jax.Predictor` is the door for Python programs; `python -m vpd_jax.main` the one for the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from vpd_jax.predict import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
  """Imports Predictor at first use: data workers import this package too, and need no network."""
  if name == "Predictor":
    from vpd_jax.predict import Predictor

    return Predictor
  raise AttributeError(f"module 'vpd_jax' has no attribute {name!r}")
