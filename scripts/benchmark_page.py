"""A dated page of one measurement: benchmarks/results/<work>_<device>_<date>.md, written by `benchmark.py --report`."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from vpd_jax.errors import UserError
from vpd_jax.files import atomic

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "GLIBC_TUNABLES")


def check_work(work: str) -> None:
  """Raises UserError for a name that is no part of a file name."""
  if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", work):
    raise UserError(f"--report={work!r} must be a name of letters, digits, '-' and '_', like nyu_depth_vpd.")


def commit() -> str:
  """The commit of the checkout, and whether files differ from it; "unknown" outside of one."""
  git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
  revision = git("rev-parse", "HEAD")
  if revision.returncode:
    return "unknown"
  changed = git("status", "--porcelain", "--untracked-files=no").stdout.split("\n")[:-1]
  return revision.stdout.strip() + (f", {len(changed)} files changed since" if changed else "")


def surroundings() -> dict[str, str]:
  """What else a speed depends on: commit, versions, machine and the load of others at the start."""
  versions = [f"python {platform.python_version()}"]
  for package in PACKAGES:
    try:
      versions.append(f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
  return {
    "commit": commit(),
    "versions": ", ".join(versions),
    "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, load {load} before the run",
  }


def page(
  work: str,
  results: Mapping[str, Any],
  command: Sequence[str],
  around: Mapping[str, str],
  date: datetime.date,
  lines: str,
) -> str:
  """The text of a page.

  Args:
    work: what is measured, in a word.
    results: of `benchmark.with_rates`, by side; "ours" is one.
    command: the arguments, the script first.
    around: of `surroundings`.
    date: of the run.
    lines: what the script printed.
  """
  ours = results["ours"]
  gib = lambda value: "not reported" if value is None else f"{value / 2**30:.2f} GiB"
  share = "peak not known" if ours["share_of_peak"] is None else f"{100 * ours['share_of_peak']:.1f} %"
  variables = "".join(f"{name}={shlex.quote(os.environ[name])} " for name in VARIABLES if name in os.environ)
  rows = {
    "device": f"{ours['devices']} x {ours['device']}, mesh {dict(ours['mesh'])}",
    "step": f"{ours['step_ms']:.1f} ms median, {ours['step_ms_p95']:.1f} ms p95, "
    f"{min(ours['step_times_ms']):.1f} to {max(ours['step_times_ms']):.1f} ms of {len(ours['step_times_ms'])} steps",
    "throughput": f"{ours['images_per_sec_per_chip']:.3g} images per second and chip, batch {ours['batch']}",
    "work": f"{ours['model_tflop_per_image']:.3g} TFLOP an image, "
    f"{ours['model_tflops_per_sec_per_chip']:.3g} TFLOP per second and chip",
    "share of peak": share,
    "memory": f"{gib(ours['peak_bytes'])} at the peak on a device, {gib(ours['compiler_peak_bytes'])} by the "
    f"compiler's account, {gib(ours['resident_bytes'])} of the process",
    "compilation": f"{ours['compile_s']:.1f} s",
    **around,
  }
  table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
  return f"""# {work}, {date.isoformat()}

```
{variables}python {shlex.join(command)}
```

| | |
|---|---|
{table}

```
{lines}
```

Step times in milliseconds, in order:

```json
{atomic.to_json({"step_times_ms": [round(time, 3) for time in ours["step_times_ms"]]})}
```
"""


def write(
  work: str,
  results: Mapping[str, Any],
  command: Sequence[str],
  around: Mapping[str, str],
  lines: str,
  *,
  folder: pathlib.Path = FOLDER,
  date: datetime.date | None = None,
) -> pathlib.Path:
  """Writes the page, beside an earlier one of the same day, and returns its path."""
  date = date or datetime.date.today()
  device = re.sub(r"\W+", "-", results["ours"]["device"].lower()).strip("-")
  stem = f"{work}_{device}_{date.isoformat()}"
  names = (f"{stem}.md" if number == 1 else f"{stem}_{number}.md" for number in range(1, 1000))
  path = next(folder / name for name in names if not (folder / name).exists())
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write(path, page(work, results, command, around, date, lines))
  return path
