"""The engine of conversion: a table of rules, used in both directions and checked on both sides.

Our names keep the source's, with '/' for '.', so a rule is a pair of prefixes: everything below the one is found below
the other under the same name. Only the last part changes with the kind of layer (`weight` -> `kernel`, `scale` or
`embedding`), and the axes with it; both follow from a tensor's number of dimensions, hence both directions from one
description. Gradients and moments have the names and shapes of their parameters, so a table carries them as well.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vpd_jax.convert import finite
from vpd_jax.convert.formats.lazy_tensor import LazyTensor
from vpd_jax.errors import UserError
from vpd_jax.types import Options


class Shaped(Protocol):
  """What is to be filled: an array, or only what is known of one."""

  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def dtype(self) -> np.dtype: ...


class TensorLayout(NamedTuple):
  """How one kind of tensor is called and laid out on both sides.

  Attributes:
    source, target: last part of the name; empty where the rule names the tensor itself.
    axes: our axes in terms of the source's; None leaves a tensor of any number of dimensions as it is.
    source_ndim: dimensions in the source, where fewer than ours: trailing ones of size 1 are added.
  """

  source: str
  target: str
  axes: tuple[int, ...] | None
  source_ndim: int | None = None

  def fits(self, ndim: int, *, back: bool = False) -> bool:
    if self.axes is None:
      return True
    return ndim == (len(self.axes) if back or self.source_ndim is None else self.source_ndim)

  def forward(self, x: np.ndarray) -> np.ndarray:
    """PyTorch's layout -> ours."""
    return x if self.axes is None else x.reshape(x.shape + (1,) * (len(self.axes) - x.ndim)).transpose(self.axes)

  def backward(self, x: np.ndarray) -> np.ndarray:
    """Our layout -> PyTorch's."""
    if self.axes is None:
      return x
    x = x.transpose(np.argsort(self.axes))
    return x if self.source_ndim is None else x.reshape(x.shape[: self.source_ndim])


plain = TensorLayout("", "", None)
norm = TensorLayout("weight", "scale", (0,))
bias = TensorLayout("bias", "bias", (0,))
linear = TensorLayout("weight", "kernel", (1, 0))
embedding = TensorLayout("weight", "embedding", (0, 1))
bare_embedding = TensorLayout("", "embedding", (0, 1))  # a tensor of its own in the source, without `weight`
conv = TensorLayout("weight", "kernel", (2, 3, 1, 0))  # OIHW -> HWIO
deconv = TensorLayout("weight", "kernel", (2, 3, 0, 1))  # IOHW -> HWIO
linear_as_conv = TensorLayout("weight", "kernel", (2, 3, 1, 0), source_ndim=2)  # OI -> 11IO
mean = TensorLayout("running_mean", "mean", (0,))
var = TensorLayout("running_var", "var", (0,))

LAYER = (norm, linear, conv, bias)
BATCH_NORM = (mean, var)
COUNTER = "num_batches_tracked"  # PyTorch counts the steps in every BatchNorm; we have one count in the state.


@dataclasses.dataclass(frozen=True)
class Rule:
  """Everything below `source` goes below `target`.

  Attributes:
    source, target: prefixes in whole parts, '.' between parts in the source, '/' in the target.
    leaves: the kinds of tensors expected there.
    optional: whether a source may lack all of it.
  """

  source: str
  target: str
  leaves: tuple[TensorLayout, ...] = LAYER
  optional: bool = False

  def to_target(self, name: str, ndim: int) -> tuple[str, TensorLayout] | None:
    for leaf in self.leaves:
      middle = _between(name, self.source, leaf.source, ".")
      if middle is not None and leaf.fits(ndim):
        return "/".join([self.target, *middle, *filter(None, [leaf.target])]), leaf
    return None

  def to_source(self, name: str, ndim: int) -> tuple[str, TensorLayout] | None:
    for leaf in self.leaves:
      middle = _between(name, self.target, leaf.target, "/")
      if middle is not None and leaf.fits(ndim, back=True):
        return ".".join([self.source, *middle, *filter(None, [leaf.source])]), leaf
    return None


@dataclasses.dataclass(frozen=True)
class Same:
  """Everything is in our names and layouts already."""

  optional: bool = True

  def to_target(self, name: str, ndim: int) -> tuple[str, TensorLayout]:
    return name, plain


@dataclasses.dataclass(frozen=True)
class Drop:
  """Source names that match `pattern` as a whole are left out, because of `why`.

  Attributes:
    pattern, why: see above.
    optional: whether a source may lack all of them.
    repeats: a prefix; below it stand, under the names that the pattern's first group captures, tensors that the ones
      left out must equal. Empty: they need not equal any.
  """

  pattern: str
  why: str
  optional: bool = False
  repeats: str = ""


