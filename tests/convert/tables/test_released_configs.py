"""Every released table against the real model of its config, in both directions."""

import sys

import jax
import numpy as np
import pytest

from tests.helpers import loaded_scripts, oracle, tiny
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.convert import load, rules
from vpd_jax.convert.formats import weight_files
from vpd_jax.convert.tables import released
from vpd_jax.models import lora

# (release, config, fields that change it: the prompt, the version of the release) to the setup in tests/golden with the
# authors' own list of names and shapes.
CASES = {
  ("vpd_depth", "configs/nyu_depth.py:vpd"): "vpd_depth",
  ("vpd_depth", "configs/nyu_depth.py:vpd", "predicted"): "vpd_depth",
  ("meta_prompts_depth", "configs/nyu_depth.py:meta_prompts"): "meta_depth",
  ("meta_prompts_depth", "configs/kitti_depth.py:meta_prompts"): "meta_depth",
  ("eco_depth_depth", "configs/nyu_depth.py:eco_depth"): "eco_depth",
  ("eco_depth_depth", "configs/kitti_depth.py:eco_depth"): "eco_depth",
  ("eco_depth_v2_depth", "configs/nyu_depth.py:eco_depth", "", "v2"): "eco_depth_v2",
  ("vpd_segmentation", "configs/ade20k_seg.py:vpd"): "vpd_seg",
  ("meta_prompts_segmentation", "configs/ade20k_seg.py:meta_prompts"): "meta_seg_ade",
  ("meta_prompts_segmentation", "configs/cityscapes_seg.py:meta_prompts"): "meta_seg_cityscapes",
  ("vpd_refer", "configs/refcoco_refer.py:refcoco"): "vpd_refer_40",
  ("vpd_refer", "configs/refcoco_refer.py:refcocog"): "vpd_refer_77",
  ("tadp_depth", "configs/nyu_depth.py:tadp"): "tadp_depth_nyu",
  ("tadp_segmentation", "configs/ade20k_seg.py:tadp"): "tadp_seg_ade",
}
# Of a release, what our export leaves out: nothing reads it.
LEFT_OUT = {"tadp_depth": ("encoder.gamma", "encoder.class_embeddings")}


def config_of(string, prompt="", version=""):
  config = loader.load(string).unlock()
  if prompt:
    config.method.prompt = prompt
  return config.lock()


def test_every_table_has_a_config():
  assert {case[0] for case in CASES} == set(released.TABLES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(filter(None, case[1:])))
def test_the_table_fits_the_model_of_its_config_in_both_directions(case):
  config = config_of(*case[1:])
  release = released.of(config.method.name, config.task.name, *case[3:])
  assert release == case[0]
  shapes, table = experiment.model_shapes(config), released.TABLES[release]()
  # Out: the authors' names and shapes, no more and no fewer.
  held = released.inside(shapes, table)
  entries = released.manifest(held, table)
  shape = lambda entry: (entry["name"], tuple(entry["shape"]))
  theirs = [e for e in oracle.manifest(CASES[case], "full") if e["name"] not in LEFT_OUT.get(release, ())]
  assert list(map(shape, entries)) == list(map(shape, theirs))
  # In: everything but CLIP's towers is filled.
  planned, _, problems = rules._plan({e["name"]: np.broadcast_to(np.float32(0), e["shape"]) for e in entries}, table)
  assert not any(problems.values())
  assert {target for target, _ in planned.values()} == held.keys()
  left = {name.split("/")[1] for name in shapes.keys() - held.keys()}
  assert left == (
    {"text_encoder"} if "refer" in release else {"class_predictor"} if case[2:3] == ("predicted",) else set()
  )


def test_a_method_without_a_release_is_told():
  with pytest.raises(ValueError, match=r"no released checkpoint of 'iedp_depth'; .*'vpd_refer'"):
    released.of("iedp", "depth")


@pytest.mark.parametrize(
  "string, prompt, rank",
  [
    ("configs/refcoco_refer.py:refcoco", "", 0),
    ("configs/nyu_depth.py:tiny", "predicted", 0),
    ("configs/nyu_depth.py:tadp,tiny", "", 2),
  ],
)
def test_a_run_is_exported_and_read_back(tmp_path, monkeypatch, string, prompt, rank):
  config = tiny.shrunk(config_of(string, prompt)).unlock()
  config.lora.rank = rank
  if prompt:
    config.backbone.image = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 64, "image_size": 28, "projection": 16}
  config.lock()
  exp = experiment.assemble(config)
  named = tiny.filled(exp.spec.shapes)
  state, expected = tiny.train_state(exp, named), dict(named)
  if prompt:  # with a moving average, which evaluation uses in place of the parameters
    state = state.replace(ema={name: x + 1 for name, x in state.params.items()})
    expected |= state.ema
  with initialize.checkpoints(config, exp, str(tmp_path / "run")) as held:
    held.save(3, state, initialize.to_json(config), {}, force=True)
  expected = lora.merged(expected, config.lora.alpha)
  assert (expected.keys() < named.keys()) == bool(rank)
  monkeypatch.setattr(loader, "load", lambda _: config)
  script = loaded_scripts.load("scripts/convert_checkpoint.py")
  output = tmp_path / "out.pth"
  words = [f"--config={string}", f"--source={tmp_path / 'run'}", f"--output={output}", "--reverse"]
  monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
  script.main()
  release = released.of(config.method.name, config.task.name)
  assert len(weight_files.open_file(output).tensors) > 100
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in experiment.model_shapes(config).items()}
  back, report = load.load_pretrained(output, shapes)
  assert report.table == f"released:{release}"
  assert back.keys() == released.inside(expected, released.TABLES[release]()).keys() and report.step == 3
  assert (back.keys() == expected.keys()) == release.startswith("tadp")
  for name, value in back.items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)
