"""Config files: `configs/nyu_depth.py:meta_prompts,tiny` -> a locked ConfigDict.

Imports only ml_collections and the standard library, because config files import this module themselves.
"""

import importlib.util
import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

PROJECT = pathlib.Path(__file__).resolve().parent.parent
STRUCTURE = ("method", "neck", "head", "task", "data", "optim", "backbone", "seed", "dtype")
INDIFFERENT = (
  "data.workers",
  "data.root",
  "backbone.attention",
  "backbone.remat",
  "method.class_vectors",
  "method.tokenizer",
)


def words(argument: str | None, **kinds: Sequence[str]) -> dict[str, str]:
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
      raise ValueError(f"config argument {word!r} is unknown; choose at most one of each of ({listed}).")
    if kind in chosen:
      raise ValueError(f"config argument {argument!r} names two of {kind}: {chosen[kind]!r} and {word!r}; keep one.")
    chosen[kind] = word
  return {kind: chosen.get(kind, choices[0]) for kind, choices in kinds.items()}


def resolve(config: str) -> str:
  """'path:words' with the path made absolute.

  A relative path is looked up in the working directory, then beside the package; '.py' may be left out.

  Raises:
    ValueError: where neither file exists; the message names both.
  """
  path, colon, argument = config.partition(":")
  if not path:
    raise ValueError(f"config={config!r} names no file; give one like 'configs/nyu_depth.py:vpd'.")
  file = pathlib.Path(path if path.endswith(".py") else f"{path}.py").expanduser()
  candidates = list(dict.fromkeys([pathlib.Path.cwd() / file, PROJECT / file]))
  for candidate in candidates:
    if candidate.is_file():
      return f"{candidate.resolve()}{colon}{argument}"
  raise ValueError(f"config file {path!r} was not found: no file {' and no file '.join(map(str, candidates))}.")


def load(config: str | ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A locked ConfigDict of a config string (the value of --config), or a locked copy of a ConfigDict.

  Raises:
    ValueError: where the file is not found, has no get_config, or refuses the words.
  """
  if isinstance(config, ml_collections.ConfigDict):
    return config.copy_and_resolve_references().lock()
  path, colon, argument = resolve(config).partition(":")
  module = _import(path)
  if not hasattr(module, "get_config"):
    raise ValueError(f"config file {path!r} has no function get_config.")
  return (module.get_config(argument) if colon else module.get_config()).lock()


def resolve_argv(argv: Sequence[str], flag: str = "config") -> list[str]:
  """The command line with the value of --config made absolute, as config_flags looks in the working directory only.

  The file is loaded once here, so that a wrong word is the one-line ValueError of `words` and not absl's traceback.
  """
  resolved = list(argv)
  for i, word in enumerate(argv):
    if word == "--":
      break
    if match := re.fullmatch(rf"(--?{flag}=)(.*)", word):
      resolved[i] = match[1] + _checked(match[2])
    elif re.fullmatch(rf"--?{flag}", word) and i + 1 < len(argv):
      resolved[i + 1] = _checked(argv[i + 1])
  return resolved


def name(config: str) -> str:
  """The name of a run: the file's stem and the sorted words: 'configs/rooms.py:tiny,depth' -> 'rooms-depth-tiny'."""
  path, _, argument = config.partition(":")
  chosen = sorted(filter(None, (part.strip() for part in argument.split(","))))
  return "-".join([pathlib.PurePath(path).name.removesuffix(".py"), *chosen])


def workdir(config: str) -> str:
  """The default folder of a run: 'runs/<name>', below the working directory."""
  return f"runs/{name(config)}"


def differences(
  old: Mapping[str, Any] | ml_collections.ConfigDict,
  new: Mapping[str, Any] | ml_collections.ConfigDict,
  prefixes: Sequence[str] = STRUCTURE,
  indifferent: Sequence[str] = INDIFFERENT,
) -> list[str]:
  """What changed between two configs, one line a field: 'optim.lr: 0.0005 -> 0.001'.

  Either may have gone through JSON: tuples and lists with equal items are equal.

  Args:
    old: the config stored in a checkpoint.
    new: the config of this run.
    prefixes: sections, or fields of the top level, to compare.
    indifferent: fields among them that may change, since no number depends on them.
  """
  old_fields, new_fields = _flat(old), _flat(new)
  lines = []
  for field in sorted(old_fields.keys() | new_fields.keys()):
    before, after = old_fields.get(field, _ABSENT), new_fields.get(field, _ABSENT)
    if field.split(".", 1)[0] in prefixes and field not in indifferent and before != after:
      lines.append(f"{field}: {before!r} -> {after!r}")
  return lines


class _Absent:
  """Stands for a field that one of two configs does not have."""

  def __repr__(self) -> str:
    return "absent"


_ABSENT = _Absent()


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
  """{dotted field: value}; an empty section is a field itself."""
  if isinstance(section, ml_collections.ConfigDict):
    section = section.to_dict()
  if not isinstance(section, Mapping) or not section:
    return {prefix: _as_tuples(section)} if prefix else {}
  fields: dict[str, Any] = {}
  for key, value in section.items():
    fields |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
  return fields


def _as_tuples(value: Any) -> Any:
  """Lists as tuples, at every depth."""
  return tuple(_as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _checked(config: str) -> str:
  """The resolved config string, after loading it once."""
  resolved = resolve(config)
  load(resolved)
  return resolved


def _import(path: str) -> types.ModuleType:
  """The module of a file, not entered into sys.modules: two files may have one name."""
  spec = importlib.util.spec_from_file_location(f"vpd_jax_config_{pathlib.PurePath(path).stem}", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"config file {path!r} cannot be imported as Python.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
