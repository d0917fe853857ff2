"""How tests run: warnings are errors, ranks never broadcast by themselves, and the CPU unless JAX_PLATFORMS says more.

Tests marked x64, multidevice, reference or accelerator are left out where the process cannot run them, and
everything not marked x64 is left out of a float64 process. `bash scripts/test.sh` starts the processes they need.
"""

import gc
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A damaged header can claim any size; up to 2**30 pixels OpenCV fills them, for seconds.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**25))

# Compiling takes longer than running here: leave the machine code as it comes, and make it in the quickest way.
if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    # Halves it where it is known; an unknown flag ends the process.
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
  )

import jax
import numpy as np
import pytest

from vpd_jax.monitoring import progress

pytest.register_assert_rewrite("tests.helpers")  # before anything imports them
jax.config.update("jax_numpy_rank_promotion", "raise")


def compilation_cache() -> pathlib.Path:
  """A folder for compiled programs that survives the run, one for each set of versions and kind of processor."""
  parts = [f"{name}-{importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "numpy")]
  parts.append(platform.python_version())
  if pathlib.Path("/proc/cpuinfo").exists():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    parts += sorted({line for line in lines if line.startswith(("model name", "flags"))})
  key = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
  return pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled" / f"jax-{jax.__version__}-{key}"


# What one test has compiled, another one, in whatever process and run, need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache())  # also for the processes that tests start
  jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Tracing makes objects by the million that live until their file is done, see _programs_are_dropped.
gc.freeze()
gc.set_threshold(200_000, 50, 50)

REFERENCE = ("torch", "diffusers", "transformers")
VIRTUAL_DEVICES = 8
MEMORY_GIB = 3.5  # of one process, from which the programs of its earlier files are dropped
WARNINGS = (
  "error",
  # What other packages do among themselves: only a deprecation in our own files is ours to mend.
  "ignore::DeprecationWarning:(?!vpd_jax|tests|configs|__main__)",
  "ignore::PendingDeprecationWarning:(?!vpd_jax|tests|configs|__main__)",
  "ignore::FutureWarning:(?!vpd_jax|tests|configs|__main__)",
  # Where one array cannot be read or written, orbax 0.12.8 leaves the others to tensorstore, which then finds nobody.
  r"ignore:Exception ignored in. None[\s\S]*Event loop is closed:pytest.PytestUnraisableExceptionWarning",
)


def pytest_configure(config):
  for line in WARNINGS:
    config.addinivalue_line("filterwarnings", line)


def has_reference() -> bool:
  return all(importlib.util.find_spec(package) for package in REFERENCE)


def runs_here(item, chosen: str) -> bool:
  """Whether this process can run a test, given the -m expression."""
  marks = {mark.name for mark in item.iter_markers()}
  return (
    ("x64" in marks) == jax.config.jax_enable_x64
    and ("multidevice" not in marks or jax.device_count() >= VIRTUAL_DEVICES)
    and ("reference" not in marks or has_reference())
    and ("accelerator" not in marks or jax.default_backend() != "cpu")
    and ("slow" not in marks or "slow" in chosen)
  )


def pytest_collection_modifyitems(config, items):
  here = [item for item in items if runs_here(item, config.option.markexpr)]
  if elsewhere := [item for item in items if item not in here]:
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = here


def pytest_report_header(config):
  if not has_reference():
    return (
      "reference tests are left out: VPD_TEST_REFERENCE=1 bash scripts/test.sh installs torch and diffusers for them"
    )


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """The folder of the authors' numbers."""
  return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _settings_are_restored():
  """A test that changes jax's configuration, or shows progress as commands do, leaves it to nobody else."""
  before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_numpy_rank_promotion")}
  yield
  progress.hide()
  for name, value in before.items():
    if getattr(jax.config, name) != value:
      jax.config.update(name, value)


def resident_gib() -> float:
  """Memory of this process; more than any limit where the system does not say."""
  statm = pathlib.Path("/proc/self/statm")
  if not statm.exists():
    return float("inf")
  return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped():
  """Compiled functions go when a process that runs many files has grown: the small ones serve the next file too."""
  yield
  if resident_gib() > MEMORY_GIB:
    jax.clear_caches()
    gc.collect()
    gc.freeze()  # what is left stays: the next collection need not look at it


@pytest.fixture(scope="session")
def full_oracle():
  """Setup -> arrays of <setup>.full.npz in the folder VPD_ORACLE: too large for the repository."""
  folder = os.environ.get("VPD_ORACLE")
  if not folder:
    pytest.skip("VPD_ORACLE=FOLDER must name the folder of the full-size *.full.npz files")

  def load(setup: str):
    with np.load(pathlib.Path(folder) / f"{setup}.full.npz") as arrays:
      return {name: arrays[name] for name in arrays.files}

  return load
