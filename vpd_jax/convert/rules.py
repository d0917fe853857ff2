"""The conversion engine: a table of rules, applied in both directions and checked on both sides.

Our names are those of the source, with '/' for '.', so a rule is a pair of prefixes: everything below one is stored
below the other under the same name. Only the last part of a name (`weight` -> `kernel`, `scale` or `embedding`) and the
axes depend on the layer type; both follow from the number of dimensions, so one table describes both directions.
Gradients and moments have the names and shapes of their parameters, so a table also converts them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vpd_jax.convert import finite
from vpd_jax.convert.formats.lazy_tensor import LazyTensor
from vpd_jax.errors import UserError, first_items
from vpd_jax.types import Options

XLA_ALIGNMENT = 64  # bytes; XLA's CPU devices take over memory of the host that is aligned to it


class Shaped(Protocol):
  """An array, or its shape and dtype alone."""

  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def dtype(self) -> np.dtype: ...


class TensorLayout(NamedTuple):
  """The last part of the name and the axes of one type of tensor, on both sides.

  Attributes:
    source, target: last part of the name; empty if the rule names the tensor itself.
    axes: our axes in terms of the source's; None keeps the layout, for any number of dimensions.
    source_ndim: number of dimensions in the source, if fewer than ours: trailing ones of size 1 are added.
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
bare_embedding = TensorLayout("", "embedding", (0, 1))  # a bare tensor in the source, without `weight`
conv = TensorLayout("weight", "kernel", (2, 3, 1, 0))  # OIHW -> HWIO
deconv = TensorLayout("weight", "kernel", (2, 3, 0, 1))  # IOHW -> HWIO
linear_as_conv = TensorLayout("weight", "kernel", (2, 3, 1, 0), source_ndim=2)  # OI -> 11IO
mean = TensorLayout("running_mean", "mean", (0,))
var = TensorLayout("running_var", "var", (0,))

LAYER = (norm, linear, conv, bias)
BATCH_NORM = (mean, var)
COUNTER = "num_batches_tracked"  # Every BatchNorm of PyTorch counts the steps; our train state has one counter.


