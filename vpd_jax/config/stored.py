"""The config of a run as a config file: `stored.py:RUN` is the config that the workdir RUN was last trained with.

`--mode=eval|predict --workdir=RUN` without --config, and `Predictor.load(weights=RUN)`, take it.
"""

import json
import textwrap

import ml_collections
from etils import epath

from vpd_jax.config import fields, loader
from vpd_jax.config.fields import Section
from vpd_jax.errors import UserError

FILE = "config.json"  # of a workdir, written by training
SECTIONS = ("method", "backbone", "head", "neck", "task", "data")  # which change arrays or predictions
# Options that decide which arrays there are, the most telling first.
OF_ARRAYS = ("method.name", "task.name", "backbone.", "head.name", "neck.name", "data.classes", "data.keypoints",
             "data.name", "data.scene", "method.", "head.", "neck.")  # fmt: skip
# Options that a run may be used without, or with others.
OF_NO_ARRAY = (*loader.RESUME_IGNORED, "method.prompt", "method.refine_steps", "method.trained_steps")
SHOWN, WIDTH = 6, 80  # options in a line, letters of a value


def config_string(workdir: str) -> str:
  """The config string, as of --config, of the config that a workdir was last trained with."""
  return f"{__file__}:{workdir}"


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """The stored config, with the overrides that training was given.

  Args:
    argument: the workdir, a local folder or a bucket.

  Raises:
    ValueError: there is no such file, or it holds something else.
  """
  path = epath.Path(argument).expanduser() / FILE
  try:
    values = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({' '.join(str(error).split())})"
    raise UserError(
      f"without --config the config of the run is taken, but {FILE} of --workdir={argument!r} {why}; "
      "give the workdir of a run, or --config=FILE."
    ) from None
  if not isinstance(values, dict):
    raise UserError(f"{path} holds no config; give --config=FILE.")
  for old, new in fields.RENAMED.items():
    section, name = old.split(".")
    if name in values.get(section, {}):
      values[section][new.removeprefix(f"{section}.")] = values[section].pop(name)
  if isinstance(values.get("eval"), dict):
    values["eval"].setdefault("blend", fields.ADDED["eval.blend"])
  return ml_collections.ConfigDict({key: loader.as_tuples(value) for key, value in values.items()})


def differing(trained: Section, config: ml_collections.ConfigDict) -> str:
  """What changes arrays or predictions and is another in a config than in the stored one, in a line; else empty.

  Args:
    trained: the config that a checkpoint stores.
    config: of the evaluation or prediction.

  Returns:
    'neck.width is 32 in the run and 64 here, ..', at most SHOWN options, those first that decide which arrays there
    are, and the number of the others.
  """
  rank = lambda field: next((i for i, start in enumerate(OF_ARRAYS) if field.startswith(start)), len(OF_ARRAYS))
  found = loader.changes(trained, config, SECTIONS, OF_NO_ARRAY)
  found = [change for change in found if not change[0].startswith("data.") or rank(change[0]) < len(OF_ARRAYS)]
  named = {field.removesuffix(".name") for field, *_ in found if field.endswith(".name")}  # whose other options follow
  found = [change for change in found if change[0].endswith(".name") or change[0].split(".")[0] not in named]
  short = lambda value: textwrap.shorten(repr(value), WIDTH, placeholder=" ..")
  texts = [
    f"{field} is {short(before)} in the run and {short(after)} here"
    for field, before, after in sorted(found, key=lambda change: rank(change[0]))
  ]
  return ", ".join([*texts[:SHOWN], *([f"{len(texts) - SHOWN} more options"] if len(texts) > SHOWN else [])])
