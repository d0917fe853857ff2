"""Weights of any known kind -> our directory, or back into the authors' names.

python scripts/convert_checkpoint.py --config=configs/nyu_depth.py --source=v1-5-pruned-emaonly.safetensors --output=DIR
python scripts/convert_checkpoint.py --config=configs/nyu_depth.py --source=DIR_OR_WORKDIR --output=vpd.pth --reverse

Forward: writes DIR with the arrays (orbax) and manifest.json, to be given as --config.init.pretrained; with --lora, a
file of diffusers or kohya is merged into the UNet.
Reverse: writes a .pth or .safetensors that the authors' code loads strictly. The source is a converted directory, a
workdir of a run (its newest checkpoint, or --step, LoRA merged), or any checkpoint that fills the whole model. With
--only_lora, the LoRA of a workdir alone, under the names of diffusers' pytorch_lora_weights.safetensors.
"""

import argparse
import pathlib

from vpd_jax.monitoring import progress

if __name__ == "__main__":
  progress.begin("convert_checkpoint")  # before imports that take seconds

from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.checkpoints import checkpointer, initialize
from vpd_jax.config import loader, stored
from vpd_jax.convert import fetch, finite, load, lora_files
from vpd_jax.convert.formats import weight_files, write
from vpd_jax.convert.tables import released
from vpd_jax.errors import Parser, UserError, one_line
from vpd_jax.files import reading


def parse() -> argparse.Namespace:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="config file, e.g. configs/nyu_depth.py:tiny")
  parser.add_argument("--source", required=True, help="what to convert")
  parser.add_argument("--output", required=True, help="directory to write; with --reverse a .pth or .safetensors file")
  parser.add_argument("--reverse", action="store_true", help="back to the authors' names")
  parser.add_argument("--manifest", help="JSON list of {name, shape, dtype} to export by; default: that of the release")
  parser.add_argument("--lora", default="", help="file of LoRA to merge into the UNet, not with --reverse")
  parser.add_argument("--only_lora", action="store_true", help="with --reverse: the LoRA of a workdir, not merged")
  parser.add_argument("--version", default="", help="of the release to write for, such as v2 of EcoDepth")
  parser.add_argument("--step", type=int, help="checkpoint of a workdir to export; default: the newest")
  return parser.parse_args()


def check(args: argparse.Namespace) -> None:
  """Raises ValueError for flags that would have no effect."""
  if (args.lora and args.reverse) or (args.only_lora and not args.reverse):
    raise UserError("--lora merges a file when converting to ours, --only_lora writes one with --reverse.")
  given = [f"--{name}" for name in ("manifest", "version", "step") if getattr(args, name) not in (None, "")]
  if given and not args.reverse:
    raise UserError(f"{', '.join(given)}: no effect without --reverse; leave this out.")
  if args.only_lora and (unused := [flag for flag in given if flag != "--step"]):
    raise UserError(f"{', '.join(unused)}: no effect with --only_lora; leave this out.")
  if args.step is not None and not checkpointer.is_workdir(args.source):
    raise UserError(
      f"--step={args.step} is of a workdir of a run, which --source={args.source!r} is not; leave it out."
    )


def forward(args: argparse.Namespace) -> None:
  if checkpointer.is_workdir(args.source):
    raise UserError(
      f"--source={args.source!r} is the workdir of a run, which needs no conversion: give it as --workdir or "
      "--config.init.run, or export it with --reverse."
    )
  load.check_output(args.output)  # before minutes of work
  with progress.phase("assemble"):
    config = initialize.with_backbone_sizes(loader.load(args.config), args.source)
    shapes = experiment.model_shapes(config)
  with progress.phase("convert"):
    named, report = load.load_pretrained(args.source, shapes)
    named, line = lora_files.merged(named, args.lora, config.backbone.unet) if args.lora else (named, "")
  progress.write(report.summary())
  if line:
    progress.write(line)
  with progress.phase("write"):
    files = load.source_files(args.source)
    files |= {f"LoRA {pathlib.Path(args.lora).name}": weight_files.sha256(fetch.local(args.lora))} if args.lora else {}
    load.save(args.output, named, report, files)


def reverse(args: argparse.Namespace) -> None:
  write.check_name(args.output)
  config = initialize.with_backbone_sizes(loader.load(args.config), args.source)
  release = released.of(config.method.name, config.task.name, args.version)
  table = released.TABLES[release]()
  with progress.phase("assemble"):
    shapes = released.inside(experiment.model_shapes(config), table)
  with progress.phase("read"):
    named, step = read(args, shapes, config)
  named = released.inside(named, table)
  if args.manifest:
    entries = read_manifest(args.manifest)
  else:
    entries = released.manifest(shapes, table)
  exported = released.state_dict(named, table, entries, step)
  with progress.phase("write"):
    write.write(args.output, exported, wrapper=released.WRAPPERS.get(release, "model"))


def only_lora(args: argparse.Namespace) -> None:
  """Writes A and B of a workdir."""
  write.check_name(args.output)
  if not checkpointer.is_workdir(args.source):
    raise UserError(f"--source={args.source!r} is no workdir of a run, of which --only_lora writes the LoRA.")
  config = initialize.with_backbone_sizes(loader.load(args.config), args.source)
  with progress.phase("read"), checkpointer.Checkpoints(args.source, read_only=True) as checkpoints:
    step = checkpoints.latest_step() if args.step is None else args.step
    parts = checkpoints.restore_weights(step)
    alpha = checkpoints.restore_config(step).get("lora", {}).get("alpha", 0)
  named = parts["params"] | parts["frozen"] | parts.get("ema", {})
  finite.check(named, f"checkpoint {step} of {args.source}")
  with progress.phase("write"):
    write.write(args.output, lora_files.state_dict(named, alpha, config.backbone.unet))


def read(args: argparse.Namespace, shapes: dict, config: ConfigDict) -> tuple[dict, int]:
  """(all arrays by our names, finished steps)."""
  if not checkpointer.is_workdir(args.source):
    named, report = load.load_pretrained(args.source, shapes, fresh=())
    return named, report.step
  with checkpointer.Checkpoints(args.source, read_only=True) as checkpoints:
    step = checkpoints.latest_step() if args.step is None else args.step
    differing = stored.differing(checkpoints.restore_config(step), config)
    named = checkpoints.evaluated(step, checkpoints.restore_weights(step))
  if wrong := [name for name, shape in shapes.items() if name not in named or named[name].shape != shape.shape]:
    raise UserError(
      f"--source={args.source!r} is not of this config: {differing}, and {len(wrong)} arrays are missing or of another "
      f"shape, like {wrong[0]}; give the config it was trained with."
    )
  finite.check(named, f"checkpoint {step} of {args.source}")
  return named, step


def read_manifest(path: str) -> list[dict]:
  """The entries of --manifest."""
  entries = reading.read_json(path)
  needed = {"name", "shape", "dtype"}
  if not isinstance(entries, list) or not all(isinstance(e, dict) and needed <= e.keys() for e in entries):
    raise UserError(f"--manifest={path!r} must be a list of objects with {', '.join(sorted(needed))}.")
  return entries


def main() -> None:
  args = parse()
  try:
    check(args)
    (only_lora if args.only_lora else reverse if args.reverse else forward)(args)
  except UserError as error:
    raise SystemExit(f"convert_checkpoint: {one_line(error)}") from error
  progress.write(f"wrote {args.output}")


if __name__ == "__main__":
  main()
