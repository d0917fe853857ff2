"""What a wheel carries, and that it works alone: no file of a checkout is needed."""

import os
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.helpers.paths import ROOT


def run(*command, folder, **environment):
  clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
  return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel of the project, built without network."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"  # setuptools leaves build/ beside what it builds
  source.mkdir()
  for name in ("vpd_jax", "configs", "pyproject.toml", "README.md", "LICENSE"):
    (source / name).symlink_to(ROOT / name)
  build = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
  done = run(sys.executable, "-W", "ignore", "-c", build, folder=source)
  assert done.returncode == 0, done.stderr
  (made,) = (source / "dist").glob("*.whl")
  return made


@pytest.fixture(scope="module")
def installed(wheel):
  """The wheel, unpacked into a folder of its own."""
  target = wheel.parent / "installed"
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(target)
  return target


def test_every_folder_of_the_package_is_listed():
  listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
  folders = {path.parent.relative_to(ROOT) for path in (ROOT / "vpd_jax").rglob("*.py")}
  assert sorted(listed) == sorted({".".join(folder.parts) for folder in folders} | {"vpd_jax.configs"})


def test_a_wheel_holds_every_module_config_and_list(wheel):
  held = set(zipfile.ZipFile(wheel).namelist())
  kinds = (".py", ".json", ".safetensors")
  wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "vpd_jax").rglob("*") if path.suffix in kinds}
  wanted |= {f"vpd_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.py")}
  assert wanted <= held, sorted(wanted - held)
  assert not any(name.startswith(("tests/", "configs/", "benchmarks/", "scripts/")) for name in held)


def test_every_config_of_the_wheel_is_found_from_any_folder(installed, tmp_path):
  names = [path.name for path in (ROOT / "configs").glob("*.py")]
  code = f"""
import vpd_jax
from vpd_jax.config import loader
assert vpd_jax.__file__.startswith({str(installed)!r}), vpd_jax.__file__
for name in {names}:
  loader.load("configs/" + name)
"""
  done = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(installed))
  assert done.returncode == 0, done.stderr


def test_the_command_of_the_readme_takes_a_config_of_the_wheel(installed, tmp_path):
  command = [sys.executable, "-m", "vpd_jax.main", "--config=configs/nyu_depth.py", "--mode=eval", "--workdir=run"]
  done = run(*command, "--config.data.root=nowhere", folder=tmp_path, PYTHONPATH=str(installed))
  assert done.returncode == 2 and done.stderr.startswith("error: ") and "was not found" not in done.stderr
  assert "nowhere" in done.stderr or "trained" in done.stderr, "the config was read and its data asked for"
