"""Two processes of four virtual devices each, joined by jax.distributed, against one process of eight."""

import contextlib
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from tests.helpers import devices, one_convolution
from tests.helpers.paths import ROOT
from tests.helpers.processes import config, free_port
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.distributed import multiprocess
from vpd_jax.evaluation import evaluate
from vpd_jax.training import session

SECONDS = 400  # after which a process is ended
SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_TASKS": "2"}

# Everything that one pair of processes can show, in one: starting and compiling are what takes time.
CHILD = """
import json, os, pathlib, signal, sys, threading, time
sys.modules["tensorflow"] = None  # the other writer is there sooner
import jax
from tests.helpers import devices, one_convolution, processes
from vpd_jax import errors, experiment
from vpd_jax.checkpoints.checkpointer import Checkpoints
from vpd_jax.data import pipeline
from vpd_jax.distributed import multiprocess, sharding
from vpd_jax.evaluation import evaluate
from vpd_jax.training import session, train

def terminate_when(ready):
  while not ready():
    time.sleep(0.05)
  os.kill(os.getpid(), signal.SIGTERM)

def broken(*_):
  raise errors.UserError("picture 7 is broken")

if __name__ == "__main__":
  experiment.METHODS[one_convolution.NAME] = one_convolution.OneConvolution
  folder = pathlib.Path(sys.argv[1])
  multiprocess.connect(None, None, None, 300)
  index = jax.process_index()
  found = {"devices": [jax.device_count(), jax.local_device_count()]}
  for group, mesh in ((0, "data"), (3, "fsdp")):
    found[f"{group} {mesh}"] = devices.loss(group, mesh)

  try:
    sharding.place({"a": jax.numpy.full(3, index)}, {"a": sharding.replicated(devices.make_mesh("data"))})
  except ValueError as error:
    found["different"] = str(error)

  seeds = processes.config(1000).unlock()
  seeds.seed = index
  try:
    train.run(seeds.lock(), str(folder / "seeds"))
  except ValueError as error:
    found["seeds"] = str(error)

  if index == 1:  # the process that writes no file
    lines = folder / "stopped" / "metrics.jsonl"
    threading.Thread(target=terminate_when, args=[lines.exists], daemon=True).start()
  train.run(processes.config(1000), str(folder / "stopped"))
  with Checkpoints(folder / "stopped", read_only=True) as held:
    found["stopped at"] = held.latest_step()
  end = processes.config(found["stopped at"] + 1)
  found["undisturbed"] = train.run(end, str(folder / "undisturbed"))
  found["resumed"] = train.run(end, str(folder / "stopped"))
  found["evaluated"] = evaluate.run(end, str(folder / "stopped"))
  (folder / f"{index}.json").write_text(json.dumps(found))

  if index == 1:
    pipeline._TrainTransform.__call__ = broken
  with multiprocess.report_errors():
    train.run(processes.config(1000), str(folder / "broken"))
"""


