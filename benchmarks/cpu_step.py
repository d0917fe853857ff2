"""Time and memory of VPD's step on NYU Depth v2 at full size, 480 x 480, one image, on the CPU, in two checkouts.

git worktree add ../before 880ccdc
python benchmarks/cpu_step.py --other=../before --other_python=../before/.venv/bin/python --rounds=3

Every side is scripts/benchmark.py in a process of its own, by turns; up to 25 GB of memory and minutes each. Printed of
each: the least of the medians of a step's milliseconds, and the most that a process held (compiling included), also as
shares of the other checkout's.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent.parent
COMMON = (
  "--config=configs/nyu_depth.py:vpd",
  "--batch=1",
  "--config.optim.norm_group=1",
  "--config.optim.loss_group=1",
)
LORA = ("--config.lora.rank=16",)
HALF = ("--config.frozen_dtype=bfloat16",)
REMAT = ("--config.backbone.remat=True",)
SIDES = {
  "before": (),
  "every array": (),
  "every array, moments in int8, remat": ("--config.optim.moments=int8", *REMAT),
  "LoRA": LORA,
  "LoRA, frozen in bfloat16": (*LORA, *HALF),
  "LoRA, frozen in bfloat16, remat minimal": (*LORA, *HALF, *REMAT, "--config.backbone.remat_policy=minimal"),
  "LoRA, frozen in bfloat16, remat": (*LORA, *HALF, *REMAT),
}


def measured(root: pathlib.Path, python: str, flags: tuple[str, ...], steps: int) -> tuple[float, float]:
  """(median milliseconds of a step, peak GiB of resident memory)."""
  noise = "--synthetic" if '"synthetic"' in (root / "scripts" / "benchmark.py").read_text() else "--made_up"
  environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
  with tempfile.TemporaryDirectory() as folder:
    words = [noise, f"--steps={steps}", "--warm_up=1", f"--json={folder}/result.json", *COMMON, *flags]
    process = subprocess.Popen([python, "scripts/benchmark.py", *words], cwd=root, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
      sys.exit(process.returncode)
    result = json.loads(pathlib.Path(folder, "result.json").read_text())["ours"]
  return result["step_ms"], usage.ru_maxrss / 2**20


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--other", required=True, type=pathlib.Path, help="another checkout, with which is compared")
  parser.add_argument("--other_python", required=True, help="the Python of its environment")
  parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES), help="beside 'before'; default: all")
  parser.add_argument("--rounds", type=int, default=1)
  parser.add_argument("--steps", type=int, default=2)
  args = parser.parse_args()
  other = (args.other.resolve(), str(pathlib.Path(args.other_python).absolute()))
  found: dict[str, list[tuple[float, float]]] = {}
  for _ in range(args.rounds):
    for name in dict.fromkeys(("before", *args.only)):
      root, python = other if name == "before" else (HERE, sys.executable)
      found.setdefault(name, []).append(measured(root, python, SIDES[name], args.steps))
  base = [min(numbers) for numbers in zip(*found["before"], strict=True)]
  for name, runs in found.items():
    time, memory = (min(numbers) for numbers in zip(*runs, strict=True))
    print(f"{name:40} {time:9.0f} ms {time / base[0]:.2f}   {memory:6.2f} GiB {memory / base[1]:.2f}", flush=True)


if __name__ == "__main__":
  main()