def drop(pattern: str, why: str, *, optional: bool = False) -> Drop:
  """A row of a table: what is left out, and the reason."""
  return Drop(pattern, why, optional)


DROP_COUNTERS = drop(rf".*\.{COUNTER}", "our state counts the steps once", optional=True)


class ConversionError(UserError):
  """Everything that does not fit, in one message."""


class NotFinite(UserError):
  """Weights with NaN or infinity among them."""


@dataclasses.dataclass(frozen=True)
class Report:
  """What a conversion did.

  Attributes:
    table: name of the table.
    used: target name by source name.
    dropped: reason by source name.
    fresh: targets that the source does not hold and that keep their initial values.
    step: steps the source was trained for, where it counts them.
  """

  table: str
  used: dict[str, str]
  dropped: dict[str, str]
  fresh: tuple[str, ...]
  step: int = 0

  def summary(self) -> str:
    """One line."""
    reasons = collections.Counter(self.dropped.values())
    listed = "".join(f"; {count} dropped: {why}" for why, count in reasons.items())
    return f"{self.table}: {len(self.used)} tensors used, {len(self.fresh)} arrays left fresh{listed}"


def convert(
  source: Mapping[str, np.ndarray | LazyTensor],
  rules: Sequence[Rule | Drop | Same],
  targets: Mapping[str, Shaped],
  *,
  fresh: Iterable[str] = (),
  table: str = "conversion",
) -> tuple[dict[str, np.ndarray], Report]:
  """Reads a source into our names, layouts and dtypes, tensor by tensor.

  Args:
    source: arrays, or what becomes one under `np.asarray`, by their own names; needs `.ndim` and `.shape` before.
    rules: the table.
    targets: what to fill, by our names; anything with `.shape` and `.dtype`.
    fresh: regular expressions, found in "/" + name, of targets that may stay unfilled.
    table: name of the table, for messages.

  Returns:
    The filled targets, contiguous, and a report; targets left fresh are not among them.

  Raises:
    ConversionError: source names no rule or two rules match, unknown, doubly filled, unfilled or misshapen targets and
      rules without effect, all of them at once, nothing having been read by then; then tensors that differ from those
      that they should repeat.
    NotFinite: tensors that hold NaN or infinity, as they are or in the dtype of their target; all at once.
  """
  plan, dropped, problems = _plan(source, rules)
  for name, (target, leaf) in plan.items():
    shape = leaf.forward(phantom(source[name].shape)).shape
    if target not in targets:
      problems["have no place in the model"].append(f"{name} -> {target}")
    elif shape != tuple(targets[target].shape):
      problems["have the wrong shape"].append(
        f"{name} gives {list(shape)}, {target} needs {list(targets[target].shape)}"
      )
  filled = collections.Counter(target for target, _ in plan.values())
  problems["are filled twice"] = [target for target, count in filled.items() if count > 1]
  absent = [target for target in targets if target not in filled]
  patterns = tuple(fresh)
  problems["are filled by nothing and may not stay fresh"] = [
    target for target in absent if not any(re.search(pattern, "/" + target) for pattern in patterns)
  ]
  _raise_all(problems, f"{table}: the weights do not fit")
  differing = [
    f"{name} from {original}" for name, original in _repeated(source, rules) if not _equal(source, name, original)
  ]
  _raise_all({"differ from what they should repeat": differing}, f"{table}: the weights do not fit")
  named, wrong = {}, {}
  for name, (target, leaf) in plan.items():
    with np.errstate(over="ignore"):  # counted below
      named[target] = np.array(leaf.forward(np.asarray(source[name])), targets[target].dtype, order="C", copy=None)
    if found := finite.missing({name: named[target]}):
      wrong |= {f"{name} as {named[target].dtype}": found[name]}
  if wrong:
    raise NotFinite(f"{table}: {finite.in_words(wrong)}; {finite.REMEDY}.")
  return named, Report(table, {name: target for name, (target, _) in plan.items()}, dropped, tuple(absent))


def _plan(
  source: Mapping[str, np.ndarray | LazyTensor], rules: Sequence[Rule | Drop | Same]
) -> tuple[dict[str, tuple[str, TensorLayout]], dict[str, str], dict[str, list[str]]]:
  """({name: (target, leaf)}, {name: reason it is dropped}, problems)."""
  plan, dropped, problems, effective = {}, {}, collections.defaultdict(list), set()
  for name, value in source.items():
    found = []
    for rule in rules:
      if isinstance(rule, Drop):
        match = rule.why if re.fullmatch(rule.pattern, name) else None
      else:
        match = rule.to_target(name, value.ndim)
      if match is not None:
        found.append(match)
        effective.add(rule)
    if len(found) != 1:
      kind = "match no rule" if not found else "match more than one rule"
      problems[kind].append(f"{name} {list(value.shape)}")
    elif isinstance(found[0], str):
      dropped[name] = found[0]
    else:
      plan[name] = found[0]
  problems["are rules without effect (the source lacks what they describe)"] = [
    rule.pattern if isinstance(rule, Drop) else rule.source
    for rule in rules
    if rule not in effective and not rule.optional and not isinstance(rule, Same)
  ]
  return plan, dropped, problems


