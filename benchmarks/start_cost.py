"""CPU seconds of the start of a run, compared with another checkout of the project.

python benchmarks/start_cost.py --other=../vpd_jax_before --other_python=../before/bin/python first_step trace

Each measure runs in both checkouts alternately, and prints CPU seconds (user + system, child processes included), wall
seconds and the ratio. CPU seconds depend less on other programs on a shared machine than wall seconds.

  first_step   the command `configs/rooms.py:depth,tiny` without any cache, to the end of its first training step
  trace        imports, `configs/nyu_depth.py:vpd` at full size, and jax.jit(step).lower; the last part alone is printed
  tests        scripts/test.sh from a clean state, then once more with what the first run left
  quickstart   scripts/quickstart.sh from a clean state

Installing the environments is not measured.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
MEASURES = ("first_step", "trace", "tests", "quickstart")

TRACE = """
import time
import jax, jax.numpy as jnp, numpy as np
try:
  from vpd_jax import experiment as assemble
  from vpd_jax.config import loader as config_file
  from vpd_jax.distributed import sharding
except ImportError:  # a checkout from before the modules were sorted into folders
  from vpd_jax import assemble, config_file, sharding
try:
  from vpd_jax.training import compilation as training
except ImportError:  # a checkout from before training was split up
  try:
    from vpd_jax.training import train as training
  except ImportError:
    from vpd_jax import train as training
config = config_file.load("configs/nyu_depth.py:vpd")
product = assemble.assemble(config)
mesh = sharding.make_mesh(1, 1)
size, height, width = config.data.batch_size, *config.data.crop
batch = {
  "image": jax.ShapeDtypeStruct((size, height, width, 3), np.uint8),
  "depth": jax.ShapeDtypeStruct((size, height, width), np.float32),
  "class_id": jax.ShapeDtypeStruct((size,), np.int32),
}
begun = time.process_time()
training.lower_step(config, product, mesh, {name: batch[name] for name in product.keys})
print(f"cpu {time.process_time() - begun:.2f}")
"""


def environment(root: pathlib.Path, python: str) -> dict[str, str]:
  """Of a process that imports the package of `root` and finds nothing compiled."""
  venv = pathlib.Path(python).absolute().parent.parent
  clean = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
  return clean | {"PYTHONPATH": str(root), "VPD_VENV": str(venv), "JAX_PLATFORMS": "cpu"}


def cpu_seconds(pid: int) -> float:
  """Of a process and everything below it, as long as they live."""
  below: dict[int, list[int]] = {}
  ticks: dict[int, int] = {}
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    below.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    ticks[int(stat.parent.name)] = sum(map(int, fields[11:15]))
  family = [pid]
  for member in family:
    family += below.get(member, [])
  return sum(ticks.get(member, 0) for member in family) / os.sysconf("SC_CLK_TCK")


def first_step(root: pathlib.Path, python: str) -> tuple[float, float]:
  """CPU and wall seconds to the line of step 1."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [python, "-m", "vpd_jax.main", "--config=configs/rooms.py:depth,tiny", f"--workdir={workdir}/run"]
    begun = time.monotonic()
    with subprocess.Popen(
      [*command, "--config.log_every=1"], cwd=root, env=environment(root, python), stdout=subprocess.PIPE, text=True
    ) as process:
      assert process.stdout is not None
      for line in process.stdout:
        if line.startswith("step 1/"):
          result = cpu_seconds(process.pid), time.monotonic() - begun
          process.kill()
          return result
  raise SystemExit(f"{root}: no first step")


def trace(root: pathlib.Path, python: str) -> tuple[float, float]:
  """CPU seconds of lowering the full-size step, which stand for wall seconds too: it is one thread."""
  done = subprocess.run(
    [python, "-c", TRACE], cwd=root, env=environment(root, python), capture_output=True, text=True, check=True
  )
  seconds = float(re.search(r"cpu ([\d.]+)", done.stdout)[1])
  return seconds, seconds


def command(root: pathlib.Path, python: str, *words: str) -> tuple[float, float, str]:
  """CPU and wall seconds of a whole command, and what it printed."""
  before, begun = os.times(), time.monotonic()
  done = subprocess.run(words, cwd=root, env=environment(root, python), capture_output=True, text=True, check=False)
  after = os.times()
  seconds = after.children_user - before.children_user + after.children_system - before.children_system
  if done.returncode:
    print(done.stdout[-3000:], done.stderr[-2000:], file=sys.stderr)
    raise SystemExit(f"{root}: {' '.join(words)} exited with {done.returncode}")
  return seconds, time.monotonic() - begun, done.stdout


def clean(root: pathlib.Path) -> None:
  """Removes what runs and tests leave in a checkout."""
  for name in ("runs", ".pytest_cache"):
    shutil.rmtree(root / name, ignore_errors=True)


def show(name: str, ours: tuple[float, float], others: tuple[float, float]) -> None:
  print(
    f"{name:16} CPU {ours[0]:8.1f} s / {others[0]:8.1f} s = {ours[0] / others[0]:.3f}   "
    f"wall {ours[1]:7.1f} s / {others[1]:7.1f} s",
    flush=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("measures", nargs="+", choices=MEASURES)
  parser.add_argument("--other", required=True, type=pathlib.Path, help="another checkout, with which is compared")
  parser.add_argument("--other_python", required=True, help="the Python of its environment")
  parser.add_argument("--python", default=sys.executable, help="the Python of this checkout's environment")
  parser.add_argument("--repeats", type=int, default=1, help="of first_step and trace; the least counts")
  args = parser.parse_args()
  sides = ((HERE, args.python), (args.other.resolve(), str(pathlib.Path(args.other_python).absolute())))
  for measure in args.measures:
    if measure in ("first_step", "trace"):
      run = {"first_step": first_step, "trace": trace}[measure]
      runs = [[run(*side) for side in sides] for _ in range(args.repeats)]
      show(measure, *(min(results) for results in zip(*runs, strict=True)))
      continue
    for root, _ in sides:
      clean(root)
    script = {"tests": "scripts/test.sh", "quickstart": "scripts/quickstart.sh"}[measure]
    results = [command(*side, "bash", script) for side in sides]
    show(measure, *(result[:2] for result in results))
    if measure == "tests":
      again = command(*sides[0], "bash", script)
      show("tests again", again[:2], results[1][:2])
    else:
      for (root, _), (_, _, printed) in zip(sides, results, strict=True):
        print(f"  {root.name}: rmse {re.findall(r'rmse ([0-9.]+)', printed)[-1]}", flush=True)


if __name__ == "__main__":
  main()
