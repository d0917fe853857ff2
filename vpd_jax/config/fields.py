"""Which fields a config may hold: a field that nothing reads is refused, since it would be a wish without effect."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vpd_jax.errors import UserError

Section = dict[str, Any]  # of a config

# Section, "" for the top: every field of it that the program reads. Of the sections that are not here, what they name
# says it, see `look_up`.
FIELDS = {
  "": ("method", "neck", "head", "task", "data", "optim", "backbone", "eval", "init", "mesh", "seed", "dtype",
       "param_dtype", "frozen_dtype", "num_steps", "log_every", "eval_every", "save_every", "keep", "keep_best",
       "profile", "writer", "lora"),
  "optim": ("lr", "decay", "b1", "b2", "epsilon", "clip_norm", "schedule", "lr_groups", "decay_groups", "norm_group",
            "loss_group", "accumulation", "ema_decay", "moments"),
  "backbone": ("unet", "vae", "text", "image", "vit", "attention", "remat"),
  "eval": ("batch_size", "test_time", "coverage", "small_images", "blend", "checkpoint", "baselines", "panels"),
  "init": ("pretrained", "run", "clip", "lora", "vit"),
  "mesh": ("data", "fsdp", "rules"),
  "lora": ("rank", "alpha", "lr", "targets"),
}  # fmt: skip
# Of sections that name a constructor: what the section does not give, but the other parts do.
FILLED = ("self", "setup", "maps", "common", "lr")


# Options by their names in earlier versions: a config must say the new name, a workdir may still hold the old one.
RENAMED = {
  "data.colour": "data.color_jitter",
  "data.centre_jitter": "data.center_jitter",
  "eval.small": "eval.small_images",
}
# Options that earlier versions did not have, and what they did without.
ADDED = {
  "data.captions": "",
  "backbone.vae.latent_scale": 0.18215,
  "backbone.text.padding": -1,
  "optim.moments": "float32",
  "lora.rank": 0,
  "lora.alpha": 16.0,
  "lora.lr": 1.0,
  "lora.targets": (),
  "frozen_dtype": "float32",
  "eval.blend": "mean",
}


def with_new_names(flat: Mapping[str, object]) -> Section:
  """{dotted field: value} of a config that may have been written before an option was renamed or added."""
  return ADDED | {RENAMED.get(field, field): value for field, value in flat.items()}


def check(config: Any) -> None:
  """Raises ValueError where a section of FIELDS is none, or holds what is not there; names all of them."""
  problems = [unknown(config, FIELDS[""], "config")]
  problems += [unknown(config[name], known, f"config.{name}") for name, known in FIELDS.items() if name in config]
  if problems := list(filter(None, problems)):
    raise UserError("; ".join(problems) + ".")


def unknown(section: object, known: Sequence[str], where: str) -> str:
  """What is wrong with the fields of a section, and what may be meant; empty where nothing is.

  Args:
    section: a mapping.
    known: the fields that are read.
    where: name of the section, for the message.
  """
  if not isinstance(section, Mapping | ConfigDict):
    return f"{where}={section!r} must be a section with fields of {', '.join(known)}; correct it"
  strange = [field for field in section if field not in known]
  section_name = where.removeprefix("config.").split(" ")[0]
  new_names = {field: RENAMED.get(f"{section_name}.{field}", "").rpartition(".")[2] for field in strange}
  if renamed := [f"{field} is now {new}" for field, new in new_names.items() if new]:
    rest = [field for field in strange if not new_names[field]]
    also = f"; it does not take {rest}" if rest else ""
    return f"{where}: {', '.join(renamed)}; rename {'it' if len(renamed) == 1 else 'them'} in your config{also}"
  near = [match for field in strange for match in difflib.get_close_matches(str(field), known, n=1, cutoff=0.7)]
  hint = f" (did you mean {', '.join(near)}?)" if near else ""
  return f"{where} does not take {strange}{hint}; remove or correct them" if strange else ""


def misfit(
  entry: Callable[..., Any], section: Any, where: str, *, given: Iterable[str] = (), more: Iterable[str] = ()
) -> str:
  """What is wrong with the fields of a section that are the arguments of a class or function; empty where nothing is.

  Args:
    entry: what takes them.
    section: a mapping, a "name" in it is none of them.
    where: name of the section, for the message.
    given: arguments that are not the section's to give, beside FILLED.
    more: fields of the section that are not the entry's, but read elsewhere.
  """
  own = {key: value for key, value in arguments(entry).items() if key not in (*FILLED, *given)}
  if problem := unknown(section, (*more, *own), where):
    return problem
  absent = [key for key, value in own.items() if value.default is inspect.Parameter.empty and key not in section]
  return f"{where} needs {absent}; set them" if absent else ""


def look_up(
  table: Mapping[Any, Callable[..., Any]],
  section: object,
  field: str,
  *,
  given: Iterable[str] = (),
  more: Iterable[str] = (),
  required: Iterable[str] = (),
) -> Any:
  """The entry of a table that a section names; the section's other fields are arguments of the entry.

  Args:
    table: classes and functions by name.
    section: "name" and arguments.
    field: its name in the config.
    given, more: see `misfit`.
    required: arguments that the task gives, which the entry must take.

  Raises:
    ValueError: an unknown name, unknown fields, fields that are needed and not there.
  """
  name = section.get("name") if isinstance(section, Mapping | ConfigDict) else None
  if name not in table:
    raise UserError(f"config.{field}.name={name!r} is unknown; choose one of {sorted(table)}.")
  where = f"config.{field} of name {name!r}"
  if foreign := [key for key in required if key not in arguments(table[name])]:
    raise UserError(f"{where} is not made for what config.task gives, {foreign}; choose one that takes it.")
  if problem := misfit(table[name], section, where, given=(*given, *required), more=("name", *more)):
    raise UserError(problem + ".")
  return table[name]


def arguments(entry: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
  """What a class, of which flax hides it, or a function takes."""
  return inspect.signature(entry.__init__ if inspect.isclass(entry) else entry).parameters
