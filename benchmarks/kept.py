"""Results of measurements that take long: in a JSON file, one by one as they are made, and as tables in a page."""

import json
import pathlib
from typing import Any

from vpd_jax.files import atomic

Results = dict[str, Any]


def held(path: pathlib.Path) -> Results:
  """What is there, by name, in the order in which it was made."""
  return json.loads(path.read_text()) if path.exists() else {}


def keep(path: pathlib.Path, name: str, result: Any) -> None:
  """Adds or replaces one; the file is whole at any time."""
  atomic.write_json(path, held(path) | {name: result})


def marks(script: str) -> tuple[str, str]:
  """The lines of a page between which the tables of a script stand."""
  return f"<!-- {script}: begin -->", f"<!-- {script}: end -->"


def write(page: str, script: str, tables: str) -> str:
  """The page with what stands between the two marks replaced.

  Raises:
    ValueError: they are not there.
  """
  begin, end = marks(script)
  before, begin, rest = page.partition(begin)
  _, end, after = rest.partition(end)
  if not (begin and end):
    raise ValueError(f"the page must hold {marks(script)[0]!r} and behind it {marks(script)[1]!r}.")
  return "\n".join([before + begin, tables, end + after])
