"""Formats the reports of --mode=plan for the terminal."""

from collections.abc import Callable

from ml_collections import ConfigDict

from vpd_jax.config import loader
from vpd_jax.errors import UserError
from vpd_jax.monitoring import writers
from vpd_jax.planning import search
from vpd_jax.types import Fields


def amount(count: float) -> str:
  """Formats a number of bytes."""
  power = next((p for p in (30, 20) if count >= 2**p / 10), 10)
  return f"{count / 2**power:.2f} {({30: 'GiB', 20: 'MiB', 10: 'KiB'})[power]}"


def in_short(report: search.Report) -> str:
  """Peak memory and whether it fits, in one phrase."""
  peak = "more than available" if report.get("peak") is None else amount(report["peak"])
  verdict = {True: "fits", False: "does not fit", None: "no limit known"}[report["fits"]]
  parts = [f"{peak} of {amount(report['limit'])}" if report["limit"] else peak, verdict]
  if report.get("optimal_seconds", 0) > 0:
    parts.append(f"{1e3 * report['optimal_seconds']:.0f} ms a step")
  return ", ".join(parts)


def describe_states(config: ConfigDict, levels: list[Fields], state: Callable[[ConfigDict], dict[str, int]]) -> str:
  """Memory of state and gradients on a device with each of these settings, as a table."""
  rows = [("before the first activation", "")]
  for fields in levels:
    try:
      parts = state(loader.changed(config, fields))
    except UserError:
      continue  # the method has no layers for LoRA
    settings = ", ".join(f"{name}={x}" for name, x in search.changed_fields(config, fields).items()) or "unchanged"
    rows.append((f"  {settings}", amount(sum(parts.values()) + parts["params"])))
  return writers.table(rows)


def describe(report: search.Report) -> str:
  """A report as a table."""
  where = report["topology"] or "local devices"
  mesh = report["mesh"]
  bound = {"low": ", at low compiler effort", "untimed": ", kernels chosen without timing them"}
  rows = [
    (
      f"{report['step']} step",
      f"{where}: {report['devices']} x {report['kind']}, mesh {mesh['data']} x {mesh['fsdp']}",
    ),
    (
      "images",
      f"{report['batch']} in all, {report['batch'] / report['devices']:g} a device, accumulation "
      f"{report['accumulation']}, {report['dtype']}, attention {report['attention']}, remat {report['remat']}",
    ),
    ("on one device", ""),
  ]
  names = {"params": "parameters", "frozen": "frozen", "stats": "statistics", "opt_state": "optimizer state"}
  names["ema"] = "moving average"
  rows += [(f"  {names[part]}", amount(value)) for part, value in report["state"].items() if value]
  rows += [("  encoders ahead of it", amount(report["encoders"]))] if report["encoders"] else []
  rows += [("  activations, gradients", amount(report["temporaries"]))] if "temporaries" in report else []
  rows += [("  peak", in_short(report) + bound.get(report["effort"], ""))]
  if "flops" in report:
    rows += [("  operations", f"{report['flops'] / 1e12:.3f} TFLOP a step")]
  if "bytes_accessed" in report:
    rows += [("  memory traffic", f"{report['bytes_accessed'] / 1e9:.1f} GB a step")]
  rows += [] if "collectives" in report or "temporaries" not in report else [("  collectives", "not reported")]
  for kind, (number, size) in sorted(report.get("collectives", {}).items()):
    rows += [(f"  {kind}", f"{number}, {size / 1e6:.1f} MB")]
  if "optimal_seconds" in report:
    rows += [("  compiler's estimate", f"{1e3 * report['optimal_seconds']:.1f} ms a step")]
  rows += [
    ("compiled in", f"{report['compile_seconds']} s, traced in {report['trace_seconds']} s; {report['compiler']}")
  ]
  return writers.table(rows)
