"""The config of a run, read from its workdir, and what differs from another one."""

import json
import subprocess
import sys

import pytest

from tests.helpers.messages import check_message
from tests.helpers.paths import ROOT
from vpd_jax import experiment
from vpd_jax.config import loader, stored

CONFIGS = ["nyu_depth.py:iedp,tiny", "my_segmentation.py", "my_pose.py:meta_prompts", "refcoco_refer.py:refcocog"]
PARSE = """
import sys
from vpd_jax import main
print(main._parse(["main", *sys.argv[1:]]))
print(main.CONFIG.value.num_steps, main.CONFIG.value.eval.test_time, main.WORKDIR.value, "jax" in sys.modules)
"""


def write(folder, config):
  """config.json as training writes it."""
  (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")


def flat_types(config):
  return {field: (type(value), value) for field, value in loader._flat(config).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stored_config_is_the_one_of_the_run(tmp_path, name):
  config = loader.changed(loader.load(f"configs/{name}"), {"optim.lr": 0.25, "data.root": "/my data: 2"})
  write(tmp_path, config)
  again = loader.load(stored.config_string(str(tmp_path)))
  assert flat_types(again) == flat_types(config) and again.is_locked


def test_a_config_of_an_earlier_version_has_the_new_names(tmp_path):
  config = loader.load("configs/nyu_depth.py").to_dict()
  config["data"]["colour"] = config["data"].pop("color_jitter")
  (tmp_path / "config.json").write_text(json.dumps(config))
  again = loader.load(stored.config_string(str(tmp_path)))
  assert again.data.color_jitter is True and "colour" not in again.data


def test_the_tasks_without_windows_are_those_of_the_protocols():
  tasks = {name for name, task in experiment.TASKS.items() if task.test_time_protocol not in ("windows", "sliding")}
  assert tasks == {*stored.WITHOUT_WINDOWS}


@pytest.mark.parametrize("name", [*stored.WITHOUT_WINDOWS, "depth"])
def test_a_config_of_an_earlier_version_has_no_coverage_of_windows_that_do_not_exist(tmp_path, name):
  config = loader.load(f"configs/rooms.py:{name},tiny").to_dict()
  config["eval"]["coverage"] = "released"
  (tmp_path / "config.json").write_text(json.dumps(config))
  again = loader.load(stored.config_string(str(tmp_path)))
  assert again.eval.coverage == ("released" if name == "depth" else "full")


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_folder_without_config_is_one_line_that_asks_for_one(tmp_path, content):
  if content:
    (tmp_path / "config.json").write_text(content)
  message = check_message("give", lambda: stored.get_config(str(tmp_path)))
  assert str(tmp_path) in message and "--config=FILE" in message


def parse(*words, program=("-c", PARSE)):
  done = subprocess.run([sys.executable, *program, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
  return done.returncode, done.stdout.splitlines(), done.stderr


def test_evaluation_takes_the_config_of_the_run_and_overrides(tmp_path):
  write(tmp_path, loader.changed(loader.load("configs/rooms.py:depth,tiny"), {"num_steps": 7}))
  words = ["--mode=eval", "--workdir", str(tmp_path), "--config.eval.test_time=('flip',)"]
  assert parse(*words)[:2] == (0, ["['main']", f"7 ('flip',) {tmp_path} False"])
  code, _, errors = parse("--mode=train", f"--workdir={tmp_path}", program=("-m", "vpd_jax.main"))
  assert code == 2 and errors.startswith("error: ") and "eval|predict|export the --workdir of a run" in errors
  code, _, errors = parse("--mode=predict", f"--workdir={tmp_path}/none")
  assert code == 2 and errors.startswith("error: without --config the config of the run is taken, but config.json of ")


def differing(string, **changes):
  trained = json.loads(json.dumps(loader.load(string).to_dict()))
  return stored.differing(trained, loader.changed(loader.load(string), changes))


def test_what_differs_is_named_with_both_values_and_arrays_first():
  depth, classes = "configs/nyu_depth.py:tiny", "configs/my_segmentation.py:tiny"
  assert differing(depth) == ""
  same = {
    "optim.lr": 1.0,
    "data.root": "/x",
    "data.batch_size": 3,
    "data.color_jitter": False,
    "method.prompt": "predicted",
  }
  assert differing(depth, **same) == ""
  text = differing(depth, **{"task.max_depth": 80.0, "neck.width": 7, "method.name": "iedp", "method.timestep": 2})
  assert text.startswith("method.name is 'vpd' in the run and 'iedp' here, neck.width is ")
  assert text.endswith(" and 7 here, task.max_depth is 10.0 in the run and 80.0 here")
  assert differing(classes, **{"data.classes": ("a", "b")}) == (
    "data.classes is ('background', 'person', 'dog') in the run and ('a', 'b') here"
  )


def test_many_differences_and_long_values_are_cut():
  trained = loader.load("configs/ade20k_seg.py").to_dict()
  text = stored.differing(trained, loader.load("configs/coco_pose.py:meta_prompts"))
  names = [part.split()[0] for part in text.split(", ")]
  assert names == ["method.name", "task.name", "head.name", "neck.name", "data.name"]
  other = loader.changed(
    loader.load("configs/ade20k_seg.py"),
    {f"backbone.unet.{n}": 3 for n in ("model_channels", "num_res_blocks", "context_dim", "num_heads")}
    | {"data.classes": (), "task.lovasz": 5.0, "neck.width": 3, "method.timestep": 3},
  )
  text = stored.differing(trained, other)
  assert text.endswith(", 2 more options") and len(text) < 900


def test_a_run_from_before_an_option_is_used_as_it_was(tmp_path):
  config = loader.load("configs/nyu_depth.py")
  old = config.to_dict()
  del old["lora"], old["frozen_dtype"], old["eval"]["blend"], old["optim"]["moments"]
  del old["backbone"]["remat_policy"], old["backbone"]["vae"]["latent_scale"], old["backbone"]["text"]["padding"]
  (tmp_path / "config.json").write_text(json.dumps(old))
  assert loader.load(stored.config_string(str(tmp_path))) == config
