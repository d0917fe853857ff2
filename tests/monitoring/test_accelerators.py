"""A machine whose accelerator JAX does not use says so, with what to install."""

import jax
import pytest

from vpd_jax.monitoring import accelerators

DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}.65.06  Release Build"


def write(root, path, text=""):
  (root / path).parent.mkdir(parents=True, exist_ok=True)
  (root / path).write_text(text)


@pytest.mark.parametrize(
  "path, text, extra",
  [
    ("proc/driver/nvidia/version", DRIVER.format(580), "cuda13"),
    ("proc/driver/nvidia/version", DRIVER.format(550), "cuda12"),
    ("dev/nvidia0", "", "cuda12"),
    ("dev/accel0", "", "tpu"),
    ("dev/vfio/0", "", "tpu"),
  ],
)
def test_a_device_is_named_with_its_extra(tmp_path, path, text, extra):
  write(tmp_path, path, text)
  line = accelerators.unused({}, str(tmp_path))
  assert f"'vpd_jax[{extra}]'" in line and "runs on the CPU" in line and jax.__version__ in line
  assert "\n" not in line and accelerators.extra({}, str(tmp_path)) == extra


def test_the_variables_of_a_tpu_host_are_enough(tmp_path):
  assert "'vpd_jax[tpu]'" in accelerators.unused({"TPU_WORKER_HOSTNAMES": "localhost"}, str(tmp_path))


def test_a_chosen_platform_silences(tmp_path):
  write(tmp_path, "dev/accel0")
  assert accelerators.unused({"JAX_PLATFORMS": "cpu"}, str(tmp_path)) == ""


def test_nothing_is_said_of_a_machine_without_or_of_one_that_is_used(tmp_path, monkeypatch):
  assert accelerators.unused({}, str(tmp_path)) == accelerators.extra({}, str(tmp_path)) == ""
  write(tmp_path, "dev/nvidia0")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert accelerators.unused({}, str(tmp_path)) == ""


@pytest.mark.parametrize("path, environment, absent", [
  ("dev/vfio/vfio", {}, True), ("dev/vfio/3", {}, False),
  ("etc/hosts", {}, True), ("etc/hosts", {"JAX_PLATFORMS": "cuda"}, False), ("etc/hosts", {"TPU_NAME": "a"}, False),
  ("dev/nvidia0", {}, False), ("dev/nvidia0", {"JAX_PLATFORMS": "cpu"}, True),
])  # fmt: skip
def test_the_cpu_is_expected_without_a_device_or_where_it_is_asked_for(tmp_path, path, environment, absent):
  write(tmp_path, path)
  assert accelerators.is_absent(environment, str(tmp_path)) == absent
