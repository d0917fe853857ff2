"""Loss curves and speed of two runs, and one verdict.

python scripts/compare_runs.py runs/before runs/after
python scripts/compare_runs.py --train="--config=configs/rooms.py:depth,tiny --config.num_steps=40" main HEAD

The two are workdirs, whose metrics.jsonl are read. With --train they are commits: both are checked out beside each
other and trained with those arguments, by turns, --repeats times each, on the devices at hand. Losses are compared at
all steps that both have logged, the speed as the median of perf/step_ms.

The exit code is 0 where the losses agree within --tolerance and the second is not slower than the first beyond the
spread, else 1.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vpd_jax.errors import Parser, UserError, one_line
from vpd_jax.monitoring import writers

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOSS, SPEED = "train/loss", "perf/step_ms"
SHOWN = 8  # steps in the table
REPEATS = 3  # runs of each commit


class Run(NamedTuple):
  """What is compared of a run: losses by step, and milliseconds per step of each report but the first."""

  losses: dict[int, float]
  step_ms: list[float]


def read(workdir: pathlib.Path) -> Run:
  """The curves of a workdir; of a step that was logged again after a restart, the last.

  Raises:
    UserError: no metrics, a line that is not valid JSON, or no loss.
  """
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    raise UserError(f"{workdir} has no metrics.jsonl; give the workdir of a run.")
  losses, speeds = {}, {}
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      entry = json.loads(line)
    except json.JSONDecodeError:
      raise UserError(f"{path}, line {number} is not valid JSON; the run may still be writing.") from None
    if LOSS in entry:
      losses[entry["step"]] = float("nan") if entry[LOSS] is None else float(entry[LOSS])
    if SPEED in entry:
      speeds[entry["step"]] = float(entry[SPEED])
  if not losses:
    raise UserError(f"{path} holds no {LOSS!r}; train a few steps, with config.log_every=1.")
  times = [speeds[step] for step in sorted(speeds)]
  return Run(losses, times[1:] or times)  # the first report holds the warm-up


def joined(runs: Sequence[Run]) -> Run:
  """Repeated runs as one: the losses of the first, all times.

  Raises:
    UserError: the runs of one commit have other losses.
  """
  for other in runs[1:]:
    if other.losses != runs[0].losses:
      raise UserError("two runs of the same commit have different losses; nothing can be compared on this device.")
  return Run(runs[0].losses, [time for run in runs for time in run.step_ms])


def largest_difference(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, int]:
  """The largest |a - b| / max(|a|, |b|) at common steps, infinite where only one is a number, and its step.

  Raises:
    UserError: there is no common step.
  """
  common = sorted(first.keys() & second.keys())
  if not common:
    raise UserError("the two have no logged step in common; compare runs of one config.log_every.")

  def relative(step: int) -> float:
    a, b = first[step], second[step]
    if a == b or (a != a and b != b):
      return 0.0
    value = abs(a - b) / max(abs(a), abs(b))
    return value if value == value else float("inf")

  worst = max(common, key=relative)
  return relative(worst), worst


def verdict(first: Run, second: Run, tolerance: float) -> tuple[str, bool]:
  """The sentence, and whether the second is as good as the first."""
  difference, step = largest_difference(first.losses, second.losses)
  same = difference <= tolerance
  if not difference:
    words = "the losses are equal"
  else:
    words = f"the losses {'agree' if same else 'differ'}: by at most {difference:.1e} of their size, at step {step}"
  slower = False
  if first.step_ms and second.step_ms:
    medians = [statistics.median(run.step_ms) for run in (first, second)]
    ratio, slower = medians[0] / medians[1], min(second.step_ms) > max(first.step_ms)
    if slower or max(second.step_ms) < min(first.step_ms):
      words += f"; the second is {ratio:.2f} times as fast"
    else:
      words += f"; no difference of speed beyond the spread (medians {medians[0]:.1f} and {medians[1]:.1f} ms)"
  else:
    words += "; the speed is not known"
  return words, same and not slower


def table(first: Run, second: Run) -> str:
  """Losses of both at some of the common steps, evenly spread, the last included, and the times."""
  common = sorted(first.losses.keys() & second.losses.keys())
  chosen = {common[round(i * (len(common) - 1) / max(SHOWN - 1, 1))] for i in range(SHOWN)}
  rows = [("", "first", "second")]
  rows += [
    (f"loss at step {step}", f"{first.losses[step]:.6g}", f"{second.losses[step]:.6g}") for step in sorted(chosen)
  ]
  if first.step_ms and second.step_ms:
    times = [f"{statistics.median(t):.1f} ({min(t):.1f} to {max(t):.1f})" for t in (first.step_ms, second.step_ms)]
    rows.append(("ms a step", *times))
  return writers.table(rows)


def trained(commits: Sequence[str], arguments: Sequence[str], repeats: int) -> list[Run]:
  """The runs of two commits, by turns: each in a worktree of its own, which is removed at the end.

  Raises:
    UserError: no such commit, or a run that fails.
  """
  git = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
  runs: list[list[Run]] = [[], []]
  with tempfile.TemporaryDirectory() as folder:
    trees = [pathlib.Path(folder) / name for name in ("first", "second")]
    try:
      for tree, commit in zip(trees, commits, strict=True):
        if (made := git("worktree", "add", "--detach", str(tree), commit)).returncode:
          raise UserError(f"{commit!r} cannot be checked out: {' '.join(made.stderr.split())}.")
      for turn in range(repeats):
        for number, tree in enumerate(trees):
          workdir = tree / f"run_{turn}"
          command = [sys.executable, "-m", "vpd_jax.main", f"--workdir={workdir}", *arguments]
          print(f"{commits[number]}, {turn + 1} of {repeats}", flush=True)
          done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
          if done.returncode:
            raise UserError(f"{commits[number]} ended with code {done.returncode}: {done.stderr.strip()[-400:]}")
          runs[number].append(read(workdir))
    finally:
      for tree in trees:
        git("worktree", "remove", "--force", str(tree))
  return [joined(each) for each in runs]


def main() -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("first", help="workdir, or with --train a commit")
  parser.add_argument("second", help="the same")
  parser.add_argument("--train", default="", help="arguments of vpd_jax.main, in one word; both are commits then")
  parser.add_argument("--repeats", type=int, help=f"with --train: runs of each commit, {REPEATS} by default")
  parser.add_argument("--tolerance", type=float, default=1e-6, help="of the losses, relative")
  options = parser.parse_args()
  try:
    repeats = REPEATS if options.repeats is None else options.repeats
    if options.repeats is not None and not options.train:
      raise UserError("--repeats has no effect without --train; leave it out.")
    if options.train:
      if repeats < 1:
        raise UserError(f"--repeats={repeats} must be at least 1.")
      first, second = trained((options.first, options.second), shlex.split(options.train), repeats)
    else:
      first, second = read(pathlib.Path(options.first)), read(pathlib.Path(options.second))
    sentence, good = verdict(first, second, options.tolerance)
  except UserError as error:
    print(f"compare_runs: {one_line(error)}", file=sys.stderr)
    sys.exit(2)
  print(table(first, second))
  print(f"verdict: {sentence}")
  sys.exit(0 if good else 1)


if __name__ == "__main__":
  main()
