"""The table of docs/rooms.md: all methods of a task, from pretrained weights and from random initialization.

python scripts/rooms_table.py                            # all rows missing in benchmarks/rooms_table.json
python scripts/rooms_table.py --methods vpd --seeds 0    # one run of each start
python scripts/rooms_table.py --write                    # the table from that file, without runs

All runs of a task take the same number of steps, each in a process of its own, below runs/rooms_table. After an
interruption the same command continues. Commands for different --tasks may run at the same time.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

from vpd_jax.errors import Parser, UserError
from vpd_jax.files import atomic

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "rooms_table.json"
LOCK = ROOT / "runs" / "rooms_table" / "lock"
PAGE = ROOT / "docs" / "rooms.md"
BEGIN, END = "<!-- rooms_table.py: begin -->", "<!-- rooms_table.py: end -->"
NAMES = {"vpd": "VPD", "meta_prompts": "MetaPrompts", "iedp": "IEDP", "eco_depth": "EcoDepth", "tadp": "TADP"}
# Initial weights, by size of configs/rooms.py.
STARTS = {"small": "from the weights", "small_scratch": "from random initialization"}
SEEDS = (0, 1, 2)
CALLS = 20  # of the network, of which the fastest is reported
Record = dict[str, Any]


class Rows(NamedTuple):
  """The rows of one task.

  Attributes:
    task: word of configs/rooms.py.
    score: name of the score below eval/<data>/.
    heading: name and unit of the score in the table.
    baselines: trivial predictors below eval/trivial/, and their names in the table.
    data: name of the data set.
    steps: number of training steps of every run.
  """

  task: str
  score: str
  heading: str
  baselines: dict[str, str]
  data: str = "rooms"
  steps: int = 80


TASKS = (
  Rows(
    "depth",
    "rmse",
    "RMSE, m",
    {
      "constant": "best constant depth",
      "position_mean": "mean depth of each position",
      "linear_rgb_position": "linear regression on color and position",
    },
  ),
  Rows(
    "segmentation",
    "mIoU",
    "mIoU",
    {
      "most_frequent": "most frequent class",
      "position_mode": "most frequent class of each position",
      "linear_rgb_position": "linear classifier of color and position",
    },
  ),
  Rows(
    "referring",
    "oIoU",
    "oIoU",
    {"constant_mask": "best constant mask", "everything": "all pixels"},
  ),
  Rows(
    "pose",
    "AP",
    "AP",
    {"mean_pose": "mean pose", "linear_crop": "linear regression on the crop"},
    data="room_figures",
    steps=160,
  ),
)


def config_string(rows: Rows, method: str, start: str) -> str:
  """The value of --config."""
  return f"configs/rooms.py:{rows.task},{method},{start}"


def fields(rows: Rows, seed: int) -> dict[str, Any]:
  """Config fields set by a run."""
  steps = rows.steps
  lengths = {"num_steps": steps, "eval_every": steps, "save_every": steps // 4, "log_every": 10}
  return lengths | {"keep": 1, "keep_best": 0, "seed": seed}


def digest(rows: Rows, method: str, start: str, seed: int) -> str:
  """A hash of the config, by which outdated rows are found."""
  from vpd_jax.config import loader

  config = loader.load(config_string(rows, method, start)).unlock()
  config.update(fields(rows, seed))
  return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def device() -> str:
  """Name of the processor, and number of cores available to this process."""
  found = pathlib.Path("/proc/cpuinfo")
  match = re.search(r"model name\s*: (.*)", found.read_text()) if found.exists() else None
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{match[1].strip() if match else 'CPU'}, {cores} core{'s' if cores != 1 else ''}"


def child(command: list[str], log: pathlib.Path) -> tuple[str, float, float]:
  """Runs a command; returns (its output, seconds, peak GiB of resident memory). Exits if the command fails."""
  log.parent.mkdir(parents=True, exist_ok=True)
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs" / "rooms_table" / "compiled"),
  }
  begin = time.monotonic()
  with log.open("w") as file:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
      _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # the run saves its step and exits
      process.terminate()
      process.wait()
      raise
  process.returncode = os.waitstatus_to_exitcode(status)
  printed = log.read_text()
  if process.returncode:
    sys.exit(f"{' '.join(command)}\nexited with {process.returncode}; the end of {log}:\n{printed[-2000:]}")
  return printed, time.monotonic() - begin, usage.ru_maxrss / 2**20


def train(rows: Rows, method: str, start: str, seed: int) -> Record:
  """Trains and evaluates once; returns the record of the run."""
  config = digest(rows, method, start, seed)
  folder = ROOT / "runs" / "rooms_table" / f"{rows.task}-{method}-{start}-{seed}-{config}"
  command = [sys.executable, "-m", "vpd_jax.main", f"--config={config_string(rows, method, start)}"]
  command += [f"--workdir={folder}"]
  command += [f"--config.{name}={value}" for name, value in fields(rows, seed).items()]
  printed, seconds, peak = child(command, folder / "printed.txt")
  step = re.search(r"compiled;.* ([\d.]+) GiB", printed)
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return {
    "task": rows.task,
    "method": method,
    "start": start,
    "seed": seed,
    "steps": rows.steps,
    "config": config,
    "device": device(),
    "minutes": round(seconds / 60, 2),
    "peak_gib": round(peak, 3),
    "step_gib": float(step[1]) if step else None,
    **read_scores(lines, rows),
  }


def read_scores(lines: list[dict[str, float]], rows: Rows) -> Record:
  """Reads the scores of a finished run from the lines of metrics.jsonl.

  Returns:
    score; trivial, scores of the trivial predictors by name; losses, {name: (mean over the first tenth of the logged
    steps, mean over the last tenth)}.
  """
  last = next(line for line in reversed(lines) if f"eval/{rows.data}/{rows.score}" in line)
  losses = {}
  for name in sorted({name for line in lines for name in line if name.startswith("train/")}):
    values = [line[name] for line in lines if name in line]
    tenth = max(len(values) // 10, 1)
    losses[name] = [round(statistics.fmean(part), 4) for part in (values[:tenth], values[-tenth:])]
  prefix = "eval/trivial/"
  trivial = {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}
  return {"score": last[f"eval/{rows.data}/{rows.score}"], "trivial": trivial, "losses": losses}


def measure(rows: Rows, method: str) -> Record:
  """Parameters, operations and time of the evaluation network on one image of the training crop."""
  import jax
  import numpy as np

  from vpd_jax import experiment
  from vpd_jax.checkpoints import initialize
  from vpd_jax.config import loader
  from vpd_jax.distributed import sharding

  config = loader.load(config_string(rows, method, "small_scratch"))
  exp = experiment.assemble(config, training=False)
  weights, _ = initialize.weights_on_mesh(config, exp, sharding.make_mesh(1, 1), complete=False)
  image = np.random.default_rng(0).integers(0, 256, (1, *config.data.crop, 3), np.uint8)
  tokens = np.zeros((1, config.method.get("token_length", 1)), np.int32)
  batch = {"image": image, "class_id": np.zeros(1, np.int32), "tokens": tokens}
  batch = {name: jax.device_put(batch[name]) for name in ("image", *sorted(exp.method.needs))}
  forward = jax.jit(lambda weights, batch: exp.spec.merge(*weights)(batch, training=False))
  compiled = forward.lower(weights, batch).compile()
  seconds = []
  for _ in range(CALLS):
    begin = time.perf_counter()
    jax.block_until_ready(compiled(weights, batch))
    seconds.append(time.perf_counter() - begin)
  return {
    "task": rows.task,
    "method": method,
    "parameters": sum(shape.size for shape in exp.spec.shapes.values()),
    "gflop": compiled.cost_analysis()["flops"] / 1e9,
    "seconds": min(seconds),
    "crop": list(config.data.crop),
    "batch_size": config.data.batch_size,
    "device": device(),
  }


def load() -> dict[str, list[Record]]:
  """The content of RESULTS."""
  return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": [], "runs": []}


def save(kind: str, record: Record) -> None:
  """Adds a record to RESULTS; replaces that of the same task, method, start and seed."""
  key = lambda r: (r["task"], r["method"], r.get("start", ""), r.get("seed", 0))
  LOCK.parent.mkdir(parents=True, exist_ok=True)
  with LOCK.open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # another command may save rows of other tasks
    results = load()
    results[kind] = sorted([r for r in results[kind] if key(r) != key(record)] + [record], key=key)
    atomic.write_json(RESULTS, results)


def table(results: dict[str, list[Record]], rows: Rows) -> str:
  """The Markdown of one task; a method without a run is "not yet run".

  Raises:
    ValueError: the runs differ in steps, or the networks in the device on which they were timed.
  """
  runs = {m: [r for r in results["runs"] if (r["task"], r["method"]) == (rows.task, m)] for m in NAMES}
  networks = {r["method"]: r for r in results["networks"] if r["task"] == rows.task}
  every = [run for method in NAMES for run in runs[method]]
  alike = {"steps": {r["steps"] for r in every}, "device": {r["device"] for r in networks.values()}}
  if unlike := [f"{name} {sorted(values)}" for name, values in alike.items() if len(values) > 1]:
    raise UserError(f"the rows of {rows.task} differ in {'; '.join(unlike)}: take the others out of {RESULTS.name}.")
  heading = " | ".join(f"{rows.heading}, {words}" for words in STARTS.values())
  lines = [f"| {rows.task} | {heading} | parameters | GFLOP | ms | peak memory |", "|---|---|---|---|---|---|---|"]
  lines += [_row(NAMES[method], runs[method], networks.get(method)) for method in NAMES]
  if not every:
    return "\n".join(lines)
  for name, words in rows.baselines.items():
    lines.append(f"| {words} | {every[0]['trivial'][name]:.3f} | | | | | |")
  first = next(iter(networks.values()))
  seeds = " ".join(map(str, sorted({run["seed"] for run in every})))
  size = " x ".join(map(str, first["crop"]))
  minutes = [run["minutes"] for run in every]
  return "\n".join(
    [
      *lines,
      "",
      f"{every[0]['steps']} steps of {first['batch_size']} images, small network, float32, trained on "
      f"{' and '.join(sorted({run['device'] for run in every}))}; the runs took "
      f"{min(minutes):.0f} to {max(minutes):.0f} minutes, some on shared cores. With several seeds: mean, minimum, and "
      f"maximum. Parameters, operations (XLA's count) and milliseconds (fastest of {CALLS}, {first['device']}) are of "
      f"the bare network on one image of {size}; memory is the peak of the training process, followed by XLA's count "
      f"for one step. `python scripts/rooms_table.py --tasks {rows.task} --seeds {seeds}`, then `--write`.",
    ]
  )


def _row(name: str, runs: list[Record], network: Record | None) -> str:
  """One method's line."""
  if not runs or network is None:
    return f"| {name} | not yet run | not yet run | | | | |"
  scores = " | ".join(_scores([run["score"] for run in runs if run["start"] == start]) for start in STARTS)
  peak, step = (max(run[field] for run in runs) for field in ("peak_gib", "step_gib"))
  return (
    f"| {name} | {scores} | {network['parameters'] / 1e6:.1f} M | "
    f"{network['gflop']:.1f} | {1e3 * network['seconds']:.0f} | {peak:.1f} GiB, step {step:.1f} |"
  )


