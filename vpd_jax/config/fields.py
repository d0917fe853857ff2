"""The known fields of a config. A field that nothing reads is rejected, because setting it would have no effect."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vpd_jax.errors import UserError, check_choice

Section = dict[str, Any]  # a section of a config

# The fields that the program reads, by section; "" is the top level. Sections that are not listed name a constructor,
# whose arguments are their fields, see `look_up`.
FIELDS = {
  "": ("method", "neck", "head", "task", "data", "optim", "backbone", "eval", "init", "mesh", "seed", "dtype",
       "param_dtype", "frozen_dtype", "num_steps", "log_every", "eval_every", "save_every", "keep", "keep_best",
       "profile", "writer", "lora"),
  "optim": ("lr", "decay", "b1", "b2", "epsilon", "clip_norm", "schedule", "lr_groups", "decay_groups", "norm_group",
            "loss_group", "accumulation", "ema_decay", "moments"),
  "backbone": ("unet", "vae", "text", "image", "vit", "attention", "remat", "remat_policy"),
  "eval": ("batch_size", "test_time", "coverage", "small_images", "blend", "checkpoint", "baselines", "panels"),
  "init": ("pretrained", "run", "clip", "lora", "vit"),
  "mesh": ("data", "fsdp", "rules"),
  "lora": ("rank", "alpha", "lr", "targets"),
}  # fmt: skip
# Arguments of constructors that come from other parts of the program instead of the config section.
PROVIDED = ("self", "setup", "maps", "common", "lr")

# Renamed options, {old: new}. A config must use the new name; a workdir may still hold the old one.
RENAMED = {
  "data.colour": "data.color_jitter",
  "data.centre_jitter": "data.center_jitter",
  "eval.small": "eval.small_images",
}
# Options that earlier versions did not have, with the values that reproduce their behavior.
ADDED = {
  "data.captions": "",
  "data.reshuffle_each_epoch": True,
  "backbone.vae.latent_scale": 0.18215,
  "backbone.text.padding": -1,
  "optim.moments": "float32",
  "lora.rank": 0,
  "lora.alpha": 16.0,
  "lora.lr": 1.0,
  "lora.targets": (),
  "frozen_dtype": "float32",
  "eval.blend": "mean",
  "backbone.remat_policy": "full",
}


def with_new_names(flat: Mapping[str, object]) -> Section:
  """{dotted field: value} with current names, of a config that may predate renamed or added options."""
  return ADDED | {RENAMED.get(field, field): value for field, value in flat.items()}


def check(config: Any) -> None:
  """Raises ValueError if an entry of FIELDS is not a section or has unknown fields; lists all problems."""
  problems = [unknown(config, FIELDS[""], "config")]
  problems += [unknown(config[name], known, f"config.{name}") for name, known in FIELDS.items() if name in config]
  if problems := list(filter(None, problems)):
    raise UserError("; ".join(problems) + ".")


def unknown(section: object, known: Sequence[str], where: str) -> str:
  """Describes unknown fields of a section and suggests close matches; empty if all fields are known.

  Args:
    section: a mapping.
    known: the names of the valid fields.
    where: name of the section, for the message.
  """
  if not isinstance(section, Mapping | ConfigDict):
    return f"{where}={section!r} must be a section with fields of {', '.join(known)}; correct it"
  unknown_fields = [field for field in section if field not in known]
  section_name = where.removeprefix("config.").split(" ")[0]
  new_names = {field: RENAMED.get(f"{section_name}.{field}", "").rpartition(".")[2] for field in unknown_fields}
  if renamed := [f"{field} is now {new}" for field, new in new_names.items() if new]:
    rest = [field for field in unknown_fields if not new_names[field]]
    also = f"; it does not take {rest}" if rest else ""
    return f"{where}: {', '.join(renamed)}; rename {'it' if len(renamed) == 1 else 'them'} in your config{also}"
  matches = [
    match for field in unknown_fields for match in difflib.get_close_matches(str(field), known, n=1, cutoff=0.7)
  ]
  hint = f" (did you mean {', '.join(matches)}?)" if matches else ""
  return f"{where} does not take {unknown_fields}{hint}; remove or correct them" if unknown_fields else ""


def misfit(
  entry: Callable[..., Any], section: Any, where: str, *, given: Iterable[str] = (), more: Iterable[str] = ()
) -> str:
  """Describes fields of a section that do not match the arguments of a class or function; empty if they match.

  Args:
    entry: the class or function.
    section: a mapping; its "name" is not an argument.
    where: name of the section, for the message.
    given: arguments that the section must not set, besides PROVIDED.
    more: fields of the section that are not arguments of the entry, but are read elsewhere.
  """
  parameters = {key: value for key, value in arguments(entry).items() if key not in (*PROVIDED, *given)}
  if problem := unknown(section, (*more, *parameters), where):
    return problem
  missing = [
    key for key, value in parameters.items() if value.default is inspect.Parameter.empty and key not in section
  ]
  return f"{where} needs {missing}; set them" if missing else ""


def look_up(
  table: Mapping[Any, Callable[..., Any]],
  section: object,
  field: str,
  *,
  given: Iterable[str] = (),
  more: Iterable[str] = (),
  required: Iterable[str] = (),
) -> Any:
  """Looks up the entry of a table by a section's "name"; the other fields of the section are arguments of the entry.

  Args:
    table: classes and functions by name.
    section: "name" and the arguments.
    field: its name in the config.
    given, more: see `misfit`.
    required: arguments that the task provides and the entry must accept.

  Raises:
    ValueError: for an unknown name, unknown fields or missing required fields.
  """
  name = section.get("name") if isinstance(section, Mapping | ConfigDict) else None
  check_choice(f"config.{field}.name", name, sorted(table))
  where = f"config.{field} of name {name!r}"
  if unsupported := [key for key in required if key not in arguments(table[name])]:
    raise UserError(f"{where} does not accept {unsupported}, which config.task passes to it; choose one that does.")
  if problem := misfit(table[name], section, where, given=(*given, *required), more=("name", *more)):
    raise UserError(problem + ".")
  return table[name]


def arguments(entry: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
  """The parameters of a function, or of the `__init__` of a class, whose signature Flax hides."""
  return inspect.signature(entry.__init__ if inspect.isclass(entry) else entry).parameters
