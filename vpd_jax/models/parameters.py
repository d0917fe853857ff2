"""Conversion between nnx models, used in traced functions only, and flat {name: array} dicts, used everywhere else.

Only this module uses nnx's graph functions. It also resolves rules for parameter names.
"""

import collections
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import PathParts
from jax.typing import DTypeLike

from vpd_jax.errors import UserError, first_items
from vpd_jax.models import initializers
from vpd_jax.types import Array, Buffer, Fields, ParamDict


class Inlined(nnx.Module):
  """A submodule whose arrays are named as if they were attributes of the parent module.

  It groups related parts without changing the names in checkpoints and conversion tables.
  """


class ModelSpec(NamedTuple):
  """Description of a model without arrays.

  Attributes:
    model: the modules with shapes instead of arrays, for their static attributes.
    graphdef: nnx's graph definition of the modules.
    paths: nnx path of every array by name.
    shapes: shape and dtype of every array by name.
    params, buffers, stats: names of trainable arrays, of arrays that are never trained, and of running statistics.
    draws: distribution of the initial values by name, for arrays of an Initializer with a HostKey.
    fold: converts arrays named in `shapes` to those of the modules if they differ, see lora.py.
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
    """Initial values of the named arrays on the host; they do not depend on the other arrays.

    Raises:
      ValueError: an array of a module that was not built with InitKeys.
    """
    if undrawn := sorted(set(names) - self.draws.keys()):
      raise UserError(f"no initializer is recorded for {undrawn[:5]}; build the model with InitKeys and Initializers.")
    return {name: self.draws[name](name) for name in names}

  def stored_in(self, dtype: DTypeLike, names: Iterable[str]) -> "ModelSpec":
    """The model with the named arrays in another dtype; integer arrays are unchanged."""
    selected = {name: self.shapes[name] for name in names}
    floats = {name: x for name, x in selected.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return self._replace(
      shapes=self.shapes | {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in floats.items()}
    )

  def merge(self, *arrays: ParamDict) -> Any:
    """The model with `arrays`, for one traced function; variables are copies, so that statistics can be updated."""
    named = {name: value for part in arrays for name, value in part.items()}
    missing, unknown = self.shapes.keys() - named.keys(), named.keys() - self.shapes.keys()
    if missing or unknown:
      raise UserError(f"arrays do not fit the model: missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}.")
    return self.partial(self.fold(named))

  def partial(self, named: ParamDict) -> Any:
    """As `merge`, with shapes instead of missing arrays, for functions that use only some of them."""
    state = nnx.from_flat_state([(path, named.get(name, self.shapes[name])) for name, path in self.paths.items()])
    return nnx.merge(self.graphdef, state, copy=True)


def _inlined(module: nnx.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  """Paths of the Inlined modules at and below `module`. nnx.iter_modules would also visit every array."""
  if isinstance(module, Inlined):
    yield path
  for name, value in vars(module).items():
    if isinstance(value, nnx.Module):
      yield from _inlined(value, (*path, name))


def _names(model: nnx.Module, paths: Iterable[PathParts]) -> list[str]:
  """Names of arrays, without the attribute names of Inlined modules."""
  inlined = set(_inlined(model))
  parts = [tuple(str(part) for part in path) for path in paths]
  return ["/".join(part for i, part in enumerate(path) if path[: i + 1] not in inlined) for path in parts]


class _Leaf(NamedTuple):
  """An array of a model that is built under tracing."""

  path: PathParts
  kind: type[nnx.Variable]
  draw: initializers.Draw | None


def describe(build: Callable[[], nnx.Module]) -> ModelSpec:
  """Describes the model that `build` returns, without allocating any array."""
  built: list[tuple[nnx.GraphDef, list[_Leaf]]] = []

  def traced() -> list[Array]:
    with initializers.recording() as record:
      graphdef, state = nnx.split(build())
    draws = {id(placeholder): draw for placeholder, draw in record}
    flat = [(path, leaf, leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]
    built.append((graphdef, [_Leaf(path, type(leaf), draws.get(id(value))) for path, leaf, value in flat]))
    return [value for _, _, value in flat]

  # nnx.eval_shape would work too, but takes twice as long, since it traverses the graph four more times.
  arrays = jax.eval_shape(traced)
  ((graphdef, leaves),) = built
  model = nnx.merge(graphdef, nnx.from_flat_state([(x.path, array) for x, array in zip(leaves, arrays, strict=True)]))
  names = _names(model, [x.path for x in leaves])
  supported = (nnx.Param, Buffer, nnx.BatchStat)
  if unsupported := [name for name, x in zip(names, leaves, strict=True) if not issubclass(x.kind, supported)]:
    raise TypeError(
      f"the model has state that checkpoints do not store: {unsupported}; use Param, Buffer or BatchStat."
    )
  if duplicates := [name for name, count in collections.Counter(names).items() if count > 1]:
    raise TypeError(f"two arrays of the model have one name: {duplicates}; rename an attribute of an Inlined module.")
  named = dict(zip(names, leaves, strict=True))
  params, buffers, stats = (
    frozenset(name for name, x in named.items() if issubclass(x.kind, cls)) for cls in supported
  )
  paths = {name: x.path for name, x in named.items()}
  draws = {name: x.draw for name, x in named.items() if x.draw}
  return ModelSpec(model, graphdef, paths, dict(zip(names, arrays, strict=True)), params, buffers, stats, draws)


@functools.lru_cache(maxsize=16)
def described(build: Callable[[], nnx.Module]) -> ModelSpec:
  """`describe`, once for all equal, hashable `build`: a command describes its model several times."""
  return describe(build)


def stats(model: nnx.Module) -> ParamDict:
  """The running statistics of `model` after a forward pass in training."""
  leaves = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
  names = _names(model, [path for path, _ in leaves])
  return {name: leaf.get_value() for name, (_, leaf) in zip(names, leaves, strict=True)}


def first_rules(names: Iterable[str], rules: Sequence[tuple[str, Any]], *, field: str) -> tuple[dict[str, int], str]:
  """The rule of each name: the first whose pattern matches in "/" + name (re.search).

  Args:
    names: full names; due to the leading slash, a pattern such as "/unet/" matches complete path components.
    rules: ordered (regular expression, value) pairs.
    field: name of the config option of the rules, for messages.

  Returns:
    Indices of rules by name, without names that match no rule; and a description of unused rules, which match no name
    or only names that earlier rules match, empty if there are none. A last rule for all remaining names, such as
    (r"", 1.0), may be unused.

  Raises:
    ValueError: a pattern is not a regular expression.
  """
  try:
    patterns = [re.compile(pattern) for pattern, _ in rules]
  except re.error as error:
    raise UserError(f"{field}: {error.pattern!r} is not a regular expression: {error}; correct it.") from error
  matching = {name: [i for i, pattern in enumerate(patterns) if pattern.search("/" + name)] for name in names}
  first = {name: indices[0] for name, indices in matching.items() if indices}
  unmatched, shadowed = [], []
  catch_all = [i for i, pattern in enumerate(patterns) if pattern.search("")]
  allowed = set(catch_all[:1]) & {len(rules) - 1} & {i for indices in matching.values() for i in indices}
  for i in sorted(set(range(len(rules))) - set(first.values()) - allowed):
    earlier = sorted({first[name] for name, indices in matching.items() if i in indices})
    if earlier:
      shadowed.append(f"{rules[i][0]!r} behind {', '.join(repr(rules[j][0]) for j in earlier)}")
    else:
      unmatched.append(rules[i][0])
  problems = [f"rules that match no array: {unmatched}"] if unmatched else []
  problems += (
    [f"rules that never apply because earlier rules match all their arrays: {', '.join(shadowed)}"] if shadowed else []
  )
  return first, "; ".join(problems)


def match_rules(
  names: Iterable[str], rules: Sequence[tuple[str, Any]], *, field: str, allow_unused: bool = False
) -> Fields:
  """The value of each name: that of its first rule; for the arguments see `first_rules`.

  Raises:
    ValueError: names that match no rule, or unused rules unless `allow_unused`; lists all of them.
  """
  names = list(names)
  first, unused = first_rules(names, rules, field=field)
  unmatched = sorted(set(names) - first.keys())
  problems = [f"{len(unmatched)} arrays match no rule: {first_items(unmatched)}; add one"] if unmatched else []
  problems += [f"{unused}; remove or correct them"] if unused and not allow_unused else []
  if problems:
    raise UserError(f"{field}: {'; '.join(problems)}.")
  return {name: rules[i][1] for name, i in first.items()}
