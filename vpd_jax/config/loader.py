"""Config files: `configs/nyu_depth.py:meta_prompts,tiny` -> a locked ConfigDict.

Imports only ml_collections and the standard library, because config files import this module themselves.
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
from typing import Any

import ml_collections

from vpd_jax.config import fields
from vpd_jax.config.fields import Section
from vpd_jax.errors import UserError

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
PROJECT = PACKAGE.parent  # of a checkout; a wheel has its configs/ in the package
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
  "data.format",
  "data.cache",
  "data.cache_folder",
  "backbone.attention",
  "backbone.remat",
  "method.class_vectors",
  "method.tokenizer",
  "task.contours",
)
REQUIRED = (*RESUME_CHECKED, "eval", "init", "mesh", "param_dtype")  # in every config
# Field: the smallest value it may have.
MINIMUM = {
  **dict.fromkeys(("num_steps", "log_every", "eval_every", "save_every", "keep", "optim.accumulation"), 1),
  **dict.fromkeys(("data.batch_size", "eval.batch_size"), 1),
  **dict.fromkeys(("keep_best", "profile", "data.workers", "eval.panels", "eval.baselines"), 0),
  **dict.fromkeys(("optim.norm_group", "optim.loss_group", "optim.clip_norm", "optim.decay", "optim.ema_decay"), 0),
  **dict.fromkeys(("lora.rank", "lora.lr"), 0),
}


def parse_variant(argument: str | None, **kinds: Sequence[str]) -> dict[str, str]:
  """Reads the part of a config string after the colon: at most one word of each kind, in any order.

  Args:
    argument: comma separated words, e.g. "tiny,vpd"; empty or None for none.
    **kinds: kind = its words; the first one is taken where none is given.

  Returns:
    {kind: word} for every kind.

  Raises:
    ValueError: for an unknown word, or two words of one kind.
  """
  chosen: dict[str, str] = {}
  for word in filter(None, (part.strip() for part in (argument or "").split(","))):
    kind = next((name for name, choices in kinds.items() if word in choices), None)
    if kind is None:
      listed = "; ".join(f"{name}: {', '.join(choices)}" for name, choices in kinds.items())
      raise UserError(f"config argument {word!r} is unknown; choose at most one of each of ({listed}).")
    if kind in chosen:
      raise UserError(f"config argument {argument!r} names two of {kind}: {chosen[kind]!r} and {word!r}; keep one.")
    chosen[kind] = word
  return {kind: chosen.get(kind, choices[0]) for kind, choices in kinds.items()}


def resolve(config: str) -> str:
  """'path:words' with the path made absolute.

  A relative path is looked up in the working directory, then in the package and beside it; '.py' may be left out.

  Raises:
    ValueError: where neither file exists; the message names both.
  """
  path, colon, argument = config.partition(":")
  if not path:
    raise UserError(f"config={config!r} names no file; give one like 'configs/nyu_depth.py:vpd'.")
  file = pathlib.Path(path if path.endswith(".py") else f"{path}.py").expanduser()
  candidates = list(dict.fromkeys(folder / file for folder in (pathlib.Path.cwd(), PACKAGE, PROJECT)))
  for candidate in candidates:
    if candidate.is_file():
      return f"{candidate.resolve()}{colon}{argument}"
  names = sorted({held.name for folder in (PACKAGE, PROJECT) for held in (folder / "configs").glob("*.py")})
  stems = [name.removesuffix(".py") for name in names]
  near = [stem for stem in stems if file.stem in stem] or difflib.get_close_matches(file.stem, stems, n=2)
  listed = lambda chosen: ", ".join(f"configs/{stem}.py" for stem in chosen)
  hint = (
    f"did you mean {listed(near)}?" if near else f"give one that exists, like {listed(stems) or 'configs/mine.py'}."
  )
  raise UserError(f"config file {path!r} was not found: no file {' and no file '.join(map(str, candidates))}; {hint}")


def load(config: str | ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A locked ConfigDict of a config string (the value of --config), or a locked copy of a ConfigDict.

  Raises:
    ValueError: where the file is not found, fails, has no get_config, or refuses the words.
  """
  if isinstance(config, ml_collections.ConfigDict):
    return config.copy_and_resolve_references().lock()
  path, colon, argument = resolve(config).partition(":")
  module = _import(path)
  if "get_config" not in vars(module):
    raise UserError(f"config file {path!r} has no function get_config; write one that returns a ConfigDict.")
  if colon and not inspect.signature(module.get_config).parameters:
    raise UserError(f"the get_config of config file {path!r} takes no words; leave ':{argument}' away.")
  try:
    made = module.get_config(argument) if colon else module.get_config()
  except UserError:
    raise  # of `parse_variant`, or of the file's own checks
  except Exception as error:
    raise _failure(path, error) from error
  if not isinstance(made, ml_collections.ConfigDict):
    raise UserError(f"the get_config of config file {path!r} returns a {type(made).__name__}; return a ConfigDict.")
  return made.lock()


