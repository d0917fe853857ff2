"""The stored config of a run as a config file: `stored.py:RUN` is the config that workdir RUN was last trained with.

`--mode=eval|predict --workdir=RUN` without --config, and `Predictor.load(weights=RUN)`, use it.
"""

import functools
import json
import textwrap

import ml_collections
from etils import epath

from vpd_jax.config import fields, loader
from vpd_jax.config.fields import Section
from vpd_jax.errors import UserError, one_line

FILE = "config.json"  # in a workdir, written by training
SECTIONS = ("method", "backbone", "head", "neck", "task", "data")  # which affect arrays or predictions
# Options that determine the arrays of the model, the most significant first.
ARRAY_OPTIONS = ("method.name", "task.name", "backbone.", "head.name", "neck.name", "data.classes", "data.keypoints",
             "data.name", "data.scene", "method.", "head.", "neck.")  # fmt: skip
# Options that may differ from those of the run, because no array depends on them.
IGNORED = (*loader.RESUME_IGNORED, "method.prompt", "method.refine_steps", "method.trained_steps")
WITHOUT_WINDOWS = ("referring", "pose")  # tasks whose evaluation is not split into windows
SHOWN, WIDTH = 6, 80  # options per message, characters per value


def config_string(workdir: str) -> str:
  """The config string (a value of --config) for the config that a workdir was last trained with."""
  return f"{__file__}:{workdir}"


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The stored config, including the overrides of training.

  Args:
    argument: the workdir, a local folder or a bucket.

  Raises:
    ValueError: if the file does not exist or is not a config.
  """
  path = epath.Path(argument).expanduser() / FILE
  try:
    values = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({one_line(error)})"
    raise UserError(
      f"without --config the config of the run is taken, but {FILE} of --workdir={argument!r} {why}; "
      "give the workdir of a run, or --config=FILE."
    ) from None
  if not isinstance(values, dict):
    raise UserError(f"{path} is not a config; give --config=FILE.")
  for old, new in fields.RENAMED.items():
    section, name = old.split(".")
    if name in values.get(section, {}):
      values[section][new.removeprefix(f"{section}.")] = values[section].pop(name)
  values.setdefault("lora", {})
  task, evaluation = values.get("task"), values.get("eval")
  if isinstance(task, dict) and isinstance(evaluation, dict) and task.get("name") in WITHOUT_WINDOWS:
    evaluation["coverage"] = "full"  # earlier versions wrote "released", which had no effect
  for field, value in fields.ADDED.items():
    *sections, name = field.split(".")
    section = functools.reduce(lambda x, part: x.get(part) if isinstance(x, dict) else None, sections, values)
    if isinstance(section, dict) and sections[:1] != ["data"]:  # the data sets with such an option have its default
      section.setdefault(name, value)
  return ml_collections.ConfigDict({key: loader.as_tuples(value) for key, value in values.items()})


def differing(trained: Section, config: ml_collections.ConfigDict) -> str:
  """Describes in one line how a config differs from the stored one in ways that affect arrays or predictions.

  Args:
    trained: the config stored in a checkpoint.
    config: the config of the evaluation or prediction.

  Returns:
    'neck.width is 32 in the run and 64 here, ..': at most SHOWN options, in the order of ARRAY_OPTIONS, and the number
    of the others; empty if there are none.
  """
  rank = lambda field: next(
    (i for i, prefix in enumerate(ARRAY_OPTIONS) if field.startswith(prefix)), len(ARRAY_OPTIONS)
  )
  changes = loader.changes(trained, config, SECTIONS, IGNORED)
  changes = [x for x in changes if not x.field.startswith("data.") or rank(x.field) < len(ARRAY_OPTIONS)]
  # Sections with another constructor, whose other options are then not comparable.
  replaced = {x.field.removesuffix(".name") for x in changes if x.field.endswith(".name")}
  changes = [x for x in changes if x.field.endswith(".name") or x.field.split(".")[0] not in replaced]
  short = lambda value: textwrap.shorten(repr(value), WIDTH, placeholder=" ..")
  texts = [
    f"{x.field} is {short(x.before)} in the run and {short(x.after)} here"
    for x in sorted(changes, key=lambda x: rank(x.field))
  ]
  return ", ".join([*texts[:SHOWN], *([f"{len(texts) - SHOWN} more options"] if len(texts) > SHOWN else [])])
