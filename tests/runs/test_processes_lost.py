"""One of two processes is killed: the other ends by itself and names it, and the same command goes on bit for bit."""

import os
import re
import subprocess
import time

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import free_port
from tests.helpers.rooms_runs import arrays
from tests.helpers.stopped_runs import assert_final, command
from vpd_jax.checkpoints.checkpointer import Checkpoints

STEPS = 12
FIELDS = {
  **{"num_steps": STEPS, "save_every": 2, "eval_every": STEPS, "log_every": 1, "mesh.fsdp": 4},
  **{"data.batch_size": 8, "eval.batch_size": 8, "eval.test_time": ()},
}
SECONDS = 180  # within which the process that is left must end
WHOLE = 400  # after which a run is ended


def begin(folder, name):
  """Both processes of a run, four virtual devices each; what they print is appended to files."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"}
  flags = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"
  words = [*command(folder / name, **FIELDS), "--process_count=2"]
  found = []
  for index in range(2):
    with output(folder, name, index).open("a") as file:
      found.append(
        subprocess.Popen([*words, f"--process_id={index}"], env=environment, cwd=ROOT, stdout=file, stderr=file)
      )
  return found


def output(folder, name, index):
  return folder / f"{name}.{index}.txt"


def end(folder, name, pair):
  """Waits for a run that nobody disturbs."""
  codes = [process.wait(timeout=WHOLE) for process in pair]
  assert codes == [0, 0], output(folder, name, 0).read_text() + output(folder, name, 1).read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The last arrays of a run of two processes."""
  folder = tmp_path_factory.mktemp("undisturbed")
  end(folder, "run", begin(folder, "run"))
  return arrays(folder / "run", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_other_process_ends_and_names_the_lost_one(lost, undisturbed, tmp_path):
  pair = begin(tmp_path, "run")
  workdir, deadline = tmp_path / "run", time.monotonic() + WHOLE
  while not (workdir / "checkpoints" / "4").is_dir():
    assert time.monotonic() < deadline and all(process.poll() is None for process in pair)
    time.sleep(0.05)
  pair[lost].kill()
  pair[lost].wait()
  killed = time.monotonic()
  code = pair[1 - lost].wait(timeout=SECONDS)
  time.sleep(2)  # who speaks for a process that was ended does so after it
  told = output(tmp_path, "run", 1 - lost).read_text()
  print(f"process {lost} lost: the other ended after {time.monotonic() - killed:.0f} s with {code}:\n{told[-3000:]}")
  assert code not in (None, 0)
  assert re.search(rf"process {lost}(: no heartbeat| failed)", told.splitlines()[-1]), told
  with Checkpoints(workdir, read_only=True) as held:
    assert 4 <= held.latest_step() < STEPS
  end(tmp_path, "run", begin(tmp_path, "run"))
  assert_final(workdir, undisturbed, STEPS)
