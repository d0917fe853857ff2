"""Diffusion backbones for visual perception, in JAX.

`vpd_jax.Predictor` is the Python entry point, `python -m vpd_jax.main` the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from vpd_jax.prediction.predictor import Predictor

__all__ = ["Predictor"]

# Old module names that external config files may still import.
MOVED = {
  "assemble": "experiment",
  "checkpoint": "checkpoints.checkpointer",
  "config_file": "config.loader",
  "evaluate": "evaluation.evaluate",
  "predict": "prediction.predictor",
  "presets": "config.presets",
  "train": "training.train",
}


def __getattr__(name: str) -> Any:
  """Imports Predictor lazily: data workers import this package too, but do not need the network."""
  if name == "Predictor":
    from vpd_jax.prediction.predictor import Predictor

    return Predictor
  if name in MOVED:
    raise ImportError(f"vpd_jax.{name} is now vpd_jax.{MOVED[name]}; import that in its place.")
  raise AttributeError(f"module 'vpd_jax' has no attribute {name!r}")