@pytest.fixture(scope="module", autouse=True)
def _the_method_is_known():
  with one_convolution.known():
    yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """(folder, what each process found, their outputs, exit codes)."""
  folder, address = tmp_path_factory.mktemp("processes"), f"127.0.0.1:{free_port()}"
  (folder / "child.py").write_text(CHILD)
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_COUNT": "2"}
  environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
  processes = [
    subprocess.Popen(
      [sys.executable, str(folder / "child.py"), str(folder)],
      env=environment | {"JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert (folder / "1.json").exists(), "\n".join(outputs)
  found = [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]
  return folder, found, outputs, [process.returncode for process in processes]


def lines(path):
  """The scalars of a run by step, later ones first come out on top."""
  found = {}
  for line in path.read_text().splitlines():
    entry = json.loads(line)
    found.setdefault(entry["step"], {}).update(entry)
  return found


@pytest.mark.multidevice
def test_a_loss_in_two_processes_is_the_loss_on_one_device(pair):
  alone = {0: devices.loss(0, "one"), 3: devices.step("one")["train/loss"]}
  for found in pair[1]:
    assert found["devices"] == [8, 4]
    for group, mesh in ((0, "data"), (3, "fsdp")):
      assert found[f"{group} {mesh}"] == pytest.approx(alone[group], rel=1e-5)


@pytest.mark.multidevice
def test_sigterm_to_one_process_stops_both_at_one_step_and_the_rest_follows_as_undisturbed(pair):
  folder, (first, second), outputs, _ = pair
  step = first["stopped at"]
  assert step == second["stopped at"] and 1 <= step < 1000
  assert f"stopped by SIGTERM after step {step}, which is saved" in outputs[0]
  assert first["resumed"] == first["undisturbed"] == second["resumed"] == second["undisturbed"]
  assert f"resumed: checkpoint of step {step}" in outputs[0]
  stopped, undisturbed = (lines(folder / name / "metrics.jsonl") for name in ("stopped", "undisturbed"))
  assert list(undisturbed) == list(stopped) == list(range(1, step + 2))
  for name in ("train/loss", "norm/gradients"):
    assert [stopped[i][name] for i in stopped] == [undisturbed[i][name] for i in undisturbed]


@pytest.mark.multidevice
def test_the_loop_in_two_processes_sees_the_batches_and_gives_the_scores_of_one(pair):
  folder, (first, second), _, _ = pair
  logged = lines(folder / "undisturbed" / "metrics.jsonl")
  begin = config(1)
  exp, mesh = experiment.assemble(begin), devices.make_mesh("one")
  state, _ = initialize.new_state(begin, exp, mesh)
  dataset = experiment.dataset(begin, exp)
  with contextlib.closing(session.training_batches(begin, exp, dataset, mesh, 0)) as batches:
    batch = next(batches)
  total = jax.jit(devices.forward(exp, 0))(state, batch)
  assert logged[1]["train/loss"] == pytest.approx(float(total.value / total.weight), rel=1e-5)
  # Saved by two processes, restored by one.
  scores = evaluate.run(begin, str(folder / "undisturbed"))
  assert first["undisturbed"] == pytest.approx(scores, rel=1e-5)
  assert first["evaluated"] == second["evaluated"] == pytest.approx(scores, rel=1e-5)
  assert scores["eval/rooms/images"] == 5


@pytest.mark.multidevice
def test_processes_with_different_weights_are_refused(pair):
  for found in pair[1]:
    assert found["different"].startswith(
      "the processes begin with different arrays, 1 of 1, like [\"['a']\"]; give all"
    )
    # A whole start: new weights by another seed.
    assert found["seeds"].startswith("the processes begin with different arrays, ")
    assert "['params']['head/conv_layers/0/kernel']" in found["seeds"]


@pytest.mark.multidevice
def test_only_the_first_process_writes_and_speaks(pair):
  folder, _, outputs, _ = pair
  assert "step 1/" in outputs[0] and "step 1/" not in outputs[1] and "eval/" not in outputs[1]
  assert len(list((folder / "stopped").glob("events.out.tfevents.*"))) == 2  # before and after the stop
  assert (folder / "stopped" / "config.json").exists() and (folder / "stopped" / "eval.json").exists()


@pytest.mark.multidevice
def test_an_error_in_one_process_ends_both_with_a_line_each(pair):
  _, _, outputs, codes = pair
  assert codes == [2, 2]
  assert outputs[1].splitlines()[-1] == "process 1: error: picture 7 is broken"
  assert outputs[0].splitlines()[-1] == "process 0: process 1 failed. error: picture 7 is broken"


NOBODY, GPUS = (None, None, None), {"local_device_ids": [0, 1, 2, 3]}
GIVEN = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}
ALONE = {"cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(
  "flags, environment, expected",
  [
    ((None, None, None), {}, None),
    ((None, None, None), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
    ((None, None, None), {"SLURM_STEP_NODELIST": "node1", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ((None, None, None), SLURM, {}),
    (("host:1234", None, None), SLURM, {"coordinator_address": "host:1234"}),
    ((None, 1, None), SLURM, None),
    ((None, None, None), SLURM | {"JAX_PROCESS_COUNT": "1"}, None),
    # The only task of each machine takes all GPUs that it sees, and a task that sees one takes it.
    (NOBODY, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, GPUS),
    (NOBODY, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, {"local_device_ids": [0]}),
    (NOBODY, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}),
    (NOBODY, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {}),
    (NOBODY, SLURM | {"CUDA_VISIBLE_DEVICES": "2", "JAX_LOCAL_DEVICE_IDS": "0"}, {}),
    (("host:1234", 4, 3), {}, GIVEN | ALONE),
    ((None, 4, 3), {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_PROCESS_ID": "0"}, GIVEN | ALONE),
    (("host:1234", 4, 0), SLURM, GIVEN | {"process_id": 0} | ALONE),
  ],
)
def test_who_belongs_to_the_run(flags, environment, expected):
  assert multiprocess.arguments(*flags, environment) == expected


@pytest.mark.parametrize(
  "flags, environment, message",
  [
    ((None, None, 1), {}, r"without \['coordinator_address', 'num_processes'\]; give each of them"),
    (("host:1234", 4, 4), {}, "--process_id=4 of --process_count=4 processes does not exist"),
    (("host", 4, 1), {}, "--coordinator_address='host' has no port; write HOST:PORT"),
    ((None, None, None), {"JAX_PROCESS_COUNT": "two"}, "JAX_PROCESS_COUNT='two' is not a number"),
  ],
)
def test_a_wrong_set_of_processes_is_refused(flags, environment, message):
  with pytest.raises(ValueError, match=message):
    multiprocess.arguments(*flags, environment)


def test_a_tpu_with_several_hosts_is_known_by_its_environment(monkeypatch):
  monkeypatch.setattr(multiprocess.accelerators, "tpu_chips", lambda: ["/dev/accel0"])
  monkeypatch.setattr(multiprocess.importlib.util, "find_spec", lambda name: name == "libtpu")
  monkeypatch.setattr(multiprocess, "_metadata", lambda key: {"worker-network-endpoints": "a:0:10.0.0.1"}.get(key, ""))
  nobody = (None, None, None)
  assert multiprocess.arguments(*nobody, {}) is None  # one host
  assert multiprocess.arguments(*nobody, {"TPU_WORKER_HOSTNAMES": "t0,t1"}) == {}
  assert multiprocess.arguments(*nobody, {"TPU_WORKER_HOSTNAMES": "t0"}) is None
  assert multiprocess.arguments(*nobody, {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}) == {}
  for platforms, expected in (("tpu", {}), ("tpu,cpu", {}), ("", {}), ("cpu", None)):
    environment = {"TPU_WORKER_HOSTNAMES": "t0,t1", "JAX_PLATFORMS": platforms}
    assert multiprocess.arguments(*nobody, environment) == expected
  monkeypatch.setattr(
    multiprocess, "_metadata", lambda key: {"worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}.get(key, "")
  )
  assert multiprocess.arguments(*nobody, {}) == {}


def test_processes_that_do_not_come_are_one_line(tmp_path):
  command = ["-m", "vpd_jax.main", "--config=configs/rooms.py:depth,tiny", "--process_count=2"]
  address = [f"--coordinator_address=127.0.0.1:{free_port()}", "--coordinator_timeout=2"]
  for index in range(2):
    given = [f"--process_id={index}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, *command, *address, *given], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert re.fullmatch(
      r"error: could not reach the coordinator .* no answer for 2 s\. .*--process_count=1\.\n", done.stderr
    )
  assert not list(tmp_path.iterdir())