def resolve_argv(argv: Sequence[str], flag: str = "config") -> list[str]:
  """The command line with the value of --config made absolute, as config_flags looks in the working directory only.

  The file is loaded once here, so that a wrong word is the one-line ValueError of `parse_variant` and not absl's
  traceback, and all fields that it does not have are named at once.

  Raises:
    ValueError: as `load`; a field that is set but not in the config, with the one that may be meant.
  """
  resolved = list(argv)
  own = resolved[: resolved.index("--")] if "--" in resolved else resolved
  config = None
  for i, word in enumerate(own):
    if match := re.fullmatch(rf"(--?{flag}=)(.*)", word):
      resolved[i] = match[1] + resolve(match[2])
      config = load(match[2])
    elif re.fullmatch(rf"--?{flag}", word) and i + 1 < len(own):
      resolved[i + 1] = resolve(own[i + 1])
      config = load(own[i + 1])
  if config is not None:
    fields = [match[1] for word in own if (match := re.match(rf"--?(?:no)?{flag}\.([^=]+)", word))]
    problems = [problem for field in dict.fromkeys(fields) if (problem := _unknown(config, flag, field))]
    if problems:
      raise UserError("; ".join(problems) + ".")
  return resolved


def argument(argv: Sequence[str], flag: str) -> str | None:
  """The value of a flag on a command line that is not parsed yet, the last one; None where it is not given."""
  found = None
  for i, word in enumerate(argv):
    if match := re.fullmatch(rf"--?{flag}=(.*)", word):
      found = match[1]
    elif re.fullmatch(rf"--?{flag}", word) and i + 1 < len(argv):
      found = argv[i + 1]
  return found


def check(config: ml_collections.ConfigDict) -> None:
  """Checks what no other part of the program would find: that REQUIRED is there, the numbers of MINIMUM, no NaN.

  Raises:
    ValueError: sections or fields left out, numbers that are too small or no numbers; names all of them.
  """
  values = {field: _value(config, field) for field in (*REQUIRED, *MINIMUM)}
  problems = [
    f"config.{field} is left out; copy it from a config of the package"
    for field, value in values.items()
    if value is _ABSENT and field.split(".")[0] in (field, *config)
  ]
  problems += [
    f"config.{field}={values[field]!r} must be at least {least}"
    for field, least in MINIMUM.items()
    if values[field] is not _ABSENT and not (isinstance(values[field], int | float) and values[field] >= least)
  ]
  problems += [
    f"config.{field}={value!r} must be a finite number"
    for field, value in _flat(config).items()
    if isinstance(value, float) and not math.isfinite(value)
  ]
  words = _value(config, "eval.test_time")
  listed = words if isinstance(words, Iterable) else [words]
  if words is not _ABSENT and not all(isinstance(word, str) for word in listed):
    problems.append(f"config.eval.test_time={words!r} must be a tuple of words, like ('flip',), or ()")
  decay = _value(config, "optim.ema_decay")
  if isinstance(decay, int | float) and decay >= 1:
    problems.append(f"config.optim.ema_decay={decay} must be below 1; 0 keeps no moving average")
  if problems:
    raise UserError("; ".join(problems) + ".")


def name(config: str) -> str:
  """The name of a run: the file's stem and the sorted words: 'configs/rooms.py:tiny,depth' -> 'rooms-depth-tiny'."""
  path, _, argument = config.partition(":")
  chosen = sorted(filter(None, (part.strip() for part in argument.split(","))))
  return "-".join([pathlib.PurePath(path).name.removesuffix(".py"), *chosen])


def workdir(config: str) -> str:
  """The default folder of a run: 'runs/<name>', below the working directory."""
  return f"runs/{name(config)}"


def changed(config: ml_collections.ConfigDict, fields: Mapping[str, object]) -> ml_collections.ConfigDict:
  """A locked copy with these fields set, by dotted name."""
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(fields)
  return config.lock()


def schedule(config: Section | ml_collections.ConfigDict) -> Section:
  """The section optim.schedule; its num_steps is the run's where it says 0. Empty where there is no such section."""
  options = dict((config.get("optim") or {}).get("schedule") or {})
  if "num_steps" in options:
    options["num_steps"] = options["num_steps"] or config.get("num_steps", 0)
  return options


