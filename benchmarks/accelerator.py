"""Performance on one accelerator: comparison with PyTorch, images per second of every task, effect of each saving.

python benchmarks/accelerator.py              # all cells missing in benchmarks/accelerator.json
python benchmarks/accelerator.py --only "VPD depth NYU" remat
python benchmarks/accelerator.py --write      # docs/performance.md from that file, without runs
python benchmarks/accelerator.py --tiny --results=tiny.json     # tiny networks, in minutes, also on a CPU

Each cell is a command `scripts/benchmark.py` with random weights and synthetic batches in a separate process, the
most important first. After an interruption the same command continues. Failures, e.g. out of memory, are stored too.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import results_store

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "accelerator.json"
PAGE = ROOT / "docs" / "performance.md"
SCRIPT = "accelerator.py"
NOT_YET = "not yet run"
Result = dict[str, Any]


class Cell(NamedTuple):
  """One command.

  Attributes:
    config: file and words below configs/.
    batch: images on one device.
    flags: besides bfloat16.
    goal: target of images per second on an H200; 0: none.
  """

  config: str
  batch: int
  flags: tuple[str, ...] = ()
  goal: float = 0

  def command(self, tiny: bool, output: pathlib.Path) -> list[str]:
    """The arguments of `python`."""
    words = [
      f"--config=configs/{self.config}",
      "--synthetic",
      "--config.dtype=bfloat16",
      *self.flags,
      f"--json={output}",
    ]
    if tiny:
      words[0] += ",tiny"
      words += ["--steps=2", "--warm_up=1"]
    else:
      words += [f"--batch={self.batch}", "--steps=30"]
    return ["scripts/benchmark.py", *words]


NYU = "nyu_depth.py:vpd"
AGAINST = {"VPD depth NYU": Cell(NYU, 24, ("--forward", "--versus=torch", "--top=10"), goal=110)}
TASKS = AGAINST | {
  "VPD depth NYU, batch 32": Cell(
    "nyu_depth.py:vpd", 32, ("--config.optim.norm_group=0", "--config.optim.loss_group=0")
  ),
  "VPD segmentation ADE20K": Cell("ade20k_seg.py:vpd", 32, goal=120),
  "VPD referring RefCOCO, latents and text states kept": Cell("refcoco_refer.py:refcoco", 32, goal=155),
  "MetaPrompts depth NYU, three passes": Cell("nyu_depth.py:meta_prompts", 24, goal=46),
  "MetaPrompts segmentation ADE20K, three passes": Cell("ade20k_seg.py:meta_prompts", 16, goal=44),
  "MetaPrompts segmentation Cityscapes, three passes": Cell("cityscapes_seg.py:meta_prompts", 4, goal=6.5),
  "IEDP depth NYU": Cell("nyu_depth.py:iedp", 24),
  "MetaPrompts pose COCO": Cell("coco_pose.py:meta_prompts", 64),
}
# Each differs from the first cell in one option.
SAVINGS = {
  "plain attention (`backbone.attention=xla`)": Cell(NYU, 24, ("--config.backbone.attention=xla",)),
  "float32 (`dtype=float32`)": Cell(NYU, 24, ("--config.dtype=float32",)),
  "recomputation (`backbone.remat=True`)": Cell(NYU, 24, ("--config.backbone.remat=True",)),
  "parts of 12 images (`optim.accumulation=2`)": Cell(NYU, 24, ("--config.optim.accumulation=2",)),
  "batch 6": Cell(NYU, 6),
}
CELLS = TASKS | SAVINGS


def measure(name: str, results: pathlib.Path, *, tiny: bool, minutes: float) -> None:
  """Runs the command of a cell, and stores its numbers, or the last line of its error."""
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / "result.json"
    command = [sys.executable, *CELLS[name].command(tiny, output)]
    print(f"== {name}: {' '.join(command[1:-1])}", flush=True)
    try:
      ended = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60 * minutes or None)
      said = ended.stderr.strip().splitlines()
      result = json.loads(output.read_text()) if ended.returncode == 0 else {"failed": said[-1][:200] if said else "?"}
    except subprocess.TimeoutExpired:
      result = {"failed": f"not finished after {minutes:g} minutes"}
  if "failed" in result:
    print(f"failed: {result['failed']}", flush=True)
  results_store.save(results, name, result)


def tables(results: dict[str, Result]) -> str:
  """All tables in Markdown; a cell without result is "not yet run"."""
  parts = [_against(results), _tasks(results), _savings(results), _longest(results)]
  return "\n\n".join(parts)


def _row(*cells: str) -> str:
  return f"| {' | '.join(cells)} |"


def _head(*names: str) -> list[str]:
  return [_row(*names), "|---" * len(names) + "|"]


def _memory(side: Result) -> str:
  return f"{side['peak_bytes'] / 2**30:.1f} GiB" if side.get("peak_bytes") else "-"


def _against(results: dict[str, Result]) -> str:
  lines = _head("device", "work", "ours", "PyTorch", "ratio")
  for name, cell in AGAINST.items():
    result = results.get(name, {})
    if "torch" not in result:
      lines.append(_row("-", f"{name}, batch {cell.batch}", *[result.get("failed", NOT_YET)] * 3))
      continue
    sides = result["ours"], result["torch"]
    words = {"step_ms": "training step", "forward_ms": "forward pass"}
    for key, word in words.items():
      cells = [f"{side[key]:.1f} ms" + (f", {_memory(side)}" if key == "step_ms" else "") for side in sides]
      lines.append(
        _row(sides[0]["device"], f"{name}, batch {sides[0]['batch']}: {word}", *cells, f"{result['ratio'][key]:.2f}")
      )
  return "\n".join(lines)


def _tasks(results: dict[str, Result]) -> str:
  lines = _head("work", "batch", "target on an H200, images/s", "images/s", "share of the peak", "memory")
  for name, cell in TASKS.items():
    wanted, ours = f"{cell.goal:g}" if cell.goal else "-", results.get(name, {}).get("ours")
    if ours is None:
      lines.append(_row(name, str(cell.batch), wanted, results.get(name, {}).get("failed", NOT_YET), "", ""))
      continue
    share = f"{100 * ours['share_of_peak']:.1f} %" if ours["share_of_peak"] is not None else "-"
    lines.append(_row(name, str(ours["batch"]), wanted, f"{ours['images_per_sec_per_chip']:.3g}", share, _memory(ours)))
  return "\n".join(lines)


def _savings(results: dict[str, Result]) -> str:
  first = next(iter(AGAINST))
  lines = _head(f"{first}, batch {AGAINST[first].batch}, but", "images/s", "of the first", "memory")
  base = results.get(first, {}).get("ours")
  for name, result in [("as above", results.get(first, {})), *((n, results.get(n, {})) for n in SAVINGS)]:
    ours = result.get("ours")
    if ours is None:
      lines.append(_row(name, result.get("failed", NOT_YET), "", ""))
      continue
    rate = ours["images_per_sec_per_chip"]
    share = f"{rate / base['images_per_sec_per_chip']:.2f}" if base else "-"
    lines.append(_row(name, f"{rate:.3g}", share, _memory(ours)))
  return "\n".join(lines)


def _longest(results: dict[str, Result]) -> str:
  name = next(iter(AGAINST))
  lines = _head(f"longest operations of {name}", "ms a step", "share of all")
  found = results.get(name, {}).get("ours", {}).get("longest", [])
  for operation in found:
    words = " ".join(filter(None, (operation[key] for key in ("name", "result", "origin"))))
    lines.append(_row(f"`{words}`", f"{operation['milliseconds']:.2f}", f"{100 * operation['share']:.1f} %"))
  return "\n".join(lines if found else [*lines, _row(NOT_YET, "", "")])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", nargs="+", choices=CELLS, metavar="NAME", help="default: all missing ones")
  parser.add_argument("--minutes", type=float, default=10, help="timeout of a cell; 0: none")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="JSON file of the results")
  parser.add_argument("--tiny", action="store_true", help="tiny networks, to test the command; needs --results")
  parser.add_argument("--write", action="store_true", help="only write docs/performance.md")
  options = parser.parse_args()
  if options.tiny and options.results == RESULTS:
    parser.error("results of --tiny do not belong in benchmarks/accelerator.json; give another --results=FILE")
  if options.write:
    PAGE.write_text(results_store.insert(PAGE.read_text(), SCRIPT, tables(results_store.load(options.results))))
    return
  for name in options.only or [name for name in CELLS if name not in results_store.load(options.results)]:
    measure(name, options.results, tiny=options.tiny, minutes=options.minutes)
  print(tables(results_store.load(options.results)))


if __name__ == "__main__":
  main()
