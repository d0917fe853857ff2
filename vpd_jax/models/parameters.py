"""Between nnx models, inside traced functions only, and flat {name: array} dicts, which live everywhere else.

The one file that touches nnx's graph functions; also the one home of per-name rules.
"""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.types import Buffer, Fields, ParamDict


class Inlined(nnx.Module):
  """A part whose arrays have the names they would have as attributes of the module that holds it.

  It groups what belongs together without a change of names, by which checkpoints and tables of conversion go.
  """


class ModelSpec(NamedTuple):
  """What a model is made of, without any array.

  Attributes:
    model: the modules with shapes in place of arrays; for what a method or head says of itself.
    graphdef: nnx's description of the modules.
    paths: nnx path of every array by name.
    shapes: shape and dtype of every array by name.
    params, buffers, stats: the names by kind: trainable, never trained, running statistics.
    draws: how fresh values are drawn, by name, of the arrays that an Initializer with a HostKey made.
    fold: makes the arrays of the modules of those that `shapes` names, where these are more, see lora.py.
  """

  model: Any
  graphdef: nnx.GraphDef
  paths: dict[str, tuple[Any, ...]]
  shapes: dict[str, jax.ShapeDtypeStruct]
  params: frozenset[str]
  buffers: frozenset[str]
  stats: frozenset[str]
  draws: dict[str, initializers.Draw]
  fold: Callable[[ParamDict], ParamDict] = lambda named: named

  def initialize(self, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Fresh values of the named arrays, on the host; the same ones whatever else is named or added to the model.

    Raises:
      ValueError: an array of a module that was not built with InitKeys.
    """
    if undrawn := sorted(set(names) - self.draws.keys()):
      raise UserError(f"nothing says how {undrawn[:5]} are drawn; build the model with InitKeys and Initializers.")
    return {name: self.draws[name](name) for name in names}

  def stored_in(self, dtype: DTypeLike, names: Iterable[str]) -> "ModelSpec":
    """The same model with the named arrays in another dtype, those of whole numbers as they are."""
    held = {name: self.shapes[name] for name in names}
    floats = {name: x for name, x in held.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return self._replace(
      shapes=self.shapes | {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in floats.items()}
    )

  def merge(self, *arrays: ParamDict) -> Any:
    """The model holding `arrays`, for one traced function; variables are copies, so statistics may change."""
    named = {name: value for part in arrays for name, value in part.items()}
    missing, unknown = self.shapes.keys() - named.keys(), named.keys() - self.shapes.keys()
    if missing or unknown:
      raise UserError(f"arrays do not fit the model: missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}.")
    return self.partial(self.fold(named))

  def partial(self, named: ParamDict) -> Any:
    """As `merge`, with mere shapes in place of the arrays that are not given: for what only uses some of them."""
    state = nnx.from_flat_state([(path, named.get(name, self.shapes[name])) for name, path in self.paths.items()])
    return nnx.merge(self.graphdef, state, copy=True)


def _leaves(model: nnx.Module) -> list[tuple[str, tuple[Any, ...], nnx.Variable]]:
  """(name, path, variable) of all arrays; the names leave the attributes out under which Inlined modules stand."""
  inlined = {path for path, module in nnx.iter_modules(model) if isinstance(module, Inlined)}
  name = lambda path: "/".join(str(part) for i, part in enumerate(path) if path[: i + 1] not in inlined)
  return [(name(path), path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))]


def describe(build: Callable[[], nnx.Module]) -> ModelSpec:
  """Names, shapes and kinds of the arrays of the model that `build` makes, without allocating any of them."""
  drawn: dict[str, initializers.Draw] = {}

  def recorded() -> nnx.Module:
    with initializers.recording() as record:
      model = build()
    draws = {id(placeholder): draw for placeholder, draw in record}
    for name, _, leaf in _leaves(model):
      if draw := draws.get(id(leaf.get_value())):
        drawn[name] = draw
    return model

  model = nnx.eval_shape(recorded)
  graphdef, leaves = nnx.graphdef(model), _leaves(model)
  known = (nnx.Param, Buffer, nnx.BatchStat)
  strange = [name for name, _, leaf in leaves if not isinstance(leaf, known)]
  if strange:
    raise TypeError(f"the model holds state that no checkpoint keeps: {strange}; use Param, Buffer or BatchStat.")
  if twice := [name for name, count in collections.Counter(name for name, _, _ in leaves).items() if count > 1]:
    raise TypeError(f"two arrays of the model have one name: {twice}; rename an attribute of an Inlined module.")
  params, buffers, stats = (frozenset(name for name, _, leaf in leaves if isinstance(leaf, kind)) for kind in known)
  shapes = {name: jax.ShapeDtypeStruct(leaf.get_value().shape, leaf.get_value().dtype) for name, _, leaf in leaves}
  return ModelSpec(model, graphdef, {name: path for name, path, _ in leaves}, shapes, params, buffers, stats, drawn)


def stats(model: nnx.Module) -> ParamDict:
  """The running statistics that a forward pass in training has left in `model`."""
  return {name: leaf.get_value() for name, _, leaf in _leaves(model) if isinstance(leaf, nnx.BatchStat)}


def first_rules(names: Iterable[str], rules: Sequence[tuple[str, Any]], *, field: str) -> tuple[dict[str, int], str]:
  """The rule that counts for each name: the first whose pattern is found in "/" + name.

  Args:
    names: full names; the leading slash lets a pattern such as "/unet/" name a whole level.
    rules: ordered (regular expression, value) pairs.
    field: name of the config option that holds the rules, for the message.

  Returns:
    Numbers of rules by name, without the names that match none; and what is wrong with the rules that count for no
    name, because they match none or because earlier rules take all that they match; empty where there are none. A last
    rule for whatever is left, such as (r"", 1.0), may find nothing left.

  Raises:
    ValueError: a pattern that is no regular expression.
  """
  try:
    patterns = [re.compile(pattern) for pattern, _ in rules]
  except re.error as error:
    raise UserError(f"{field}: {error.pattern!r} is no regular expression: {error}; correct it.") from error
  matching = {name: [i for i, pattern in enumerate(patterns) if pattern.search("/" + name)] for name in names}
  first = {name: found[0] for name, found in matching.items() if found}
  idle, shadowed = [], []
  rest = [i for i, pattern in enumerate(patterns) if pattern.search("")]
  allowed = set(rest[:1]) & {len(rules) - 1} & {i for found in matching.values() for i in found}
  for i in sorted(set(range(len(rules))) - set(first.values()) - allowed):
    before = sorted({first[name] for name, found in matching.items() if i in found})
    if before:
      shadowed.append(f"{rules[i][0]!r} behind {', '.join(repr(rules[j][0]) for j in before)}")
    else:
      idle.append(rules[i][0])
  problems = [f"rules that match no array: {idle}"] if idle else []
  problems += (
    [f"rules that come too late, earlier ones match all they match: {', '.join(shadowed)}"] if shadowed else []
  )
  return first, "; ".join(problems)


def assign(names: Iterable[str], rules: Sequence[tuple[str, Any]], *, field: str) -> Fields:
  """One value per name: of the first rule whose pattern is found in "/" + name.

  Args:
    names: full names; the leading slash lets a pattern such as "/unet/" name a whole level.
    rules: ordered (regular expression, value) pairs.
    field: name of the config option that holds the rules, for the message.

  Raises:
    ValueError: a name matches no rule, or a rule counts for no name; lists all of them.
  """
  names = list(names)
  first, idle = first_rules(names, rules, field=field)
  homeless = sorted(set(names) - first.keys())
  if homeless or idle:
    raise UserError(
      f"{field}: {len(homeless)} arrays match no rule {homeless[:10]}; {idle or 'rules that match no array: []'}. "
      "Add a rule, or remove or correct the idle one."
    )
  return {name: rules[i][1] for name, i in first.items()}
