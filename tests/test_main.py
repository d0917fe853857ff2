"""The start of the program: memory in huge pages on a CPU."""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from vpd_jax import main

SETTING = "glibc.malloc.hugetlb=1"
linux = pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")


@pytest.fixture
def restarts(monkeypatch):
  """The commands with which the process would be replaced."""
  commands = []
  monkeypatch.setattr(os, "execv", lambda path, arguments: commands.append([path, *arguments]))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  return commands


@linux
@pytest.mark.parametrize(
  "before, after", [("", SETTING), ("glibc.malloc.arena_max=1", f"glibc.malloc.arena_max=1:{SETTING}")]
)
def test_a_run_on_the_cpu_starts_again_with_huge_pages(restarts, monkeypatch, before, after):
  monkeypatch.setenv("GLIBC_TUNABLES", before)
  main.use_huge_pages()
  assert restarts == [[sys.executable, sys.executable, *sys.orig_argv[1:]]]
  assert os.environ["GLIBC_TUNABLES"] == after


@pytest.mark.parametrize("variable, value", [
  ("GLIBC_TUNABLES", SETTING), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"), ("JAX_PLATFORMS", "cuda"),
])  # fmt: skip
def test_a_setting_of_the_user_and_an_accelerator_prevent_it(restarts, monkeypatch, variable, value):
  monkeypatch.setenv("GLIBC_TUNABLES", "")
  monkeypatch.setenv(variable, value)
  main.use_huge_pages()
  assert restarts == []


def test_the_command_runs_once_with_its_arguments_and_exit_code():
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  command = [sys.executable, "-m", "vpd_jax.main", "--mode=weights", "--class=a b"]
  done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and done.stderr.count("--class: no effect with --mode=weights") == 1
