"""Config files: `configs/nyu_depth.py:meta_prompts,tiny` -> a locked ConfigDict.

Imports only ml_collections and the standard library, because config files import this module.
"""

import difflib
import importlib.util
import inspect
import math
import pathlib
import re
import traceback
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from vpd_jax.config import fields
from vpd_jax.config.fields import Section
from vpd_jax.errors import UserError, one_line

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
PROJECT = PACKAGE.parent  # root of a checkout; in a wheel, configs/ is part of the package
RESUME_CHECKED = (
  "method",
  "neck",
  "head",
  "task",
  "data",
  "optim",
  "backbone",
  "lora",
  "seed",
  "dtype",
  "frozen_dtype",
)
RESUME_IGNORED = (
  "data.workers",
  "data.root",
  "data.depth_root",
  "data.format",
  "data.cache",
  "data.cache_folder",
  "backbone.attention",
  "backbone.remat",
  "backbone.remat_policy",
  "method.class_vectors",
  "method.tokenizer",
  "task.contours",
)
CHARACTERS, WORDS = "characters", "words"  # values of method.tokenizer that need no files, see convert/tokenizer.py
REQUIRED = (*RESUME_CHECKED, "eval", "init", "mesh", "param_dtype")  # in every config
# The smallest valid value by field.
MINIMUM = {
  **dict.fromkeys(("num_steps", "log_every", "eval_every", "save_every", "keep", "optim.accumulation"), 1),
  **dict.fromkeys(("data.batch_size", "eval.batch_size"), 1),
  **dict.fromkeys(("seed", "keep_best", "profile", "data.workers", "eval.panels", "eval.baselines"), 0),
  **dict.fromkeys(("optim.norm_group", "optim.loss_group", "optim.clip_norm", "optim.decay", "optim.ema_decay"), 0),
  **dict.fromkeys(("lora.rank", "lora.lr"), 0),
}


def parse_variant(argument: str | None, **choices_of: Sequence[str]) -> dict[str, str]:
  """Parses the part of a config string after the colon: at most one word of each group, in any order.

  Args:
    argument: comma-separated words, e.g. "tiny,vpd"; empty or None for the defaults.
    **choices_of: the valid words of each group; the first one is the default.

  Returns:
    {group: word} for every group.

  Raises:
    ValueError: for an unknown word, or two words of one group.
  """
  chosen: dict[str, str] = {}
  for word in filter(None, (part.strip() for part in (argument or "").split(","))):
    group = next((name for name, choices in choices_of.items() if word in choices), None)
    if group is None:
      listed = "; ".join(f"{name}: {', '.join(choices)}" for name, choices in choices_of.items())
      raise UserError(f"config argument {word!r} is unknown; choose at most one of each of ({listed}).")
    if group in chosen:
      raise UserError(f"config argument {argument!r} names two of {group}: {chosen[group]!r} and {word!r}; keep one.")
    chosen[group] = word
  return {group: chosen.get(group, choices[0]) for group, choices in choices_of.items()}


def resolve(config: str) -> str:
  """Makes the path of 'path:words' absolute.

  A relative path is looked up in the working directory, in the package and in its parent folder; '.py' is optional.

  Raises:
    ValueError: if no such file exists; the message lists all candidates.
  """
  path, colon, argument = config.partition(":")
  if not path:
    raise UserError(f"config={config!r} names no file; give one like 'configs/nyu_depth.py:vpd'.")
  file = pathlib.Path(path if path.endswith(".py") else f"{path}.py").expanduser()
  candidates = list(dict.fromkeys(folder / file for folder in (pathlib.Path.cwd(), PACKAGE, PROJECT)))
  for candidate in candidates:
    if candidate.is_file():
      return f"{candidate.resolve()}{colon}{argument}"
  names = sorted({entry.name for folder in (PACKAGE, PROJECT) for entry in (folder / "configs").glob("*.py")})
  stems = [name.removesuffix(".py") for name in names]
  matches = [stem for stem in stems if file.stem in stem] or difflib.get_close_matches(file.stem, stems, n=2)
  listed = lambda chosen: ", ".join(f"configs/{stem}.py" for stem in chosen)
  hint = (
    f"did you mean {listed(matches)}?"
    if matches
    else f"give one that exists, like {listed(stems) or 'configs/mine.py'}."
  )
  raise UserError(f"config file {path!r} was not found: no file {' and no file '.join(map(str, candidates))}; {hint}")


