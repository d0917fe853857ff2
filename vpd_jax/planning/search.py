"""Searches for settings with which a training step fits, and decides which of them to compile."""

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from vpd_jax import moments
from vpd_jax.config import loader
from vpd_jax.errors import UserError
from vpd_jax.types import Fields

ATTEMPTS = 3  # compilations; each takes minutes
UNSTORED_SCORES = 0.5  # assumed share of the activations that is stored if attention does not store its scores
RANK = 16  # of LoRA
# Effects of a setting besides memory, for the report.
COSTS = {
  "mesh.fsdp": "the same result; devices exchange parameters",
  "backbone.remat": "the same result; a quarter more operations, or with remat_policy=minimal a few percent",
  "backbone.remat_policy": "the same result; minimal repeats no product with weights, full repeats the forward pass",
  "backbone.attention": "the same result but for rounding; scores are computed again",
  "optim.accumulation": "the same result but for rounding and the random numbers of dropout; parts run in sequence",
  "optim.moments": "Adam's moments are rounded between steps; every array is trained",
  "frozen_dtype": "what is not trained is rounded once, when it is loaded",
  "lora.rank": "the UNet is adapted by small factors in place of training it in full",
  "data.batch_size": "another recipe",
}

Report = Fields  # of plan.compiled_report


class Remat(NamedTuple):
  """A level of recomputation.

  Attributes:
    fields: of the config.
    stored: assumed share of the activations that is stored, before any measurement.
  """

  fields: Fields
  stored: float


REMAT = (  # in ascending order of operations
  Remat({"backbone.remat": False, "backbone.remat_policy": "full"}, 1.0),
  Remat({"backbone.remat": True, "backbone.remat_policy": "minimal"}, 0.6),
  Remat({"backbone.remat": True, "backbone.remat_policy": "full"}, 0.35),
)


class Recomputed(NamedTuple):
  """What a step computes again instead of storing it.

  Attributes:
    remat: index in REMAT.
    scores: whether these include the scores of attention.
  """

  remat: int
  scores: bool


Activations = dict[Recomputed, float]  # estimated bytes of one image


class SearchResult(NamedTuple):
  """The result of a search.

  Attributes:
    fields: the settings that fit; empty if none do.
    flags: the settings as command-line flags.
    report: of the compilation with them; None if none fit.
    tried: flags and report of every compilation, in order.
  """

  fields: Fields
  flags: str
  report: Report | None
  tried: list[tuple[str, Report]]


