"""Files that are whole at any time, and JSON without NaN."""

import ast
import json
import pathlib

import numpy as np
import pytest
from etils import epath

from tests.helpers.paths import ROOT
from vpd_jax.files import atomic


@pytest.mark.parametrize("kind", [pathlib.Path, epath.Path])
def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path, kind):
  path = kind(tmp_path / "folder" / "a.json")
  atomic.write_json(path, {"a": 1})

  def cut_off(to):
    to.write_text('{"a":')
    assert to.suffix == ".json" and json.loads(path.read_text()) == {"a": 1}
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    atomic.write(path, cut_off)
  assert json.loads(path.read_text()) == {"a": 1}
  assert [x.name for x in path.parent.iterdir()] == ["a.json"]
  assert atomic.write(path, b"new") == path and path.read_bytes() == b"new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
  with pytest.raises(OSError), atomic.beside(tmp_path / "made") as unfinished:
    unfinished.mkdir()
    (unfinished / "a").write_text("a")
    raise OSError
  assert not list(tmp_path.iterdir())
  with atomic.beside(tmp_path / "made") as unfinished:
    unfinished.mkdir()
    (unfinished / "a").write_text("a")
  assert (tmp_path / "made" / "a").read_text() == "a"


@pytest.mark.parametrize("name", ["n" * 250, "\N{CJK UNIFIED IDEOGRAPH-6DF1}" * 83])  # of 3 bytes each
def test_the_longest_name_can_be_written(tmp_path, name):
  path = tmp_path / f"{name}.json"
  assert atomic.write(path, "x").read_text() == "x"


def test_numbers_that_are_not_finite_are_null_in_json():
  content = {"a": [float("nan"), np.float32("inf"), (1.5, -np.inf)], "b": {"c": np.float64("nan")}, "d": "NaN"}
  text = atomic.to_json(content)
  refuse = lambda word: pytest.fail(f"{word} is not valid JSON")
  assert json.loads(text, parse_constant=refuse) == {"a": [None, None, [1.5, None]], "b": {"c": None}, "d": "NaN"}


def test_nothing_else_writes_beside_and_renames_or_writes_json_in_place():
  """Renaming is for this one module, and JSON of results goes through it."""
  found = []
  for path in [*ROOT.glob("vpd_jax/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]:
    tree = ast.parse(path.read_text())
    given = {id(x) for node in ast.walk(tree) if isinstance(node, ast.Lambda) for x in ast.walk(node)}  # to `write`
    for node in ast.walk(tree):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner, name = ast.unparse(node.func.value), node.func.attr
        attributes = {x.attr for a in node.args for x in ast.walk(a) if isinstance(x, ast.Attribute)}
        whole = id(node) in given or owner.startswith("unfinished / ")
        dumped = "dumps" in attributes or ("to_json" in attributes and not whole)
        renames = name == "rename" or (name == "replace" and (owner == "os" or len(node.args) == 1))
        arrays = owner == "np" and name in ("save", "savez", "savez_compressed") and not whole
        if renames or arrays or (name in ("write_text", "write_bytes") and dumped) or (owner, name) == ("json", "dump"):
          found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
  allowed = ("vpd_jax/files/atomic.py", "dataclasses.replace")
  # From a folder that resumes.
  allowed += ("shards/writer.py: builder.data_path.rename", "shards/writer.py: part.replace")
  # Inputs of a child process and made-up data are read by nobody else.
  allowed += ("scripts/benchmark.py: given.", "benchmarks/synthetic_data.py", "benchmarks/torch_depth.py")
  assert not [line for line in found if not any(word in line for word in allowed)]
