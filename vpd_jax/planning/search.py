"""When a training step does not fit: the nearest settings that may, and which of them to compile."""

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
# Share of the activations that recomputation, and attention without stored scores, keep, until a compilation has told.
REMAT_LEAVES, ATTENTION_LEAVES = 0.35, 0.5
RANK = 16  # of LoRA
# What a setting changes beside memory, for the reader.
COSTS = {
  "mesh.fsdp": "the same result; devices exchange parameters",
  "backbone.remat": "the same result; a quarter more operations",
  "backbone.attention": "the same result but for rounding; scores are computed again",
  "optim.accumulation": "the same batch and loss; batch normalization takes its running statistics part by part",
  "optim.moments": "Adam's moments are rounded between steps; every array is trained",
  "frozen_dtype": "what is not trained is rounded once, when it is loaded",
  "lora.rank": "the UNet is adapted by small factors in place of training it in full",
  "data.batch_size": "another recipe",
}

Report = Fields


class Found(NamedTuple):
  """What a search came to.

  Attributes:
    fields: the settings that fit; empty where none does.
    words: they as flags.
    report: of the compilation with them; None where none fits.
    tried: settings and report of every compilation, in order.
  """

  fields: Fields
  words: str
  report: Report | None
  tried: list[tuple[str, Report]]


