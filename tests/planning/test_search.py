"""Which settings are tried when a step does not fit, with a made-up compiler."""

import pytest

from vpd_jax.config import loader
from vpd_jax.errors import UserError
from vpd_jax.planning import search as plan_search

DEVICES = 8
GB = 10**9


def config_of(**changes):
  config = loader.load("configs/nyu_depth.py").unlock()
  config.update_from_flattened_dict({"data.batch_size": 48, **changes})
  return config.lock()


def state(config):
  """Parameters and moments of 4 and 8 GB, spread over `mesh.fsdp`; frozen arrays are not."""
  if config.lora.rank:
    return {"params": 0, "opt_state": 0, "frozen": 3 * GB}
  numbers = {"float32": 8, "bfloat16": 4, "int8": 2}[config.optim.moments]
  return {"params": 4 * GB // config.mesh.fsdp, "opt_state": numbers * GB // config.mesh.fsdp, "frozen": GB}


class Compiler:
  """Peaks as they might come out: 1 GB of activations an image, of which recomputation leaves a part."""

  def __init__(self, limit, left=0.35, told=True):
    self.limit, self.left, self.told, self.seen, self.refused = limit, left, told, [], 0

  def __call__(self, config):
    if config.optim.accumulation == 4:
      self.refused += 1
      raise UserError("groups of 3 do not cut 12 images")
    images = config.data.batch_size / config.optim.accumulation / DEVICES
    parts = state(config)
    gradients = parts["params"] * (2 if config.optim.accumulation > 1 else 1)
    remat = config.backbone.remat and config.backbone.remat_policy
    share = {False: 1, "minimal": max(0.6, self.left), "full": self.left}[remat]
    peak = sum(parts.values()) + gradients + images * GB * share
    self.seen.append((config.mesh.fsdp, remat, config.optim.accumulation, config.data.batch_size))
    known = peak if self.told or peak <= self.limit else None
    return {"peak": known, "limit": self.limit, "fits": peak <= self.limit}


def search(compiler, **changes):
  config = config_of(**changes)
  given = compiler(config)
  assert not given["fits"]
  compiler.seen.clear()
  return plan_search.find_fitting_settings(config, given, compiler, state, DEVICES)


def test_candidates_come_in_the_documented_order():
  made = list(plan_search.candidates(config_of(), DEVICES))
  names = ("mesh.fsdp", "optim.accumulation", "data.batch_size")
  found = [
    (fields["backbone.remat"] and fields["backbone.remat_policy"], *(fields[n] for n in names)) for fields in made
  ]
  assert found[:12] == [(remat, n, 1, 48) for remat in (False, "minimal", "full") for n in (1, 2, 4, 8)]
  assert found[12] == (False, 1, 2, 48) and found[24] == (False, 1, 3, 48)
  halved = [fields for fields in found if fields[3] != 48]
  assert found.index(halved[0]) == len(found) - len(halved) and {fields[3] for fields in halved} == {24}  # 12 < 8 x 2
  assert all(batch % (accumulation * DEVICES) == 0 for _, _, accumulation, batch in found)
  assert {fields["backbone.attention"] for fields in made} == {"auto"}
  levels = [(f["optim.moments"], f["frozen_dtype"], f["lora.rank"]) for f in made if f["data.batch_size"] == 48]
  assert list(dict.fromkeys(levels)) == [
    *((kind, "float32", 0) for kind in ("float32", "bfloat16", "int8")),
    *(("int8", "bfloat16", 0), ("float32", "bfloat16", 16)),
  ]
  assert levels == sorted(levels, key=list(dict.fromkeys(levels)).index)  # each with all of the above


def test_stored_scores_are_given_up_after_recomputation():
  found = list(plan_search.candidates(config_of(**{"backbone.attention": "xla"}), 1))
  assert [(f["backbone.attention"], f["backbone.remat"]) for f in found[:6]] == [
    (kernel, remat) for kernel in ("xla", "auto") for remat in (False, True, True)
  ]


def test_what_is_on_stays_on():
  found = list(plan_search.candidates(config_of(**{"backbone.remat": True, "mesh.fsdp": 2}), DEVICES))
  assert {fields["mesh.fsdp"] for fields in found} == {2, 4, 8}
  assert {(fields["backbone.remat"], fields["backbone.remat_policy"]) for fields in found} == {(True, "full")}
  minimal = config_of(**{"backbone.remat": True, "backbone.remat_policy": "minimal"})
  policies = [fields["backbone.remat_policy"] for fields in plan_search.candidates(minimal, 1)]
  assert policies[:2] == ["minimal", "full"]
  assert [text for text, _ in plan_search.costs(minimal, {"backbone.remat_policy": "full"})] == [
    "backbone.remat_policy=full"
  ]
  small = config_of(**{"optim.moments": "int8", "frozen_dtype": "bfloat16", "lora.rank": 4})
  assert plan_search.less_memory(small) == [{"optim.moments": "int8", "frozen_dtype": "bfloat16", "lora.rank": 4}]


@pytest.mark.parametrize(
  "limit, expected",
  [
    (16, (2, False, 1, 48)),  # 1 + 8 + 6
    (9, (8, False, 1, 48)),  # 1 + 2 + 6
    (7, (8, "minimal", 1, 48)),  # 1 + 2 + 3.6
    (6, (8, "full", 1, 48)),  # 1 + 2 + 2.1
    (4, (8, "full", 3, 48)),  # 1 + 2.5 + 0.7; with 2 parts 4.55
  ],
)
def test_the_first_candidate_that_fits_is_found_at_once(limit, expected):
  compiler = Compiler(limit * GB + GB // 4)
  found = search(compiler)
  assert found.report["fits"] and compiler.seen == [expected]


def test_the_settings_are_given_as_flags():
  found = search(Compiler(6 * GB))
  assert found.flags == "--config.mesh.fsdp=8 --config.backbone.remat=True"
  found = search(Compiler(7 * GB))
  assert found.flags == "--config.mesh.fsdp=8 --config.backbone.remat=True --config.backbone.remat_policy=minimal"


@pytest.mark.parametrize(
  "limit, expected", [(17, "optim.moments=bfloat16"), (15, "optim.moments=int8"), (4, "lora.rank=16")]
)
def test_one_device_gives_up_results_last_and_is_told_what_changes(limit, expected):
  config = config_of(**{"data.batch_size": 24, "backbone.remat": True, "optim.accumulation": 24})
  compiler = lambda config: Compiler(limit * GB + GB // 2)(loader.changed(config, {"data.batch_size": 24 * DEVICES}))
  found = plan_search.find_fitting_settings(config, compiler(config), compiler, state, 1)
  assert found.report["fits"] and f"--config.{expected}" in found.flags and len(found.tried) == 1
  told = dict(plan_search.costs(config, found.fields))
  assert told[expected] == plan_search.COSTS[expected.split("=")[0]]
  assert told.keys() == {word.removeprefix("--config.") for word in found.flags.split()}


def test_a_compilation_corrects_the_estimate():
  compiler = Compiler(6 * GB, left=0.8)  # recomputation saves less than it is expected to
  found = search(compiler)
  # That recomputation of all saves little is also learned of less recomputation.
  assert compiler.seen[0] == (8, "full", 1, 48) and compiler.seen[1:] == [(8, "minimal", 2, 48)]
  assert found.report["fits"] and len(found.tried) == 2


def test_settings_that_do_not_go_together_are_no_attempt():
  compiler = Compiler(5 * GB, left=0.8)
  found = search(compiler, **{"data.batch_size": 32})  # 4 parts of 8 images
  assert compiler.refused and all("accumulation=4" not in words for words, _ in found.tried)


def test_it_gives_up():
  compiler = Compiler(GB // 2)
  found = search(compiler)
  assert (found.flags, found.report) == ("", None) and 0 < len(found.tried) <= plan_search.ATTEMPTS
  config = config_of()
  assert (
    len(plan_search.find_fitting_settings(config, compiler(config), compiler, state, DEVICES, attempts=1).tried) == 1
  )


def test_a_compiler_that_does_not_say_how_much_it_wanted_is_taken_to_have_wanted_twice_of_all():
  compiler = Compiler(15 * GB, told=False)
  assert search(compiler).report["fits"]
