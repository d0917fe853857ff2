"""Between nnx models, inside traced functions only, and flat {name: array} dicts, which live everywhere else.

The one file that touches nnx's graph functions; also the one home of per-name rules.
"""

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jax.typing import DTypeLike

from vpd_jax.errors import UserError
from vpd_jax.models import initializers
from vpd_jax.types import Array, Buffer, Fields, ParamDict


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
  paths: dict[str, PathParts]
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


def _inlined(module: nnx.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  """Paths of the Inlined modules at and below `module`. nnx.iter_modules would look at every array too."""
  if isinstance(module, Inlined):
    yield path
  for name, value in vars(module).items():
    if isinstance(value, nnx.Module):
      yield from _inlined(value, (*path, name))


def _names(model: nnx.Module, paths: Iterable[PathParts]) -> list[str]:
  """Names of arrays; they leave the attributes out under which Inlined modules stand."""
  inlined = set(_inlined(model))
  parts = [tuple(str(part) for part in path) for path in paths]
  return ["/".join(part for i, part in enumerate(path) if path[: i + 1] not in inlined) for path in parts]


class _Leaf(NamedTuple):
  """One array of a model that is built under tracing."""

  path: PathParts
  kind: type[nnx.Variable]
  draw: initializers.Draw | None


def describe(build: Callable[[], nnx.Module]) -> ModelSpec:
  """Names, shapes and kinds of the arrays of the model that `build` makes, without allocating any of them."""
  built: list[tuple[nnx.GraphDef, list[_Leaf]]] = []

  def traced() -> list[Array]:
    with initializers.recording() as record:
      graphdef, state = nnx.split(build())
    draws = {id(placeholder): draw for placeholder, draw in record}
    flat = [(path, leaf, leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]
    built.append((graphdef, [_Leaf(path, type(leaf), draws.get(id(value))) for path, leaf, value in flat]))
    return [value for _, _, value in flat]

  # nnx.eval_shape would do, but goes over the graph four times more, which takes as long as all the rest.
  arrays = jax.eval_shape(traced)
  ((graphdef, leaves),) = built
  model = nnx.merge(graphdef, nnx.from_flat_state([(x.path, array) for x, array in zip(leaves, arrays, strict=True)]))
  names = _names(model, [x.path for x in leaves])
  known = (nnx.Param, Buffer, nnx.BatchStat)
  if strange := [name for name, x in zip(names, leaves, strict=True) if not issubclass(x.kind, known)]:
    raise TypeError(f"the model holds state that no checkpoint keeps: {strange}; use Param, Buffer or BatchStat.")
  if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
    raise TypeError(f"two arrays of the model have one name: {twice}; rename an attribute of an Inlined module.")
  named = dict(zip(names, leaves, strict=True))
  params, buffers, stats = (frozenset(name for name, x in named.items() if issubclass(x.kind, kind)) for kind in known)
  paths = {name: x.path for name, x in named.items()}
  draws = {name: x.draw for name, x in named.items() if x.draw}
  return ModelSpec(model, graphdef, paths, dict(zip(names, arrays, strict=True)), params, buffers, stats, draws)


def stats(model: nnx.Module) -> ParamDict:
  """The running statistics that a forward pass in training has left in `model`."""
  leaves = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
  names = _names(model, [path for path, _ in leaves])
  return {name: leaf.get_value() for name, (_, leaf) in zip(names, leaves, strict=True)}


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
