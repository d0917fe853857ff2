"""Pictures of any size are shared out among processes: two that score a run together find what one alone finds."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import free_port

SECONDS = 900  # after which a command is ended
CONFIG = """
from tests.helpers import tiny
from vpd_jax.config import loader

def get_config():
  config = tiny.shrunk(loader.load("configs/rooms.py:segmentation,tiny")).unlock()
  config.update(num_steps=2, log_every=1, eval_every=2, save_every=2)
  config.update_from_flattened_dict({
    "mesh.fsdp": 2, "data.batch_size": 8, "data.eval_count": 5, "eval.batch_size": 8, "eval.baselines": 0,
  })
  return config.lock()
"""


def run(folder, mode, processes, devices):
  """One command in as many processes; what each printed."""
  flags = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  environment |= {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
  environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_PROCESS_COUNT": str(processes)}
  words = [
    sys.executable,
    "-m",
    "vpd_jax.main",
    f"--mode={mode}",
    f"--config={folder}/config.py",
    f"--workdir={folder}/run",
  ]
  begun = [
    subprocess.Popen(
      words,
      env=environment | {"JAX_PROCESS_ID": str(index)},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(processes)
  ]
  told = [process.communicate(timeout=SECONDS)[0] for process in begun]
  assert [process.returncode for process in begun] == [0] * processes, "\n".join(told)
  return told


@pytest.mark.slow
def test_two_processes_score_pictures_as_one_does(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  run(tmp_path, "train", 2, 2)
  (tmp_path / "run" / "eval.json").unlink(missing_ok=True)
  together = run(tmp_path, "eval", 2, 2)
  scores = json.loads((tmp_path / "run" / "eval.json").read_text())["scores"]
  (tmp_path / "run" / "eval.json").unlink()
  run(tmp_path, "eval", 1, 4)
  alone = json.loads((tmp_path / "run" / "eval.json").read_text())["scores"]
  print(scores, together[0])
  assert scores.keys() == alone.keys() and 0 < alone["eval/rooms/mIoU"] < 1
  for name, value in alone.items():
    assert scores[name] == pytest.approx(value, rel=1e-6), name