def _scores(scores: list[float]) -> str:
  """Mean and range of the seeds."""
  if not scores:
    return "not yet run"
  spread = f" ({min(scores):.3f} to {max(scores):.3f}, {len(scores)} seeds)" if len(scores) > 1 else " (1 seed)"
  return f"{statistics.fmean(scores):.3f}{spread}"


def write(readme: str, results: dict[str, list[Record]], tasks: tuple[Rows, ...] = TASKS) -> str:
  """Replaces the tables between the two markers of the page.

  Raises:
    ValueError: not exactly one of each marker, in this order; rows that do not fit in one table.
  """
  before, begin, rest = readme.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not (begin and end) or readme.count(BEGIN) + readme.count(END) != 2:
    raise UserError(f"{PAGE.name} must hold {BEGIN!r} and behind it {END!r}, once each.")
  return "\n".join([before + begin, "\n\n".join(table(results, rows) for rows in tasks), end + after])


def stale(results: dict[str, list[Record]]) -> list[str]:
  """Stored runs of an outdated config."""
  known = {rows.task: rows for rows in TASKS}
  return [
    f"{r['task']} {r['method']} {r['start']} {r['seed']}"
    for r in results["runs"]
    if r["task"] in known and r["config"] != digest(known[r["task"]], r["method"], r["start"], r["seed"])
  ]