def differences(
  old: Section | ml_collections.ConfigDict,
  new: Section | ml_collections.ConfigDict,
  prefixes: Sequence[str] = RESUME_CHECKED,
  indifferent: Sequence[str] = RESUME_IGNORED,
) -> list[str]:
  """What changed between two configs, one line a field: 'optim.lr: 0.0005 -> 0.001'.

  Either may have gone through JSON: tuples and lists with equal items are equal. A schedule's length is compared as
  the run takes it, see `schedule`, and so is the factor on the latents.

  Args:
    old: the config stored in a checkpoint.
    new: the config of this run.
    prefixes: sections, or fields of the top level, to compare.
    indifferent: fields among them that may change, since no number depends on them.
  """
  return [f"{field}: {before!r} -> {after!r}" for field, before, after in changes(old, new, prefixes, indifferent)]


def changes(
  old: Section | ml_collections.ConfigDict,
  new: Section | ml_collections.ConfigDict,
  prefixes: Sequence[str] = RESUME_CHECKED,
  indifferent: Sequence[str] = RESUME_IGNORED,
) -> list[tuple[str, object, object]]:
  """The dotted field, and its values in the old and in the new config, of what `differences` compares, by name."""
  old_fields, new_fields = (
    fields.with_new_names(_flat(config))
    | {f"optim.schedule.{name}": as_tuples(value) for name, value in schedule(config).items()}
    for config in (old, new)
  )
  for flat in (old_fields, new_fields):
    if flat.get("method.latent_scale") == 0:
      flat["method.latent_scale"] = flat["backbone.vae.latent_scale"]  # as the method takes it
  found = []
  for field in sorted(old_fields.keys() | new_fields.keys()):
    before, after = old_fields.get(field, _ABSENT), new_fields.get(field, _ABSENT)
    if field.split(".", 1)[0] in prefixes and field not in indifferent and before != after:
      found.append((field, before, after))
  return found


class _Absent:
  """Stands for a field that one of two configs does not have."""

  def __repr__(self) -> str:
    return "absent"


_ABSENT = _Absent()


def _flat(section: object, prefix: str = "") -> Section:
  """{dotted field: value}; an empty section is a field itself."""
  if isinstance(section, ml_collections.ConfigDict):
    section = section.to_dict()
  if not isinstance(section, Mapping) or not section:
    return {prefix: as_tuples(section)} if prefix else {}
  found: Section = {}
  for key, value in section.items():
    found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
  return found


def as_tuples(value: object) -> object:
  """Plain values as a config holds them: lists, as JSON knows them, become tuples at every depth."""
  if isinstance(value, Mapping):
    return {key: as_tuples(item) for key, item in value.items()}
  return tuple(as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _value(config: Any, field: str) -> Any:
  """The value of a dotted field; _ABSENT where there is none."""
  for name in field.split("."):
    if not isinstance(config, ml_collections.ConfigDict) or name not in config:
      return _ABSENT
    config = config[name]
  return config


def _unknown(config: ml_collections.ConfigDict, flag: str, field: str) -> str:
  """What is wrong with the name of a field on the command line, and what may be meant; empty where it exists."""
  plain = re.sub(r"\[.*?\]", "", field)  # an item of a tuple: optim.lr_groups[0]
  if _value(config, plain) is not _ABSENT:
    return ""
  section, _, name = plain.rpartition(".")
  while section and not isinstance(_value(config, section), ml_collections.ConfigDict):
    section, _, name = section.rpartition(".")
  held = list(config[section] if section else config)
  elsewhere = [other for other in _flat(config) if other.rpartition(".")[2] == name]
  near = elsewhere or [f"{section}.{other}".lstrip(".") for other in difflib.get_close_matches(name, held, n=1)]
  if plain in fields.RENAMED:
    return f"{flag}.{plain} is now {flag}.{fields.RENAMED[plain]}; write --{flag}.{fields.RENAMED[plain]}"
  hint = f"did you mean {' or '.join(f'--{flag}.{other}' for other in near[:3])}? " if near else ""
  where = ".".join(filter(None, (flag, section)))
  return f"{flag}.{plain} is unknown: {hint}{where} has the fields {', '.join(sorted(held))}"


def _import(path: str) -> types.ModuleType:
  """The module of a file, not entered into sys.modules: two files may have one name."""
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
  """An error of the Python of a config file in one line, with the line of the file where it happened."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  where = f", line {lines[-1]}," if lines else ""
  return UserError(
    f"config file {path!r}{where} fails with {type(error).__name__}: {' '.join(str(error).split())}; fix the file."
  )
