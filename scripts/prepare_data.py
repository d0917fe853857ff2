"""Checks a data set, and writes it as ArrayRecord shards, for reading from a bucket.

python scripts/prepare_data.py nyu --root=/data/nyu_depth_v2 --output=/data/nyu_shards
python scripts/prepare_data.py nyu --root=/data/nyu_depth_v2 --check_only
python scripts/prepare_data.py rooms --output=rooms --set size=(96,128) --set train_count=512

Every record is decoded once. Counts are compared with the published ones, sizes and values with their valid ranges, and
all faults are reported together. Shards are written only if there are none. After an interruption the same command
continues. The files of the data set are never modified. Then train with

python -m vpd_jax.main --config=... --config.data.format=tfds --config.data.root=/data/nyu_shards
"""

import argparse
import ast
import collections
import inspect
import os
import re
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device is used

from vpd_jax.monitoring import progress

if __name__ == "__main__":
  progress.begin("prepare_data")  # before imports that take seconds

import numpy as np

from vpd_jax.data.shards import reader, writer
from vpd_jax.errors import SHOWN, Parser, UserError, first_items, one_line
from vpd_jax.experiment import DATASETS
from vpd_jax.types import Published

SPLITS = ("train", "eval")
ACCEPT = ("counts", "sizes", "values")
THREADS = 4


class Seen(NamedTuple):
  """Properties of one record.

  Attributes:
    size: (height, width) of "image".
    ranges: smallest and largest value that is not 0, by the keys of Published.ranges; None where all are 0.
    missing: share of zeros, by the same keys.
    error: why the record cannot be read; the other attributes are empty then.
  """

  size: tuple[int, ...] = ()
  ranges: dict[str, tuple[float, float] | None] = {}  # noqa: RUF012 (never changed)
  missing: dict[str, float] = {}  # noqa: RUF012
  error: str = ""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("name", choices=sorted(DATASETS), help="data set")
  parser.add_argument("--root", default="", help="folder of its files; the procedural rooms have none")
  parser.add_argument("--output", help="local folder to write; it appears when it is complete")
  parser.add_argument("--check_only", action="store_true", help="write nothing")
  parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="default: both")
  parser.add_argument(
    "--accept", nargs="+", choices=ACCEPT, default=(), help="continue if these differ from the published ones"
  )
  parser.add_argument(
    "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option as in config.data, say train_list=..."
  )
  parser.add_argument("--shard_mb", type=float, default=writer.SHARD_BYTES / 2**20, help="about the size of a shard")
  options = parser.parse_args(arguments)
  if not options.output and not options.check_only:
    parser.error("--output=DIR is needed, or --check_only")
  return options


def make(name: str, root: str, settings: list[str], *, check_only: bool, accept: tuple[str, ...] = ()) -> Any:
  """The data set with the given options; with "counts" in `accept`, one that itself accepts an incomplete copy.

  Raises:
    ValueError: an option it does not have, or that it refuses; shards are wanted, and it reads none.
  """
  if "format" not in inspect.signature(DATASETS[name]).parameters and not check_only:
    raise UserError(f"{name} is read from its files only, so shards of it are of no use; give --check_only.")
  options = inspect.signature(DATASETS[name]).parameters
  known = [option for option in options if option not in ("root", "format")]
  given = dict(setting.partition("=")[::2] for setting in settings)
  unknown = sorted(set(given) - set(known))
  if unknown:
    raise UserError(f"--set {unknown[0]} is no option of {name!r}; it has {', '.join(known)}.")
  if needed := [o for o in known if options[o].default is inspect.Parameter.empty and o not in given]:
    raise UserError(f"{name} needs {', '.join(needed)}; give {' '.join(f'--set {o}=...' for o in needed)}.")
  accepted = {"complete": False} if accepts_incomplete(name, accept) else {}
  return DATASETS[name](root=root, **(accepted | {option: value(text) for option, text in given.items()}))


def accepts_incomplete(name: str, accept: tuple[str, ...]) -> bool:
  """Whether the data set counts its records itself and is asked not to."""
  return "counts" in accept and "complete" in inspect.signature(DATASETS[name]).parameters