def to_source(named: Mapping[str, npt.ArrayLike], rules: Sequence[Rule | Drop]) -> dict[str, np.ndarray]:
  """The way back, for any part of the parameters, or for their gradients or moments.

  Args:
    named: arrays by our names.
    rules: the table.

  Returns:
    The same arrays by the source's names and in its layout; views where the layout allows.

  Raises:
    ConversionError: names that no rule or more than one rule leads to.
  """
  result, problems = {}, collections.defaultdict(list)
  for name, value in named.items():
    array = np.asarray(value)
    found = [rule.to_source(name, array.ndim) for rule in rules if isinstance(rule, Rule)]
    found = [match for match in found if match is not None]
    if len(found) == 1:
      result[found[0][0]] = found[0][1].backward(array)
    else:
      problems["match no rule" if not found else "match more than one rule"].append(f"{name} {list(array.shape)}")
  _raise_all(problems, "these arrays have no name in the source")
  return result


def export(
  named: Mapping[str, npt.ArrayLike], rules: Sequence[Rule | Drop], manifest: Sequence[Options], step: int
) -> dict[str, np.ndarray]:
  """The state dict that a manifest describes: its names, shapes, dtypes and order.

  Args:
    named: all arrays of the model by our names: trained, frozen and statistics.
    rules: the table.
    manifest: entries {name, shape, dtype} and, where a tensor repeats an earlier one, {alias_of}.
    step: number of finished steps, for every `num_batches_tracked`.

  Raises:
    ConversionError: entries that nothing fills, arrays without an entry, wrong shapes, numbers beyond the dtype; all at
      once.
  """
  arrays, problems, result = to_source(named, rules), collections.defaultdict(list), {}
  for entry in manifest:
    name, shape, origin = entry["name"], tuple(entry["shape"]), entry.get("alias_of") or entry["name"]
    # PyTorch's counter is a scalar; some tools store it as [1].
    counter = np.full(shape if shape == (1,) else (), step)
    value = counter if origin.endswith(f".{COUNTER}") else arrays.get(origin)
    if value is None:
      problems["are in the manifest, but not in the weights"].append(name)
    elif value.shape != shape:
      problems["have the wrong shape"].append(f"{name} is {list(value.shape)}, the manifest says {list(shape)}")
    else:
      with np.errstate(over="ignore"):
        result[name] = value.astype(entry["dtype"], copy=False)
      if result[name].dtype.itemsize < value.dtype.itemsize and not np.isfinite(result[name]).all():
        problems["do not fit their dtype"].append(f"{name}, {entry['dtype']}")
  problems["are in the weights, but not in the manifest"] = sorted(arrays.keys() - {e["name"] for e in manifest})
  _raise_all(problems, "the weights do not fit the manifest")
  return result


def _between(name: str, prefix: str, last: str, separator: str) -> list[str] | None:
  """The parts of `name` between the prefix and the last part; None where one of them is not its own."""
  if not name.startswith(prefix) or not name.endswith(last):
    return None
  parts, first = name.split(separator), prefix.split(separator)
  end = [last] if last else []
  if parts[: len(first)] != first or parts[len(parts) - len(end) :] != end or len(parts) < len(first) + len(end):
    return None
  middle = parts[len(first) : len(parts) - len(end)]
  return middle if last or not middle else None


def _repeated(source: Iterable[str], rules: Sequence[Rule | Drop | Same]) -> Iterator[tuple[str, str]]:
  """Names that are left out, each with the name of the tensor that it should repeat."""
  for rule in rules:
    if isinstance(rule, Drop) and rule.repeats:
      yield from (
        (name, f"{rule.repeats}.{match[1]}") for name in source if (match := re.fullmatch(rule.pattern, name))
      )


def _equal(source: Mapping[str, np.ndarray | LazyTensor], name: str, other: str) -> bool:
  return other in source and np.array_equal(np.asarray(source[name]), np.asarray(source[other]), equal_nan=True)


def phantom(shape: Sequence[int]) -> np.ndarray:
  """An array of that shape that takes no memory, to see what a transposition makes of it."""
  return np.broadcast_to(np.zeros((), np.int8), tuple(shape))


def _raise_all(problems: Mapping[str, Sequence[str]], heading: str) -> None:
  lines = []
  for kind, items in problems.items():
    more = f", and {len(items) - 10} more" if len(items) > 10 else ""
    lines += [f"{len(items)} {kind}: {', '.join(items[:10])}{more}"] if items else []
  if lines:
    raise ConversionError("\n  ".join([f"{heading}:", *lines]))
