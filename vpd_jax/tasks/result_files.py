"""The files that a prediction is written to."""

from collections.abc import Callable, Mapping
from pathlib import Path

from vpd_jax.files import atomic
from vpd_jax.types import Fields


def write(stem: Path, suffix: str, content: Callable[[Path], object]) -> Path:
  """Writes a file stem + suffix, see atomic.write."""
  return atomic.write(stem.with_name(stem.name + suffix), content)


def write_result(stem: Path, parts: Mapping[str, Callable[[Path], object]], metadata: Fields) -> list[Path]:
  """Writes the files of a result, whose paths are returned; each appears when it is complete, the JSON last.

  Args:
    stem: path without suffix.
    parts: what writes a file, by its suffix.
    metadata: content of stem.json.
  """
  paths = [write(stem, suffix, content) for suffix, content in parts.items()]
  return [*paths, atomic.write_json(stem.with_name(f"{stem.name}.json"), metadata)]