def candidates(config: ConfigDict, devices: int) -> Iterator[Fields]:
  """Changes of the config by field, the least harmful first.

  Without any change of the result: `mesh.fsdp`, from small to large, then `backbone.remat`, which costs a quarter more
  operations, with every fsdp again, then attention without stored scores where the config has "xla". Then
  `optim.accumulation`, which keeps the batch and its loss, but takes the running statistics of batch normalization part
  by part; from small to large, each with all of the above. Then those of `less_memory`, and last `data.batch_size`,
  halved again and again, which is another recipe; each with all of the above.
  """
  given = max(config.mesh.fsdp, 1) if config.mesh.fsdp != -1 else devices
  spreads = [n for n in range(given, devices + 1) if devices % n == 0]
  kernels = dict.fromkeys((config.backbone.attention, *(["auto"] if _stores_scores(config) else [])))
  batches = [config.data.batch_size]
  while batches[-1] % 2 == 0 and batches[-1] // 2 >= devices:
    batches.append(batches[-1] // 2)
  for batch in batches:
    parts = [n for n in range(config.optim.accumulation, batch // devices + 1) if batch % (n * devices) == 0]
    for memory in less_memory(config):
      for accumulation in parts:
        for attention in kernels:
          for remat in sorted({bool(config.backbone.remat), True}):
            for fsdp in spreads:
              yield {
                **{"mesh.data": -1, "mesh.fsdp": fsdp, "backbone.remat": remat, "backbone.attention": attention},
                **{"optim.accumulation": accumulation, "data.batch_size": batch, **memory},
              }


def less_memory(config: ConfigDict) -> list[Fields]:
  """Settings that hold less than the config's own, which come first: small moments, frozen bfloat16, LoRA."""
  kinds = moments.KINDS[moments.KINDS.index(config.optim.moments) :]
  own = {"frozen_dtype": config.frozen_dtype, "lora.rank": config.lora.rank}
  levels = [{"optim.moments": kind, **own} for kind in kinds]
  levels.append(levels[-1] | {"frozen_dtype": "bfloat16"})
  levels.append(levels[0] | {"frozen_dtype": "bfloat16", "lora.rank": config.lora.rank or RANK})
  return [level for i, level in enumerate(levels) if level not in levels[:i]]


def value(config: ConfigDict, field: str) -> object:
  """Of a dotted field."""
  return functools.reduce(operator.getitem, field.split("."), config)


def changed_fields(config: ConfigDict, fields: Fields) -> Fields:
  """The fields that differ from the config's."""
  return {name: x for name, x in fields.items() if x != value(config, name)}


def as_flags(config: ConfigDict, fields: Fields) -> str:
  """The fields that differ from the config's, as words of a command line."""
  return " ".join(f"--config.{name}={x}" for name, x in changed_fields(config, fields).items())


def costs(config: ConfigDict, fields: Fields) -> list[tuple[str, str]]:
  """What each field that differs from the config's changes, in words."""
  return [(f"{name}={x}", COSTS[name]) for name, x in changed_fields(config, fields).items() if name in COSTS]


def nearest(
  config: ConfigDict,
  report: Report,
  measure: Callable[[ConfigDict], Report],
  state: Callable[[ConfigDict], dict[str, int]],
  devices: int,
  attempts: int = ATTEMPTS,
) -> Found:
  """The first of the candidates that fits, as far as `attempts` compilations can tell.

  Memory is estimated as state + gradients + activations, these in proportion to the images that a device holds at a
  time; every compilation corrects the estimate. Candidates that are estimated not to fit are passed over; where all
  are, the smallest is compiled.

  Args:
    config: which does not fit.
    report: of its compilation: "peak", None where unknown, and "limit", bytes.
    measure: config to such a report, with "fits"; a ValueError says that the settings do not go together.
    state: config to the bytes of the parts of its state on one device; a ValueError likewise.
    devices: number of all.
  """
  left, tried = [fields for fields in candidates(config, devices) if as_flags(config, fields)], []
  share: dict[tuple[bool, bool], float] = {}  # activations of one image, by `_saves`
  _learn(share, config, report, state(config), devices)
  while left and len(tried) < attempts:
    expected = [_expected(share, loader.changed(config, fields), state, devices) for fields in left]
    chosen = next((i for i, peak in enumerate(expected) if peak <= report["limit"]), expected.index(min(expected)))
    fields, settings = left[chosen], loader.changed(config, left[chosen])
    left = left[chosen + 1 :]
    words = as_flags(config, fields)
    try:
      found = measure(settings)
    except UserError:
      continue  # groups of statistics or loss that the parts would cut
    tried.append((words, found))
    if found["fits"]:
      return Found(fields, words, found, tried)
    _learn(share, settings, found, state(settings), devices)
  return Found({}, "", None, tried)


def _images(config: ConfigDict, devices: int) -> float:
  """That a device holds at a time."""
  return config.data.batch_size / config.optim.accumulation / devices


def _fixed(config: ConfigDict, state: dict[str, int]) -> float:
  """State and gradients, which accumulation holds twice."""
  return sum(state.values()) + state["params"] * (2 if config.optim.accumulation > 1 else 1)


def _stores_scores(config: ConfigDict) -> bool:
  return config.backbone.attention == "xla"


def _saves(config: ConfigDict) -> tuple[bool, bool]:
  """Whether it recomputes, and whether attention keeps no scores."""
  return bool(config.backbone.remat), not _stores_scores(config)


def _learn(
  share: dict[tuple[bool, bool], float], config: ConfigDict, report: Report, state: dict[str, int], devices: int
) -> None:
  """Corrects the activations of one image by a compilation, and those with more savings by what these leave.

  Where the compiler did not say how much it wanted, it is taken to be twice of what there is.
  """
  peak = report.get("peak") or 2 * report["limit"]
  one = max(peak - _fixed(config, state), 0) / _images(config, devices)
  remat, attention = _saves(config)
  for more in {remat, True}:
    for less in {attention, True}:
      share[more, less] = one * REMAT_LEAVES ** (more - remat) * ATTENTION_LEAVES ** (less - attention)


def _expected(
  share: dict[tuple[bool, bool], float],
  config: ConfigDict,
  state: Callable[[ConfigDict], dict[str, int]],
  devices: int,
) -> float:
  """Bytes at the peak; infinite where the settings do not go together."""
  try:
    return _fixed(config, state(config)) + share[_saves(config)] * _images(config, devices)
  except UserError:
    return math.inf
