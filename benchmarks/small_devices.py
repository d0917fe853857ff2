"""What small moments and LoRA cost in quality on the rooms: the second table of docs/small_devices.md.

python benchmarks/small_devices.py                   # all runs missing in benchmarks/small_devices.json
python benchmarks/small_devices.py --seeds 0         # those of one seed
python benchmarks/small_devices.py --write           # the table from that file, without runs

Every run is `configs/rooms.py:depth,tiny` for the same number of steps. Small moments begin with random weights, as
float32 does beside them. LoRA is for a network that knows something: its runs, and the full training beside them, begin
with the weights of one first run of the same length. After an interruption the same command continues.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

import results_store

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "small_devices.json"
PAGE = ROOT / "docs" / "small_devices.md"
SCRIPT = "small_devices.py"
RUNS = ROOT / "runs" / "small_devices"
STEPS = 120
SEEDS = (0, 1, 2)
FIRST = "first run"
FULL = "every array, moments in float32"
SETTINGS: dict[str, dict[str, dict[str, object]]] = {
  "random weights": {
    FULL: {},
    "every array, moments in bfloat16": {"optim.moments": "bfloat16"},
    "every array, moments in int8": {"optim.moments": "int8"},
  },
  FIRST: {
    FULL: {},
    "LoRA of rank 4": {"lora.rank": 4},
    "LoRA of rank 16": {"lora.rank": 16},
  },
}


def run(name: str, fields: dict[str, object]) -> float:
  """Trains in a process of its own; returns the RMSE of the evaluation at its end, meters."""
  folder = RUNS / name.replace(" ", "_").replace("/", "-").replace(",", "")
  lengths = {"num_steps": STEPS, "eval_every": STEPS, "save_every": STEPS, "log_every": 20, "keep": 1, "keep_best": 0}
  command = [sys.executable, "-m", "vpd_jax.main", "--config=configs/rooms.py:depth,tiny", f"--workdir={folder}"]
  command += [f"--config.{field}={value}" for field, value in (lengths | {"eval.baselines": 0} | fields).items()]
  environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(RUNS / "compiled"), **os.environ}
  subprocess.run(command, cwd=ROOT, env=environment, check=True)
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return next(line["eval/rooms/rmse"] for line in reversed(lines) if "eval/rooms/rmse" in line)


def table(results: dict[str, float]) -> str:
  """Mean, minimum and maximum of each setting, in Markdown; a setting without a run is "not yet run"."""
  lines = ["| starts from | trains | RMSE, m: mean | min | max | seeds |", "|---" * 6 + "|"]
  for begin, settings in SETTINGS.items():
    for words in settings:
      found = [x for name, x in results.items() if name.rpartition("/")[0] == f"{begin}/{words}"]
      numbers = [f"{f(found):.3f}" for f in (statistics.fmean, min, max)] if found else ["not yet run", "", ""]
      lines.append(f"| {begin} | {words} | {' | '.join(numbers)} | {len(found)} |")
  first = f" and reaches {results[FIRST]:.3f} m" if FIRST in results else ""
  words = f"{STEPS} steps of 6 images each. The first run (seed 100) has the same length{first}."
  return "\n".join([*lines, "", words])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
  parser.add_argument("--write", action="store_true", help="only write the table")
  options = parser.parse_args()
  if options.write:
    PAGE.write_text(results_store.insert(PAGE.read_text(), SCRIPT, table(results_store.load(RESULTS))))
    return
  jobs = {FIRST: {"seed": 100}}
  for seed in options.seeds:
    for begin, settings in SETTINGS.items():
      start = {"init.run": RUNS / FIRST.replace(" ", "_")} if begin == FIRST else {}
      jobs |= {f"{begin}/{words}/{seed}": {"seed": seed} | start | fields for words, fields in settings.items()}
  for name, fields in jobs.items():
    if name not in results_store.load(RESULTS):
      results_store.save(RESULTS, name, run(name, fields))


if __name__ == "__main__":
  main()
