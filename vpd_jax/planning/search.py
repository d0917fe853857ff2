"""When a training step does not fit: the nearest settings that may, and which of them to compile."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from vpd_jax.config import loader
from vpd_jax.errors import UserError
from vpd_jax.types import Fields

ATTEMPTS = 3  # compilations; each takes minutes
REMAT_LEAVES = 0.35  # share of the activations that recomputation keeps, until a compilation has told

Report = Fields


class Found(NamedTuple):
  """What a search came to.

  Attributes:
    words: the settings that fit, as flags; empty where none does.
    report: of the compilation with them; None where none fits.
    tried: settings and report of every compilation, in order.
  """

  words: str
  report: Report | None
  tried: list[tuple[str, Report]]


def candidates(config: ConfigDict, devices: int) -> Iterator[Fields]:
  """Changes of the config by field, the least harmful first.

  Without any change of the result: `mesh.fsdp`, from small to large, then `backbone.remat`, which costs a quarter more
  operations, with every fsdp again. Then `optim.accumulation`, which keeps the batch and its loss, but takes the
  running statistics of batch normalization part by part; from small to large, each with all of the above. Last
  `data.batch_size`, halved again and again, which is another recipe; each with all of the above.
  """
  given = max(config.mesh.fsdp, 1) if config.mesh.fsdp != -1 else devices
  spreads = [n for n in range(given, devices + 1) if devices % n == 0]
  batches = [config.data.batch_size]
  while batches[-1] % 2 == 0 and batches[-1] // 2 >= devices:
    batches.append(batches[-1] // 2)
  for batch in batches:
    for accumulation in range(config.optim.accumulation, batch // devices + 1):
      if batch % (accumulation * devices):
        continue
      for remat in sorted({bool(config.backbone.remat), True}):
        for fsdp in spreads:
          yield {
            **{"mesh.data": -1, "mesh.fsdp": fsdp, "backbone.remat": remat},
            **{"optim.accumulation": accumulation, "data.batch_size": batch},
          }


def as_flags(config: ConfigDict, fields: Fields) -> str:
  """The fields that differ from the config's, as words of a command line."""
  given = {name: config[name.split(".")[0]][name.split(".")[1]] for name in fields}
  return " ".join(f"--config.{name}={value}" for name, value in fields.items() if value != given[name])


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
    state: config to the bytes of the parts of its state on one device.
    devices: number of all.
  """
  left, tried = [fields for fields in candidates(config, devices) if as_flags(config, fields)], []
  share = {False: 0.0, True: 0.0}  # activations of one image, without and with recomputation
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
      return Found(words, found, tried)
    _learn(share, settings, found, state(settings), devices)
  return Found("", None, tried)


def _images(config: ConfigDict, devices: int) -> float:
  """That a device holds at a time."""
  return config.data.batch_size / config.optim.accumulation / devices


def _fixed(config: ConfigDict, state: dict[str, int]) -> float:
  """State and gradients, which accumulation holds twice."""
  return sum(state.values()) + state["params"] * (2 if config.optim.accumulation > 1 else 1)


def _learn(share: dict[bool, float], config: ConfigDict, report: Report, state: dict[str, int], devices: int) -> None:
  """Corrects the activations of one image, without and with recomputation, by a compilation.

  Where the compiler did not say how much it wanted, it is taken to be twice of what there is.
  """
  peak = report.get("peak") or 2 * report["limit"]
  one = max(peak - _fixed(config, state), 0) / _images(config, devices)
  if config.backbone.remat:
    share[True] = one
  else:
    share[False], share[True] = one, REMAT_LEAVES * one


def _expected(
  share: dict[bool, float], config: ConfigDict, state: Callable[[ConfigDict], dict[str, int]], devices: int
) -> float:
  """Bytes at the peak."""
  return _fixed(config, state(config)) + share[bool(config.backbone.remat)] * _images(config, devices)
