"""Devices that are not there: what is known of them, and what they need."""

import importlib.util

import pytest

from tests.helpers.planned_rooms import config_of
from vpd_jax.monitoring import chips
from vpd_jax.planning import plan, topologies

PLUGIN = any(map(importlib.util.find_spec, topologies.PLUGINS)) and importlib.util.find_spec("nvidia")


@pytest.mark.parametrize("name", topologies.GPUS)
def test_every_gpu_is_a_chip_of_the_table(name):
  chip, described = chips.chip_for(topologies.GPUS[name]["name"]), topologies.GPUS[name]
  assert chip.memory == pytest.approx(0.75 * described["memory"], rel=0.01)
  assert chip.bandwidth == pytest.approx(described["bandwidth"], rel=0.01)


def test_what_is_not_installed_is_named(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"'h200:8' needs JAX's CUDA plugin.*pip install 'vpd_jax\[cuda12\]'"):
    topologies.topology_devices("h200:8")
  with pytest.raises(ValueError, match=r"'v5e:2x4' needs libtpu.*pip install 'vpd_jax\[plan\]'"):
    topologies.topology_devices("v5e:2x4")


def test_effort_is_for_tpus():
  efforts = [topologies.effort(topology, "low") for topology in ("", "v5e:2x4", "a100-40gb:8", "h200:1")]
  assert efforts == ["default", "low", "untimed", "untimed"]
  assert all(effort in topologies.OPTIONS for effort in (*efforts, *topologies.EFFORTS))
  with pytest.raises(
    ValueError, match="--effort='default' would have no effect with --topology='h200:8'; leave it out"
  ):
    topologies.effort("h200:8", "default")


def test_compilers_are_told_apart(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: name != "jax_cuda12_plugin")
  monkeypatch.setattr(topologies.importlib.metadata, "version", lambda name: "1.2")
  found = [topologies.compiler(topology) for topology in ("", "v5e:2x4", "h100:8")]
  assert found == ["jaxlib 1.2", "libtpu 1.2", "jax_cuda13_plugin 1.2"]


@pytest.mark.slow
@pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin and cuDNN: pip install 'vpd_jax[cuda12]'")
def test_a_step_is_compiled_for_gpus_that_are_not_there(capsys):
  config = config_of(**{"data.batch_size": 24, "eval.batch_size": 8, "mesh.fsdp": 4, "dtype": "bfloat16"})
  found = plan.run(config, "h200:8")
  assert found["train"]["fits"] and found["train"]["devices"] == 8 and found["train"]["kind"] == "NVIDIA H200"
  assert found["train"]["effort"] == "untimed" and "all-reduce" in found["train"]["collectives"]
  assert "kernels chosen without timing them" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["v5e:3x3", "4090", "v5e", "v5e:2x4x1", "v7:2x2", "h200", "h300:8", "V5E:2x4"])
def test_an_unknown_name_is_answered_before_anything_is_asked_for(monkeypatch, name):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: pytest.fail("looked for a compiler"))
  with pytest.raises(ValueError, match=rf"^--topology='{name}' is unknown; known are v5e .*as h200:8\.$"):
    topologies.topology_devices(name)


@pytest.mark.parametrize(
  "name", ["v5e:1x1", "v6e:16x16", "v5p:2x2x1", "v4:2x2x2", "a100-80gb:1", "h100:8", "t4:1", "a10g:2", "rtx4090:1"]
)
def test_a_known_name_is_refused_only_where_nothing_compiles_for_it(monkeypatch, name):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(ValueError, match=rf"^--topology='{name}' needs .*: pip install"):
    topologies.topology_devices(name)