def candidates(config: ConfigDict, devices: int) -> Iterator[Fields]:
  """Changes of the config by field, from the least to the most invasive.

  First settings that do not change the result: `mesh.fsdp`, in ascending order, then `backbone.remat`, which adds a few
  percent more operations with remat_policy "minimal" and a quarter with "full", each with every fsdp again, then
  attention without stored scores if the config has "xla". Then `optim.accumulation` in ascending order, which keeps the
  batch, its loss and the running statistics of batch normalization, but changes rounding and the random numbers of
  dropout; each with all of the above. Then the settings of `less_memory`, and last `data.batch_size`, halved
  repeatedly, which changes the training recipe; each with all of the above.
  """
  smallest = max(config.mesh.fsdp, 1) if config.mesh.fsdp != -1 else devices
  shard_counts = [n for n in range(smallest, devices + 1) if devices % n == 0]
  kernels = dict.fromkeys((config.backbone.attention, *(["auto"] if _stores_scores(config) else [])))
  batches = [config.data.batch_size]
  while batches[-1] % 2 == 0 and batches[-1] // 2 >= devices:
    batches.append(batches[-1] // 2)
  for batch in batches:
    parts = [n for n in range(config.optim.accumulation, batch // devices + 1) if batch % (n * devices) == 0]
    for memory in less_memory(config):
      for accumulation in parts:
        for attention in kernels:
          for remat in REMAT[_remat(config) :]:
            for fsdp in shard_counts:
              yield {
                **{"mesh.data": -1, "mesh.fsdp": fsdp, **remat.fields, "backbone.attention": attention},
                **{"optim.accumulation": accumulation, "data.batch_size": batch, **memory},
              }


def less_memory(config: ConfigDict) -> list[Fields]:
  """Settings of the config, then those with less memory: reduced-precision moments, frozen arrays in bfloat16, LoRA."""
  formats = moments.FORMATS[moments.FORMATS.index(config.optim.moments) :]
  current = {"frozen_dtype": config.frozen_dtype, "lora.rank": config.lora.rank}
  levels = [{"optim.moments": moment_format, **current} for moment_format in formats]
  levels.append(levels[-1] | {"frozen_dtype": "bfloat16"})
  levels.append(levels[0] | {"frozen_dtype": "bfloat16", "lora.rank": config.lora.rank or RANK})
  return [level for i, level in enumerate(levels) if level not in levels[:i]]


def value(config: ConfigDict, field: str) -> object:
  """The value of a dotted field."""
  return functools.reduce(operator.getitem, field.split("."), config)


def changed_fields(config: ConfigDict, fields: Fields) -> Fields:
  """The fields that differ from the config's."""
  return {name: x for name, x in fields.items() if x != value(config, name)}


def as_flags(config: ConfigDict, fields: Fields) -> str:
  """The fields that differ from the config's, as command-line flags."""
  return " ".join(f"--config.{name}={x}" for name, x in changed_fields(config, fields).items())


def costs(config: ConfigDict, fields: Fields) -> list[tuple[str, str]]:
  """The effect of each field that differs from the config's, as text."""
  return [(f"{name}={x}", COSTS[name]) for name, x in changed_fields(config, fields).items() if name in COSTS]


def find_fitting_settings(
  config: ConfigDict,
  report: Report,
  measure: Callable[[ConfigDict], Report],
  state: Callable[[ConfigDict], dict[str, int]],
  devices: int,
  attempts: int = ATTEMPTS,
) -> SearchResult:
  """Finds the first candidate that fits, with at most `attempts` compilations.

  Memory is estimated as state + gradients + activations, which are proportional to the number of images per device;
  every compilation corrects the estimate. Candidates that are not expected to fit are skipped; if none is expected to
  fit, the smallest one is compiled.

  Args:
    config: that does not fit.
    report: of its compilation: "peak", None if unknown, and "limit", bytes.
    measure: config to such a report, with "fits"; raises UserError if the settings are incompatible.
    state: config to the bytes of the parts of its state on one device; raises UserError likewise.
    devices: total number of devices.
  """
  remaining, tried = [fields for fields in candidates(config, devices) if as_flags(config, fields)], []
  activations: Activations = {}
  _learn(activations, config, report, state(config), devices)
  while remaining and len(tried) < attempts:
    expected = [_expected(activations, loader.changed(config, fields), state, devices) for fields in remaining]
    chosen = next((i for i, peak in enumerate(expected) if peak <= report["limit"]), expected.index(min(expected)))
    fields, settings = remaining[chosen], loader.changed(config, remaining[chosen])
    remaining = remaining[chosen + 1 :]
    flags = as_flags(config, fields)
    try:
      measured = measure(settings)
    except UserError:
      continue  # groups of statistics or loss would span several parts
    tried.append((flags, measured))
    if measured["fits"]:
      return SearchResult(fields, flags, measured, tried)
    _learn(activations, settings, measured, state(settings), devices)
  return SearchResult({}, "", None, tried)


def _images(config: ConfigDict, devices: int) -> float:
  """Number of images that a device processes at a time."""
  return config.data.batch_size / config.optim.accumulation / devices


def _fixed(config: ConfigDict, state: dict[str, int]) -> float:
  """Bytes of state and gradients; accumulation stores gradients twice."""
  return sum(state.values()) + state["params"] * (2 if config.optim.accumulation > 1 else 1)


def _stores_scores(config: ConfigDict) -> bool:
  return config.backbone.attention == "xla"


def _remat(config: ConfigDict) -> int:
  """The index in REMAT."""
  return next(i for i, level in enumerate(REMAT) if not changed_fields(config, level.fields))


def _recomputed(config: ConfigDict) -> Recomputed:
  return Recomputed(_remat(config), scores=not _stores_scores(config))


def _learn(activations: Activations, config: ConfigDict, report: Report, state: dict[str, int], devices: int) -> None:
  """Updates the estimated activations from a compilation, also for settings that save more memory.

  If the compiler did not report the requested memory, it is assumed to be twice the limit.
  """
  peak = report.get("peak") or 2 * report["limit"]
  per_image = max(peak - _fixed(config, state), 0) / _images(config, devices)
  measured = _recomputed(config)
  for remat in range(measured.remat, len(REMAT)):
    for scores in {measured.scores, True}:
      by_remat = per_image * REMAT[remat].stored / REMAT[measured.remat].stored
      activations[Recomputed(remat, scores)] = by_remat * UNSTORED_SCORES ** (scores - measured.scores)
  for other in activations:
    if other.remat < measured.remat and other.scores <= measured.scores:  # which store no less
      activations[other] = max(activations[other], per_image)


def _expected(
  activations: Activations, config: ConfigDict, state: Callable[[ConfigDict], dict[str, int]], devices: int
) -> float:
  """Estimated peak memory in bytes; infinite if the settings are incompatible."""
  try:
    return _fixed(config, state(config)) + activations[_recomputed(config)] * _images(config, devices)
  except UserError:
    return math.inf