@dataclasses.dataclass(frozen=True)
class Rule:
  """Maps everything below `source` to `target`.

  Attributes:
    source, target: prefixes of complete name parts, separated by '.' in the source and '/' in the target.
    leaves: layouts of the tensors below them.
    optional: whether the source may contain none of them.
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
  """The identity: names and layouts are already ours."""

  optional: bool = True

  def to_target(self, name: str, ndim: int) -> tuple[str, TensorLayout]:
    return name, plain


@dataclasses.dataclass(frozen=True)
class Drop:
  """Drops the source tensors whose full name matches `pattern`.

  Attributes:
    pattern: regular expression.
    why: the reason, for the report.
    optional: whether the source may contain none of them.
    repeats: a prefix. A dropped tensor must equal the tensor below it whose name the first group of the pattern
      captures. Empty: no such check.
  """

  pattern: str
  why: str
  optional: bool = False
  repeats: str = ""


DROP_COUNTERS = Drop(rf".*\.{COUNTER}", "our state counts the steps once", optional=True)


class ConversionError(UserError):
  """Weights that do not fit; one message lists all problems."""


class NotFinite(UserError):
  """Weights that contain NaN or infinity."""


@dataclasses.dataclass(frozen=True)
class Report:
  """Summary of a conversion.

  Attributes:
    table: name of the table.
    used: target name by source name.
    dropped: reason by source name.
    fresh: targets that the source does not contain and that keep their initial values.
    step: number of training steps of the source, if it counts them.
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
  aligned: bool = False,
) -> tuple[dict[str, np.ndarray], Report]:
  """Converts a source to our names, layouts and dtypes, tensor by tensor.

  Args:
    source: arrays, or objects with `.ndim` and `.shape` that `np.asarray` reads, by the source's names.
    rules: the table.
    targets: arrays to fill, by our names; anything with `.shape` and `.dtype`.
    fresh: regular expressions, searched in "/" + name, of targets that may keep their initial values.
    table: name of the table, for messages.
    aligned: align copies in memory such that a CPU device takes them over instead of copying them. For prediction; a
      program to which such arrays are donated, as in training, has to copy them first.

  Returns:
    The filled targets, contiguous, and a report. Targets that keep their initial values are not included.

  Raises:
    ConversionError: for source names that match no rule or several, for unknown, unfilled or wrongly shaped targets,
      targets that are filled twice, and rules without effect, all reported together before any tensor is read; then for
      tensors that differ from those that they should repeat.
    NotFinite: for tensors that contain NaN or infinity, in the source or in the dtype of their target; lists all.
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
  unfilled = [target for target in targets if target not in filled]
  patterns = tuple(fresh)
  problems["are filled by nothing and may not stay fresh"] = [
    target for target in unfilled if not any(re.search(pattern, "/" + target) for pattern in patterns)
  ]
  _raise_all(problems, f"{table}: the weights do not fit")
  differing = [
    f"{name} from {original}" for name, original in _repeated(source, rules) if not _equal(source, name, original)
  ]
  _raise_all({"differ from what they should repeat": differing}, f"{table}: the weights do not fit")
  named, non_finite = {}, {}
  for name, (target, leaf) in plan.items():
    with np.errstate(over="ignore"):  # overflows are counted below
      array, dtype = leaf.forward(np.asarray(source[name])), targets[target].dtype
      named[target] = _aligned(array, dtype) if aligned else np.array(array, dtype, order="C", copy=None)
    if counts := finite.count_non_finite({name: named[target]}):
      non_finite |= {f"{name} as {named[target].dtype}": counts[name]}
  if non_finite:
    raise NotFinite(f"{table}: {finite.summary(non_finite)}; {finite.REMEDY}.")
  return named, Report(table, {name: target for name, (target, _) in plan.items()}, dropped, tuple(unfilled))


def _plan(
  source: Mapping[str, np.ndarray | LazyTensor], rules: Sequence[Rule | Drop | Same]
) -> tuple[dict[str, tuple[str, TensorLayout]], dict[str, str], dict[str, list[str]]]:
  """({name: (target, leaf)}, {name: reason for dropping it}, problems)."""
  plan, dropped, problems, effective = {}, {}, collections.defaultdict(list), set()
  for name, value in source.items():
    matches = []
    for rule in rules:
      if isinstance(rule, Drop):
        match = rule.why if re.fullmatch(rule.pattern, name) else None
      else:
        match = rule.to_target(name, value.ndim)
      if match is not None:
        matches.append(match)
        effective.add(rule)
    if len(matches) != 1:
      problem = "match no rule" if not matches else "match more than one rule"
      problems[problem].append(f"{name} {list(value.shape)}")
    elif isinstance(matches[0], str):
      dropped[name] = matches[0]
    else:
      plan[name] = matches[0]
  problems["are rules without effect (the source lacks what they describe)"] = [
    rule.pattern if isinstance(rule, Drop) else rule.source
    for rule in rules
    if rule not in effective and not rule.optional and not isinstance(rule, Same)
  ]
  return plan, dropped, problems


def to_source(named: Mapping[str, npt.ArrayLike], rules: Sequence[Rule | Drop]) -> dict[str, np.ndarray]:
  """The inverse conversion, for any subset of the parameters, or for their gradients or moments.

  Args:
    named: arrays by our names.
    rules: the table.

  Returns:
    The same arrays by the source's names and in its layout; views where possible.

  Raises:
    ConversionError: for names that match no rule or several.
  """
  result, problems = {}, collections.defaultdict(list)
  for name, value in named.items():
    array = np.asarray(value)
    matches = [rule.to_source(name, array.ndim) for rule in rules if isinstance(rule, Rule)]
    matches = [match for match in matches if match is not None]
    if len(matches) == 1:
      result[matches[0][0]] = matches[0][1].backward(array)
    else:
      problems["match no rule" if not matches else "match more than one rule"].append(f"{name} {list(array.shape)}")
  _raise_all(problems, "these arrays have no name in the source")
  return result


def export(
  named: Mapping[str, npt.ArrayLike], rules: Sequence[Rule | Drop], manifest: Sequence[Options], step: int
) -> dict[str, np.ndarray]:
  """The state dict with the names, shapes, dtypes and order of a manifest.

  Args:
    named: all arrays of the model by our names: trained, frozen and statistics.
    rules: the table.
    manifest: entries {name, shape, dtype} and, if a tensor repeats an earlier one, {alias_of}.
    step: number of finished steps, for every `num_batches_tracked`.

  Raises:
    ConversionError: for unfilled entries, arrays without an entry, wrong shapes and overflows; lists all problems.
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
  """The parts of `name` between the prefix and the last part; None if the name does not have both."""
  if not name.startswith(prefix) or not name.endswith(last):
    return None
  parts, head = name.split(separator), prefix.split(separator)
  tail = [last] if last else []
  if parts[: len(head)] != head or parts[len(parts) - len(tail) :] != tail or len(parts) < len(head) + len(tail):
    return None
  middle = parts[len(head) : len(parts) - len(tail)]
  return middle if last or not middle else None


def _repeated(source: Iterable[str], rules: Sequence[Rule | Drop | Same]) -> Iterator[tuple[str, str]]:
  """Names of dropped tensors, each with the name of the tensor that it should repeat."""
  for rule in rules:
    if isinstance(rule, Drop) and rule.repeats:
      yield from (
        (name, f"{rule.repeats}.{match[1]}") for name in source if (match := re.fullmatch(rule.pattern, name))
      )


def _equal(source: Mapping[str, np.ndarray | LazyTensor], name: str, other: str) -> bool:
  return other in source and np.array_equal(np.asarray(source[name]), np.asarray(source[other]), equal_nan=True)


def phantom(shape: Sequence[int]) -> np.ndarray:
  """An array of the given shape that takes no memory, for shape computations."""
  return np.broadcast_to(np.zeros((), np.int8), tuple(shape))


def _aligned(x: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
  """The array in row-major order and this dtype; if that takes a copy, it is aligned to XLA_ALIGNMENT."""
  if x.flags.c_contiguous and x.dtype == dtype:
    return x
  size = math.prod(x.shape) * np.dtype(dtype).itemsize
  buffer = np.empty(size + XLA_ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % XLA_ALIGNMENT
  array = buffer[start : start + size].view(dtype).reshape(x.shape)
  np.copyto(array, x, casting="unsafe")
  return array


def _raise_all(problems: Mapping[str, Sequence[str]], heading: str) -> None:
  lines = []
  for problem, items in problems.items():
    lines += [f"{len(items)} {problem}: {first_items(items)}"] if items else []
  if lines:
    raise ConversionError("\n  ".join([f"{heading}:", *lines]))
