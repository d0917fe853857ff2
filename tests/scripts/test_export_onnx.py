"""scripts/export_onnx.py: every task and method as ONNX, where jax2onnx is installed.

It needs an environment of its own, which the script makes in VPD_ONNX_VENV. There, with pytest installed,
`python -m pytest -m slow -s tests/scripts/test_export_onnx.py` prints the table of docs/export.md.
"""

import contextlib
import importlib.util
import json
import sys
import types

import jax
import pytest

from tests.helpers import tiny
from tests.helpers.loaded_scripts import load
from vpd_jax.config import loader
from vpd_jax.errors import UserError

FILES = {"depth": "nyu_depth", "segmentation": "ade20k_seg", "referring": "refcoco_refer", "pose": "coco_pose"}
NETWORKS = [(task, method) for task in FILES for method in ("vpd", "meta_prompts", "iedp", "eco_depth", "tadp")]
NETWORKS = [(task, method) for task, method in NETWORKS if method != "tadp" or task in ("depth", "segmentation")]
REFUSED = {"tadp": "RandomNormal"}  # it samples its latents, for which ONNX Runtime has no operation


@pytest.fixture(scope="module")
def script():
  return load("scripts/export_onnx.py")


def test_what_cannot_be_written_is_told_before_anything_is_loaded(script, tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  with pytest.raises(ValueError, match="exists already; give a folder that does not"):
    script.main(["--config=configs/nyu_depth.py:tiny", "--weights=no", f"--output={tmp_path}"])
  with pytest.raises(SystemExit, match="2"):
    script.main([])


def test_an_environment_that_cannot_be_made_is_one_line(script, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("VPD_ONNX_VENV", str(tmp_path / "file" / "env"))
  with pytest.raises(ValueError, match="file/env could not be made, see above; remove it and try again"):
    script.environment()


def test_an_environment_whose_making_was_interrupted_is_completed(script, tmp_path, monkeypatch):
  python, installed = tmp_path / "bin" / "python", []
  python.parent.mkdir()
  python.symlink_to(sys.executable)

  def run(command, check):
    installed.append(command[-1])
    return types.SimpleNamespace(returncode=1 if command[1] == "-c" else 0)  # jax2onnx is not there

  monkeypatch.setenv("VPD_ONNX_VENV", str(tmp_path))
  monkeypatch.setattr(script.subprocess, "run", run)
  assert script.environment() == python and installed[-1] == script.JAX2ONNX
  installed.clear()
  monkeypatch.setattr(script, "has_jax2onnx", lambda python: True)
  assert script.environment() == python and not installed


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is None, reason="needs jax2onnx, see scripts/export_onnx.py")
@pytest.mark.parametrize("task, method", NETWORKS)
def test_the_numbers_are_those_of_the_package(script, tmp_path, task, method):
  config = tiny.shrunk(loader.load(f"configs/{FILES[task]}.py:{method},tiny"))
  predictor = tiny.predictor(config)
  whole = (task, method) == NETWORKS[0]  # the other files are tested in tests/prediction/test_export.py
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.numpy_rank_promotion("allow"))  # jax2onnx has biases added to maps
    if method in REFUSED:
      stack.enter_context(pytest.raises(UserError, match=f"does not convert this network .*{REFUSED[method]}"))
    found = script.export(predictor, tmp_path / "net") if whole else script.add_onnx(predictor, tmp_path)
  if method in REFUSED:
    return
  if whole:
    assert json.loads((tmp_path / "net" / "network.json").read_text())["onnx"] == found
  for name, difference in found["largest_difference"].items():
    share = difference / found["largest_value"][name]
    print(f"\n| {task} | {method} | `{name}` | {difference:.1e} | {share:.1e} |")
    assert 0 < share < 1e-4  # 0 would be constants