def load(config: str | ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Loads a config string (the value of --config) as a locked ConfigDict, or copies and locks a ConfigDict.

  Raises:
    ValueError: if the file does not exist, fails, has no get_config, or rejects the words.
  """
  if isinstance(config, ml_collections.ConfigDict):
    return config.copy_and_resolve_references().lock()
  path, colon, argument = resolve(config).partition(":")
  module = _import(path)
  if "get_config" not in vars(module):
    raise UserError(f"config file {path!r} has no function get_config; write one that returns a ConfigDict.")
  if colon and not inspect.signature(module.get_config).parameters:
    raise UserError(f"the get_config of config file {path!r} takes no words; remove ':{argument}'.")
  try:
    result = module.get_config(argument) if colon else module.get_config()
  except UserError:
    raise  # from `parse_variant`, or from a check in the file
  except Exception as error:
    raise _failure(path, error) from error
  if not isinstance(result, ml_collections.ConfigDict):
    raise UserError(f"the get_config of config file {path!r} returns a {type(result).__name__}; return a ConfigDict.")
  return result.lock()


def resolve_argv(argv: Sequence[str], flag: str = "config") -> list[str]:
  """Makes the value of --config absolute, because config_flags only looks in the working directory.

  The config is loaded once here, so that a wrong word raises the one-line ValueError of `parse_variant` instead of
  absl's traceback, and so that all unknown fields are reported together.

  Raises:
    ValueError: as `load`; for a field that the config does not have, with the closest match.
  """
  resolved = list(argv)
  own_arguments = resolved[: resolved.index("--")] if "--" in resolved else resolved
  config = None
  for i, word in enumerate(own_arguments):
    if match := re.fullmatch(rf"(--?{flag}=)(.*)", word):
      resolved[i] = match[1] + resolve(match[2])
      config = load(match[2])
    elif re.fullmatch(rf"--?{flag}", word) and i + 1 < len(own_arguments):
      resolved[i + 1] = resolve(own_arguments[i + 1])
      config = load(own_arguments[i + 1])
  if config is not None:
    overrides = [match[1] for word in own_arguments if (match := re.match(rf"--?(?:no)?{flag}\.([^=]+)", word))]
    problems = [problem for field in dict.fromkeys(overrides) if (problem := _unknown(config, flag, field))]
    if problems:
      raise UserError("; ".join(problems) + ".")
  return resolved


def argument(argv: Sequence[str], flag: str) -> str | None:
  """The last value of a flag on an unparsed command line; None if the flag is missing."""
  value = None
  for i, word in enumerate(argv):
    if match := re.fullmatch(rf"--?{flag}=(.*)", word):
      value = match[1]
    elif re.fullmatch(rf"--?{flag}", word) and i + 1 < len(argv):
      value = argv[i + 1]
  return value


def check(config: ml_collections.ConfigDict) -> None:
  """Checks that the fields of REQUIRED exist, that those of MINIMUM are large enough, and that all floats are finite.

  Raises:
    ValueError: for missing sections or fields, for values that are too small, not finite or not numbers, and for
      options of LoRA without a rank; lists all of them.
  """
  values = {field: _value(config, field) for field in (*REQUIRED, *MINIMUM)}
  problems = [
    f"config.{field} is left out; copy it from a config of the package"
    for field, value in values.items()
    if value is _ABSENT and field.split(".")[0] in (field, *config)
  ]
  problems += [
    f"config.{field}={values[field]!r} must be at least {minimum}"
    for field, minimum in MINIMUM.items()
    if values[field] is not _ABSENT and not (isinstance(values[field], int | float) and values[field] >= minimum)
  ]
  problems += [
    f"config.{field}={value!r} must be a finite number"
    for field, value in _flat(config).items()
    if isinstance(value, float) and not math.isfinite(value)
  ]
  test_time = _value(config, "eval.test_time")
  items = test_time if isinstance(test_time, Iterable) else [test_time]
  if test_time is not _ABSENT and not all(isinstance(word, str) for word in items):
    problems.append(f"config.eval.test_time={test_time!r} must be a tuple of words, like ('flip',), or ()")
  decay = _value(config, "optim.ema_decay")
  if isinstance(decay, int | float) and decay >= 1:
    problems.append(f"config.optim.ema_decay={decay} must be below 1; 0 keeps no moving average")
  if _value(config, "lora.rank") == 0:
    defaults = {field: value for field, value in fields.ADDED.items() if field.startswith("lora.")}
    given = {field: as_tuples(_value(config, field)) for field in defaults}
    problems += [
      f"config.{field}={value!r} has no effect with config.lora.rank=0; give a rank, or leave it out"
      for field, value in given.items()
      if value not in (_ABSENT, defaults[field])
    ]
  if problems:
    raise UserError("; ".join(problems) + ".")


def name(config: str) -> str:
  """The name of a run, from the file's stem and the sorted words: configs/rooms.py:tiny,depth -> rooms-depth-tiny."""
  path, _, argument = config.partition(":")
  chosen = sorted(filter(None, (part.strip() for part in argument.split(","))))
  return "-".join([pathlib.PurePath(path).name.removesuffix(".py"), *chosen])


def workdir(config: str) -> str:
  """The default workdir of a run: 'runs/<name>' in the working directory."""
  return f"runs/{name(config)}"


def changed(config: ml_collections.ConfigDict, fields: Mapping[str, object]) -> ml_collections.ConfigDict:
  """A locked copy with the given fields, by dotted name, replaced."""
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(fields)
  return config.lock()


def schedule(config: Section | ml_collections.ConfigDict) -> Section:
  """The section optim.schedule, with num_steps=0 replaced by that of the run; empty if there is no such section."""
  options = dict((config.get("optim") or {}).get("schedule") or {})
  if "num_steps" in options:
    options["num_steps"] = options["num_steps"] or config.get("num_steps", 0)
  return options


def differences(
  old: Section | ml_collections.ConfigDict,
  new: Section | ml_collections.ConfigDict,
  prefixes: Sequence[str] = RESUME_CHECKED,
  ignored: Sequence[str] = RESUME_IGNORED,
) -> list[str]:
  """The differences between two configs, one line per field: 'optim.lr: 0.0005 -> 0.001'.

  Either config may come from JSON, so tuples and lists with equal items are equal. The length of the schedule and the
  scale of the latents are compared by their effective values, see `schedule`.

  Args:
    old: the config stored in a checkpoint.
    new: the config of this run.
    prefixes: sections or top-level fields to compare.
    ignored: fields among them that may change, because they do not affect results.
  """
  return [f"{x.field}: {x.before!r} -> {x.after!r}" for x in changes(old, new, prefixes, ignored)]


class Change(NamedTuple):
  """A difference between two configs: a dotted field and its values."""

  field: str
  before: object
  after: object


def changes(
  old: Section | ml_collections.ConfigDict,
  new: Section | ml_collections.ConfigDict,
  prefixes: Sequence[str] = RESUME_CHECKED,
  ignored: Sequence[str] = RESUME_IGNORED,
) -> list[Change]:
  """The changes behind `differences`, sorted by field."""
  old_fields, new_fields = (
    fields.with_new_names(_flat(config))
    | {f"optim.schedule.{name}": as_tuples(value) for name, value in schedule(config).items()}
    for config in (old, new)
  )
  for flat in (old_fields, new_fields):
    if flat.get("method.latent_scale") == 0:
      flat["method.latent_scale"] = flat["backbone.vae.latent_scale"]  # the value that the method uses
  result = []
  for field in sorted(old_fields.keys() | new_fields.keys()):
    before, after = old_fields.get(field, _ABSENT), new_fields.get(field, _ABSENT)
    # Unlike two folders of one tokenizer, these give other tokens.
    other_tokens = field == "method.tokenizer" and not {before, after}.isdisjoint({CHARACTERS, WORDS})
    if field.split(".", 1)[0] in prefixes and (other_tokens or field not in ignored) and before != after:
      result.append(Change(field, before, after))
  return result


class _Absent:
  """The value of a field that one of the two configs does not have."""

  def __repr__(self) -> str:
    return "absent"


_ABSENT = _Absent()


def _flat(section: object, prefix: str = "") -> Section:
  """{dotted field: value}; an empty section counts as a field."""
  if isinstance(section, ml_collections.ConfigDict):
    section = section.to_dict()
  if not isinstance(section, Mapping) or not section:
    return {prefix: as_tuples(section)} if prefix else {}
  flat: Section = {}
  for key, value in section.items():
    flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
  return flat


def as_tuples(value: object) -> object:
  """Turns the lists of JSON into the tuples of a config, at every depth."""
  if isinstance(value, Mapping):
    return {key: as_tuples(item) for key, item in value.items()}
  return tuple(as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _value(config: Any, field: str) -> Any:
  """The value of a dotted field; _ABSENT if it does not exist."""
  for name in field.split("."):
    if not isinstance(config, ml_collections.ConfigDict) or name not in config:
      return _ABSENT
    config = config[name]
  return config


def _unknown(config: ml_collections.ConfigDict, flag: str, field: str) -> str:
  """Describes an unknown field on the command line and suggests close matches; empty if the field exists."""
  path = re.sub(r"\[.*?\]", "", field)  # an item of a tuple: optim.lr_groups[0]
  if _value(config, path) is not _ABSENT:
    return ""
  section, _, name = path.rpartition(".")
  while section and not isinstance(_value(config, section), ml_collections.ConfigDict):
    section, _, name = section.rpartition(".")
  names = list(config[section] if section else config)
  elsewhere = [other for other in _flat(config) if other.rpartition(".")[2] == name]
  matches = elsewhere or [f"{section}.{other}".lstrip(".") for other in difflib.get_close_matches(name, names, n=1)]
  if path in fields.RENAMED:
    return f"{flag}.{path} is now {flag}.{fields.RENAMED[path]}; write --{flag}.{fields.RENAMED[path]}"
  hint = f"did you mean {' or '.join(f'--{flag}.{other}' for other in matches[:3])}? " if matches else ""
  where = ".".join(filter(None, (flag, section)))
  return f"{flag}.{path} is unknown: {hint}{where} has the fields {', '.join(sorted(names))}"


def _import(path: str) -> types.ModuleType:
  """Imports a file as a module without adding it to sys.modules, since two files may have the same name."""
  spec = importlib.util.spec_from_file_location(f"vpd_jax_config_{pathlib.PurePath(path).stem}", path)
  if spec is None or spec.loader is None:
    raise UserError(f"config file {path!r} cannot be imported as Python.")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise _failure(path, error) from error
  return module


def _failure(path: str, error: Exception) -> UserError:
  """A one-line error for an exception in a config file, with the number of the failing line."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  where = f", line {lines[-1]}," if lines else ""
  return UserError(f"config file {path!r}{where} fails with {one_line(error, with_type=True)}; fix the file.")
