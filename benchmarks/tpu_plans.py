"""The tables of docs/tpu.md and docs/small_devices.md: ahead-of-time compilation of whole networks for TPUs.

python benchmarks/tpu_plans.py              # all cells missing in benchmarks/tpu_plans.json
python benchmarks/tpu_plans.py --only vpd/v5e:2x4 vpd/v6e:8x8
python benchmarks/tpu_plans.py --write      # both pages from that file, without compilation

Each cell is the command `--mode=plan` in a separate process. After an interruption the same command continues.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import results_store

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "tpu_plans.json"
PAGE = ROOT / "docs" / "tpu.md"
SMALL_PAGE = ROOT / "docs" / "small_devices.md"
SCRIPT = "tpu_plans.py"
CONFIGS = {
  "vpd": ("VPD depth NYU", "configs/nyu_depth.py:vpd"),
  "meta_prompts": ("MetaPrompts depth NYU", "configs/nyu_depth.py:meta_prompts"),
  "iedp": ("IEDP depth NYU", "configs/nyu_depth.py:iedp"),
  "ade20k": ("MetaPrompts ADE20K", "configs/ade20k_seg.py:meta_prompts"),
  "cityscapes": ("MetaPrompts Cityscapes", "configs/cityscapes_seg.py:meta_prompts"),
}
Report = dict[str, Any]


class Cell(NamedTuple):
  """One command.

  Attributes:
    config: key of CONFIGS.
    slice: of TPUs.
    flags: besides bfloat16.
    effort: of the compiler.
    copies: of the weights, if part of the name.
    trains: what, if part of the name.
  """

  config: str
  slice: str
  flags: tuple[str, ...] = ()
  effort: str = "low"
  copies: int = 0
  trains: str = ""

  @property
  def name(self) -> str:
    parts = [self.effort] * (self.effort != "low") + [f"{self.copies} copies"] * bool(self.copies)
    return "/".join([self.config, self.slice, *parts, *([self.trains] if self.trains else [])])

  @property
  def command(self) -> list[str]:
    words = [f"--topology={self.slice}", f"--config={CONFIGS[self.config][1]}", "--config.dtype=bfloat16", *self.flags]
    return ["-m", "vpd_jax.main", "--mode=plan", *words, *([f"--effort={self.effort}"] if self.effort != "low" else [])]


def split(devices: int) -> str:
  return f"--config.mesh.fsdp={devices}"


# The published batch of all chips together: 24, 8 and 8. 256 chips take 3 images each, as 8 do of 24.
PLANS = (
  *(Cell("vpd", name, (split(n),)) for name, n in {"v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x4": 8}.items()),
  *(Cell("ade20k", name, (split(n),)) for name, n in {"v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x4": 8}.items()),
  *(Cell("cityscapes", name, (split(n),)) for name, n in {"v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x4": 8}.items()),
  Cell("vpd", "v5e:16x16", (split(8), "--config.data.batch_size=768", "--config.eval.batch_size=256")),
  Cell("vpd", "v5e:2x4", (split(8),), "default"),
)
# At 3 images a chip. Where all chips share one copy of the weights the partitioner makes loops, whose body the compiler
# counts once; so there are two copies on 8 chips.
SCALING = (
  Cell("vpd", "v6e:1x1", ("--config.data.batch_size=3", "--config.eval.batch_size=1")),
  Cell("vpd", "v6e:2x4", (split(4),), copies=2),
  Cell("vpd", "v6e:8x8", (split(8), "--config.data.batch_size=192", "--config.eval.batch_size=64")),
  Cell("vpd", "v6e:16x16", (split(8), "--config.data.batch_size=768", "--config.eval.batch_size=256")),
)
# One chip, the published batch in parts of one image.
LORA = ("--config.lora.rank=16", "--config.frozen_dtype=bfloat16")
WAYS = {"LoRA, frozen in bfloat16": LORA, "every array, moments in int8": ("--config.optim.moments=int8",)}
PARTS = {**dict.fromkeys(("vpd", "meta_prompts", "iedp"), 24), "ade20k": 8}
REMAT_TEXTS = {False: [], "minimal": ["remat, policy minimal"], "full": ["remat"]}
ONE_IMAGE = ("--config.backbone.remat=True", "--config.optim.norm_group=1", "--config.optim.loss_group=1")
BEFORE = 26.52  # GiB for VPD in parts of one image before there were these settings, commit 880ccdc, otherwise the same
SMALL = tuple(
  Cell(config, "v5e:1x1", (*ONE_IMAGE, f"--config.optim.accumulation={parts}", *flags), trains=words)
  for words, flags in WAYS.items()
  for config, parts in PARTS.items()
)
CELLS = {cell.name: cell for cell in (*PLANS, *SCALING, *SMALL)}


def measure(cell: Cell, minutes: float) -> None:
  """Runs the command, and stores its reports; after a timeout, those that are finished."""
  folder = ROOT / "runs" / "tpu_plans" / re.sub(r"\W+", "_", cell.name)
  command = [sys.executable, *cell.command, f"--workdir={folder}"]
  try:
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=60 * minutes or None)
    if ended.returncode:
      sys.exit(ended.returncode)
    finished = True
  except subprocess.TimeoutExpired:
    finished = False
  path = folder / "plan.json"
  reports = list(json.loads(path.read_text()).values()) if path.exists() else []
  if not finished:
    reports.append({"unfinished_minutes": minutes})
  results_store.save(RESULTS, cell.name, reports)


def tables(results: dict[str, list[Report]]) -> str:
  """Both tables in Markdown; a cell without reports is "not yet run"."""
  head = "| config, images of all chips | slice | settings | state per chip | peak of available memory | {} |"
  rest = "operations | collectives | compiler's estimate | compile time, libtpu version"
  lines = [head.format(rest), "|---" * 9 + "|"]
  for cell in PLANS:
    lines += _rows(cell, results.get(cell.name, []))
  steps = [_train(results.get(cell.name, [])) for cell in SCALING]
  lines += [
    "",
    "| chips (v6e) | images | mesh | operations per chip | relative to 1 chip | collectives per chip |",
    "|---" * 6 + "|",
  ]
  one = steps[0]["flops"] if steps[0] else None
  for cell, step in zip(SCALING, steps, strict=True):
    if not step or "flops" not in step:
      lines.append(f"| {cell.slice} | | | not yet run | | |")
      continue
    share = f"{100 * step['flops'] / one:.1f} %" if one else "-"
    mesh = f"{step['mesh']['data']} x {step['mesh']['fsdp']}"
    words = f"{step['devices']} | {step['batch']} | {mesh} | {step['flops'] / 1e12:.3f} TFLOP | {share}"
    lines.append(f"| {words} | {_collectives(step)} |")
  return "\n".join(lines)


def small_table(results: dict[str, list[Report]]) -> str:
  """What fits one chip, in Markdown."""
  lines = [
    "| config, images in parts of one | trains | training | relative to 880ccdc | evaluation | compiled in |",
    "|---" * 6 + "|",
  ]
  for cell in SMALL:
    reports = results.get(cell.name, [])
    train, told = _train(reports), next((r for r in reports if r.get("step") == "eval"), {})
    share = f"{train['peak'] / 2**30 / BEFORE:.2f}" if cell.config == "vpd" and train.get("peak") else ""
    seconds = " and ".join(f"{report['compile_seconds']:.0f}" for report in (train, told) if report)
    cells = [f"{CONFIGS[cell.config][0]}, {PARTS[cell.config]}", cell.trains, _fit(train), share, _fit(told)]
    lines.append(f"| {' | '.join([*cells, f'{seconds} s' if seconds else ''])} |")
  return "\n".join(lines)


def _fit(report: Report) -> str:
  """Peak and verdict."""
  if not report:
    return "not yet compiled"
  peak = "more than there is" if report.get("peak") is None else f"{report['peak'] / 2**30:.2f} GiB"
  return f"{peak}, {'fits' if report['fits'] else '**does not fit**'}"


def _train(reports: list[Report]) -> Report:
  """The first report on a training step; empty where there is none."""
  return next((r for r in reports if r.get("step") == "train"), {})


def _rows(cell: Cell, reports: list[Report]) -> list[str]:
  """A line for each compilation of a cell."""
  title = CONFIGS[cell.config][0]
  at = cell.slice + (f", {cell.effort} effort" if cell.effort != "low" else "")
  if not reports:
    return [f"| {title} | {at} | | | not yet run | | | | |"]
  return [_row(title, at, report) for report in reports]


def _row(title: str, at: str, report: Report) -> str:
  if "unfinished_minutes" in report:
    return f"| {title} | {at} | | | not finished after {report['unfinished_minutes']:g} minutes | | | | |"
  gib = lambda value: f"{value / 2**30:.2f}"
  peak = "?" if report.get("peak") is None else gib(report["peak"])
  settings = [f"{report['mesh']['data']} x {report['mesh']['fsdp']}"] + REMAT_TEXTS[report["remat"]]
  settings += [f"accumulation {report['accumulation']}"] * (report["accumulation"] > 1)
  cells = [
    f"{title}, {report['step']}, {report['batch']}",
    at,
    ", ".join(settings),
    gib(sum(report["state"].values())) + " GiB",
    f"{peak} of {gib(report['limit'])} GiB, {'fits' if report['fits'] else '**does not fit**'}",
    f"{report['flops'] / 1e12:.2f} TFLOP" if "flops" in report else "",
    _collectives(report),
    f"{1e3 * report['optimal_seconds']:.0f} ms" if report.get("optimal_seconds", 0) > 0 else "",
    f"{report['compile_seconds']:.0f} s, {report.get('compiler', '-').removeprefix('libtpu ')}",
  ]
  return f"| {' | '.join(cells)} |"


def _collectives(report: Report) -> str:
  found = sorted(report.get("collectives", {}).items(), key=lambda item: -item[1][1])
  if not found:
    return "none" if "collectives" in report else "not reported" if "flops" in report else ""
  kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, (_, size) in found)
  return f"{sum(size for _, (_, size) in found) / 1e9:.2f} GB: {kinds}"


def main() -> None:
  parser = argparse.ArgumentParser(description="Ahead-of-time compilation of training for TPU topologies.")
  parser.add_argument("--only", nargs="+", choices=CELLS, help="default: all missing ones")
  parser.add_argument("--minutes", type=float, default=0, help="timeout of a cell; 0: none")
  parser.add_argument("--write", action="store_true", help="only write the pages")
  options = parser.parse_args()
  if options.write:
    for page, made in ((PAGE, tables), (SMALL_PAGE, small_table)):
      page.write_text(results_store.insert(page.read_text(), SCRIPT, made(results_store.load(RESULTS))))
    return
  for name in options.only or [name for name in CELLS if name not in results_store.load(RESULTS)]:
    measure(CELLS[name], options.minutes)


if __name__ == "__main__":
  main()