def value(text: str) -> Any:
  """A Python literal, or else the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def check(dataset: Any, splits: tuple[str, ...], accept: tuple[str, ...], say: Callable[[str], None]) -> list[str]:
  """Checks every record; prints a summary, and returns the faults."""
  published = dataset.published
  sources, wrong = {}, []
  for split in splits:
    try:
      sources[split] = dataset.source(split)
    except UserError as error:
      wrong.append(f"{split}: {str(error).rstrip('.')}")
  for split, source in sources.items():
    count = published.counts.get(split)
    if count not in (None, len(source)) and "counts" not in accept:
      wrong.append(f"{split} has {len(source)} records, published are {count} (--accept counts continues)")
    looked = survey(source, published, split)
    say(f"{split}: {summary(looked, published, count)}")
    for note in source.notes:
      say(f"{split}: {note}")
    wrong += [f"{split}: {fault}" for fault in faults(source, looked, published, accept)]
  return wrong


def survey(source: Any, published: Published, split: str) -> list[Seen]:
  """Decodes every record of a split, in threads."""
  with futures.ThreadPoolExecutor(THREADS) as pool:
    looked = pool.map(lambda index: look(source, index, published), range(len(source)))
    found = []
    with progress.phase(f"checking {split}", len(source), "records") as checked:
      for seen in looked:
        found.append(seen)
        checked.advance()
    return found


def look(source: Any, index: int, published: Published) -> Seen:
  """Decodes one record."""
  try:
    example = source[index]
  except UserError as error:
    return Seen(error=str(error))
  ranges, missing = {}, {}
  for key in published.ranges:
    values = example[key][example[key] != 0]
    ranges[key] = (float(values.min()), float(values.max())) if values.size else None
    missing[key] = 1 - values.size / example[key].size
  return Seen(example["image"].shape[:2], ranges, missing)


def summary(looked: list[Seen], published: Published, count: int | None) -> str:
  """A summary of a split in one line; `count` is the published number of records."""
  readable = [seen for seen in looked if not seen.error]
  compared = "not compared with a published number" if count is None else f"published are {count}"
  sizes = collections.Counter(seen.size for seen in readable).most_common(3)
  parts = [f"{len(looked)} records ({compared})", "sizes " + ", ".join(f"{h}x{w} ({n})" for (h, w), n in sizes)]
  for key in published.ranges:
    known = [seen.ranges[key] for seen in readable if seen.ranges[key]]
    if known:
      least, most = min(low for low, _ in known), max(high for _, high in known)
      share = np.mean([seen.missing[key] for seen in readable])
      parts.append(f"{key} {least:.3f} to {most:.3f}, {100 * share:.1f} % missing")
  return "; ".join(parts)


def faults(source: Any, looked: list[Seen], published: Published, accept: tuple[str, ...]) -> list[str]:
  """The faults of the records of a split, one text per kind of fault."""
  found = []
  errors = [seen.error for seen in looked if seen.error]
  if errors:
    found.append(f"{len(errors)} records cannot be read: {first_items([error.rstrip('.') for error in errors])}")
  readable = [index for index, seen in enumerate(looked) if not seen.error]
  other = [index for index in readable if published.size and looked[index].size != published.size]
  if other and "sizes" not in accept:
    names = [f"{label(source, index)} ({'x'.join(map(str, looked[index].size))})" for index in other[:SHOWN]]
    wanted = "x".join(map(str, published.size))
    found.append(
      f"{len(other)} images are not {wanted}: {first_items(names, total=len(other))} (--accept sizes continues)"
    )
  for key, (low, high) in published.ranges.items():
    beyond = [
      index
      for index in readable
      if not (seen := looked[index].ranges[key]) or not (low <= seen[0] and seen[1] <= high)  # NaN is beyond too
    ]
    if beyond and "values" not in accept:
      names = [f"{label(source, index)} ({shown(looked[index].ranges[key])})" for index in beyond[:SHOWN]]
      found.append(
        f"{key} of {len(beyond)} records is not within {low:g} to {high:g}: {first_items(names, total=len(beyond))} "
        "(--accept values continues)"
      )
  return found


def shown(values: tuple[float, float] | None) -> str:
  return f"{values[0]:.3f} to {values[1]:.3f}" if values else "nothing"


def label(source: Any, index: int) -> str:
  """The image path of a record, or its index."""
  return source.record(index).get("image_path", f"record {index}")


def run(options: argparse.Namespace, say: Callable[[str], None] = progress.write) -> None:
  """Checks and writes.

  Raises:
    ValueError: in one line, everything that is wrong.
  """
  dataset = make(options.name, options.root, options.set, check_only=options.check_only, accept=options.accept)
  write = {"name": options.name, "splits": options.splits, "shard_bytes": max(int(options.shard_mb * 2**20), 1)}
  if not options.check_only:
    output = writer.check_output(options.output)
    if options.root and output.resolve().is_relative_to(Path(options.root).expanduser().resolve()):
      raise UserError(f"--output={options.output} lies in --root, whose files are only read; give another folder.")
    if (output / reader.INFO).exists():
      return writer.prepare(dataset, output, **write, say=say)
  wrong = check(dataset, options.splits, options.accept, say)
  if wrong:
    raise UserError(f"{len(wrong)} faults: {'; '.join(wrong)}.")
  say("no faults")
  if not options.check_only:
    writer.prepare(dataset, output, **write, say=say)
    incomplete = " --config.data.complete=False" if accepts_incomplete(options.name, options.accept) else ""
    say(f"wrote {output}; train with --config.data.format=tfds --config.data.root={output}{incomplete}")


def in_flags(message: str) -> str:
  """A message that names options of a config, with the flags of this script in their place."""
  message = re.sub(r"\bdata\.root\b", "--root", message)
  message = re.sub(r"\bset data\.(\w+)", r"give --set \1", message)
  return re.sub(r"\bdata\.(\w+)", r"--set \1", message)


def main() -> None:
  try:
    run(parse())
  except UserError as error:
    raise SystemExit(f"prepare_data: {in_flags(one_line(error))}") from None


if __name__ == "__main__":
  main()