def main() -> None:
  parser = Parser(description="Train every method on the embedded rooms, and write the table of docs/rooms.md.")
  parser.add_argument("--tasks", nargs="+", choices=[rows.task for rows in TASKS], help="default: all")
  parser.add_argument("--methods", nargs="+", choices=NAMES, help="default: all")
  parser.add_argument("--starts", nargs="+", choices=STARTS, help="default: both")
  parser.add_argument("--seeds", nargs="+", type=int, help=f"default: {' '.join(map(str, SEEDS))}")
  parser.add_argument("--again", action="store_true", help="repeat stored rows")
  parser.add_argument("--write", action="store_true", help="only write the page from the stored rows")
  parser.add_argument("--measure", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)  # for child processes
  options = parser.parse_args()
  runs = ("tasks", "methods", "starts", "seeds", "again")
  if options.write and (given := [f"--{name}" for name in runs if getattr(options, name)]):
    parser.error(f"{', '.join(given)} choose runs, and --write starts none; leave one or the other out")
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  known = {rows.task: rows for rows in TASKS}
  if options.measure:
    print(json.dumps(measure(known[options.measure[0]], options.measure[1])))
    return
  if options.write:
    if old := stale(load()):
      print(f"outdated config: {', '.join(old)}; --again repeats them")
    atomic.write(PAGE, write(PAGE.read_text(), load()))
    return
  for rows in (known[task] for task in options.tasks or known):
    for method in options.methods or NAMES:
      there = {(r["task"], r["method"], r.get("start"), r.get("seed")) for kind in load().values() for r in kind}
      if options.again or (rows.task, method, None, None) not in there:
        log = ROOT / "runs" / "rooms_table" / f"measured-{rows.task}-{method}.txt"
        command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--measure", rows.task, method]
        save("networks", json.loads(child(command, log)[0].splitlines()[-1]))
      for seed, start in itertools.product(options.seeds or SEEDS, options.starts or STARTS):
        if options.again or (rows.task, method, start, seed) not in there:
          record = train(rows, method, start, seed)
          save("runs", record)
          found = f"{rows.score} {record['score']:.4f}, {record['minutes']} minutes"
          print(f"{rows.task} {method} {start} seed {seed}: {found}")


if __name__ == "__main__":
  main()
