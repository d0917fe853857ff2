"""Results of long measurements: stored one by one in a JSON file, and inserted as tables into a page."""

import json
import pathlib
from typing import Any

from vpd_jax.files import atomic

Results = dict[str, Any]


def load(path: pathlib.Path) -> Results:
  """The stored results by name, in the order of measurement."""
  return json.loads(path.read_text()) if path.exists() else {}


def save(path: pathlib.Path, name: str, result: Any) -> None:
  """Adds or replaces one result; the file is replaced atomically."""
  atomic.write_json(path, load(path) | {name: result})


def markers(script: str) -> tuple[str, str]:
  """The lines of a page that enclose the tables of a script."""
  return f"<!-- {script}: begin -->", f"<!-- {script}: end -->"


def insert(page: str, script: str, tables: str) -> str:
  """Replaces the tables between the two markers of the page.

  Raises:
    ValueError: the page does not contain the markers.
  """
  begin, end = markers(script)
  before, begin, rest = page.partition(begin)
  _, end, after = rest.partition(end)
  if not (begin and end):
    raise ValueError(f"the page must contain {markers(script)[0]!r} and, after it, {markers(script)[1]!r}.")
  return "\n".join([before + begin, tables, end + after])
