"""The rules of the layout: which file may import which, and what no file may be."""

import ast
import pathlib
import re

import pytest

import vpd_jax
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "vpd_jax"

# From top to bottom. A part imports parts of lower rows only, not its neighbors in a row; a folder is one part.
LAYERS = (
  ("main", "demo"),
  ("planning",),
  ("training", "prediction"),
  ("evaluation",),
  ("checkpoints",),
  ("experiment",),
  ("convert", "optim", "tasks"),
  ("distributed",),
  ("models", "data", "inference", "monitoring", "config", "moments"),
  ("files",),
  ("types",),
  ("errors",),
)
ROW = {part: row for row, parts in enumerate(LAYERS) for part in parts}
ONLY = {  # narrower than the rows
  "data": {"types", "files", "errors"},  # knows no network
  "tasks": {"types", "files", "errors"},  # knows no network either
  "models": {"types", "errors"},
  "inference": {"types", "files", "errors"},  # knows no config
  "config": {"errors"},
}
# Inside models: a method is a composition of what stands below it.
MODELS = (
  ("perception_model",),
  ("methods", "necks", "heads"),
  ("context", "lora"),
  ("backbones", "parameters"),
  ("initializers", "layer_options"),
)
CONFIGURED = {"main", "demo", "training", "prediction", "planning", "evaluation", "checkpoints", "experiment", "config"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
LONGEST = 400  # a file of one concern is rarely over 330


def part_of(path: pathlib.Path) -> str:
  """The file's name at the top of the package, or its folder's."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of everything a file imports anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path.name} has a relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def parts(names: set[str]) -> set[str]:
  """Parts of the package among imported names."""
  return {name.split(".")[1] for name in names if name.startswith("vpd_jax.")}


def packages(names: set[str]) -> set[str]:
  return {name.split(".")[0] for name in names}


def label(path: pathlib.Path) -> str:
  return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_point_downwards(path):
  part = part_of(path)
  assert part in ROW, f"{part} has no place yet: give it a row in LAYERS"
  for other in parts(imports(path)) - {part}:
    assert other in ROW, f"{label(path)} imports {other}, which has no row in LAYERS"
    assert ROW[other] > ROW[part], f"{label(path)} imports {other}, which does not stand below it"
    assert other in ONLY.get(part, ROW), f"{label(path)} imports {other}; {part} may only import {ONLY[part]}"


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "models"], ids=label)
def test_imports_of_models_point_downwards(path):
  row = {part: number for number, parts in enumerate(MODELS) for part in parts}
  inner = path.relative_to(PACKAGE / "models").parts[0].removesuffix(".py")
  if inner == "__init__":
    return
  others = {name.split(".")[2] for name in imports(path) if name.startswith("vpd_jax.models.")} - {inner}
  assert all(row[other] > row[inner] for other in others), f"{label(path)} imports {sorted(others)}"


def test_only_the_pipeline_of_data_imports_jax():
  found = {label(path) for path in FILES if part_of(path) == "data" and {"jax", "flax"} & packages(imports(path))}
  assert found <= {"data/pipeline.py"}


def test_config_dicts_stop_at_experiment():
  found = {part_of(path) for path in FILES if "ml_collections" in packages(imports(path))}
  assert found <= CONFIGURED


def test_tensorflow_is_imported_by_the_writers_only_and_torch_nowhere():
  found = {(name, part_of(path)) for path in FILES for name in packages(imports(path))}
  assert {part for name, part in found if name == "tensorflow"} <= {"monitoring"}
  assert not {part for name, part in found if name in ("torch", "diffusers")}


def test_importing_the_package_imports_no_jax():
  at_import = [
    n for n in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
  ]
  found = {alias.name for n in at_import if isinstance(n, ast.Import) for alias in n.names}
  found |= {n.module for n in at_import if isinstance(n, ast.ImportFrom)}
  assert packages(found) <= {"typing", "importlib"}, "spawned data workers import the package too"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_files_stay_short_and_named_after_something(path):
  lines = len(path.read_text().splitlines())
  assert lines <= LONGEST, f"{label(path)} has {lines} lines; move one concern out of it"
  assert path.name not in ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")


@pytest.mark.parametrize("name", sorted(vpd_jax.MOVED))
def test_an_old_name_of_a_module_is_refused_with_the_new_one(name):
  with pytest.raises(ImportError, match=rf"^vpd_jax\.{name} is now vpd_jax\.{vpd_jax.MOVED[name]}; "):
    exec(f"from vpd_jax import {name}")
  assert (PACKAGE / (vpd_jax.MOVED[name].replace(".", "/") + ".py")).exists() or name == "presets"


def imported_tests(path: pathlib.Path) -> set[str]:
  """Test modules among what a file imports, also in the programs that it holds as text."""
  found = imports(path)
  for module, names in re.findall(r"\bfrom +(tests[.\w]*) +import +([\w ,]+)", path.read_text()):
    found |= {f"{module}.{name.split()[0]}" for name in names.split(",") if name.strip()}
  found |= set(re.findall(r"(?m)(?:^|[;\"']) *import +((?:tests\.[.\w]*)?test_\w+)", path.read_text()))
  return {name for name in found if re.match(r"tests\.(.*\.)?test_|test_", name)}


@pytest.mark.parametrize("part", ["tests", "benchmarks", "scripts"])
def test_no_file_imports_a_test_module(part):
  """What tests share is in tests/helpers. A test may name itself, for a process of its own."""
  found = {}
  for path in (ROOT / part).rglob("*.py"):
    itself = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if names := {name for name in imported_tests(path) if name != itself}:
      found[str(path.relative_to(ROOT))] = names
  assert not found
