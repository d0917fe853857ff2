"""Config strings, and what changed between two configs."""

import json
import re
import subprocess
import sys

import ml_collections
import pytest

from vpd_jax.config import loader

CONFIG = """
import ml_collections
from vpd_jax.config import loader

def get_config(argument: str = "") -> ml_collections.ConfigDict:
  words = loader.parse_variant(argument, method=("vpd", "iedp"), size=("full", "tiny"))
  config = ml_collections.ConfigDict()
  config.method = dict(name=words["method"], width=320 if words["size"] == "full" else 32)
  config.optim = dict(lr=5e-4, lr_groups=((r"/vae/", None), (r"", 1.0)))
  return config
"""
FLAGS = """
import sys
from absl import app
from ml_collections import config_flags
from vpd_jax.config import loader
flag = config_flags.DEFINE_config_file("config")
app.run(lambda argv: print(flag.value.method.name, flag.value.method.width, flag.value.optim.lr, argv[1:]),
        argv=loader.resolve_argv(sys.argv))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "one.py").write_text(CONFIG)
  (tmp_path / "configs" / "empty.py").write_text("")
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize("argument", ["tiny,iedp", "iedp,tiny", " iedp , tiny,"])
def test_words_come_in_any_order(argument):
  chosen = loader.parse_variant(argument, method=("vpd", "iedp"), size=("full", "tiny"))
  assert chosen == {"method": "iedp", "size": "tiny"}


@pytest.mark.parametrize("argument", ["", None])
def test_the_first_word_of_a_kind_is_its_default(argument):
  assert loader.parse_variant(argument, method=("vpd", "iedp"), size=("full", "tiny")) == {
    "method": "vpd",
    "size": "full",
  }


def test_an_unknown_word_fails_with_the_list():
  with pytest.raises(ValueError, match=r"'smal' is unknown; .*method: vpd, iedp; size: full, tiny"):
    loader.parse_variant("vpd,smal", method=("vpd", "iedp"), size=("full", "tiny"))


def test_two_words_of_one_kind_fail():
  with pytest.raises(ValueError, match="two of method: 'vpd' and 'iedp'"):
    loader.parse_variant("vpd,iedp", method=("vpd", "iedp"))


@pytest.mark.parametrize("path", ["configs/one.py", "configs/one"])
def test_a_relative_path_is_found_in_the_working_directory(folder, path):
  config = loader.load(f"{path}:tiny,iedp")
  assert (config.method.name, config.method.width) == ("iedp", 32)
  assert loader.load(path).method.name == "vpd"


def test_a_relative_path_is_found_beside_the_package(folder, tmp_path_factory, monkeypatch):
  monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
  monkeypatch.setattr(loader, "PROJECT", folder)
  assert loader.resolve("configs/one:tiny") == f"{folder / 'configs' / 'one.py'}:tiny"


def test_a_missing_file_is_reported_with_both_places(folder, monkeypatch):
  monkeypatch.setattr(loader, "PROJECT", folder / "project")
  with pytest.raises(ValueError, match=r"'configs/two.py' was not found") as error:
    loader.load("configs/two.py:tiny")
  assert str(folder / "configs/two.py") in str(error.value)
  assert str(folder / "project/configs/two.py") in str(error.value)
  assert "\n" not in str(error.value)


def test_a_file_without_get_config_fails(folder):
  with pytest.raises(ValueError, match="has no function get_config"):
    loader.load("configs/empty.py")


def test_a_loaded_config_is_locked_and_a_given_one_is_copied(folder):
  config = loader.load("configs/one.py")
  with pytest.raises(AttributeError):
    config.optim.learning_rate = 1.0
  given = ml_collections.ConfigDict({"optim": {"lr": 1.0}})
  locked = loader.load(given)
  given.optim.lr = 2.0
  assert locked.is_locked and locked.optim.lr == 1.0 and not given.is_locked


def test_flags_take_a_config_from_anywhere_with_words_and_overrides(folder, tmp_path_factory):
  command = [sys.executable, "-c", FLAGS, "--config=configs/one:iedp,tiny", "--config.optim.lr=0.25", "rest"]
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  assert done.stdout.strip() == "iedp 32 0.25 ['rest']", done.stderr
  done = subprocess.run([*command[:3], "--config=configs/one:big"], cwd=folder, capture_output=True, text=True)
  assert done.stderr.strip().splitlines()[-1].startswith("vpd_jax.errors.UserError: config argument 'big' is unknown;")


def test_argv_after_a_double_dash_and_other_flags_stay(folder):
  absolute = str(folder / "configs" / "one.py")
  argv = ["main", "--workdir=x", "--config", "configs/one.py", "--config.optim.lr=1", "--", "--config=configs/one.py"]
  assert loader.resolve_argv(argv) == [*argv[:3], absolute, *argv[4:]]


def test_a_run_is_named_after_file_and_words():
  assert loader.name("configs/rooms.py:tiny,depth") == loader.name("rooms:depth,tiny") == "rooms-depth-tiny"
  assert loader.workdir("/some/where/nyu_depth.py") == "runs/nyu_depth"


def test_differences_names_fields_and_survives_json(folder):
  old = loader.load("configs/one.py")
  stored = json.loads(old.to_json())
  assert loader.differences(stored, old) == []
  new = old.copy_and_resolve_references().unlock()
  new.optim.lr = 1e-3
  new.optim.decay = 0.1
  new.steps = 7
  assert loader.differences(stored, new) == ["optim.decay: absent -> 0.1", "optim.lr: 0.0005 -> 0.001"]
  assert loader.differences(stored, new, prefixes=("steps",)) == ["steps: absent -> 7"]


def with_length(steps, run):
  return {"num_steps": run, "optim": {"lr": 1.0, "schedule": {"name": "cosine", "num_steps": steps}}}


@pytest.mark.parametrize(
  "old, new, expected",
  [
    ((0, 400), (0, 800), ["optim.schedule.num_steps: 400 -> 800"]),
    ((0, 400), (400, 800), []),
    ((400, 200), (0, 400), []),
    ((400, 200), (400, 300), []),
    ((0, 400), (300, 400), ["optim.schedule.num_steps: 400 -> 300"]),
  ],
)
def test_the_length_of_a_schedule_is_compared_as_the_run_takes_it(old, new, expected):
  stored = json.loads(json.dumps(with_length(*old)))
  assert loader.differences(stored, with_length(*new)) == expected
  assert loader.differences(stored, ml_collections.ConfigDict(with_length(*new))) == expected


@pytest.mark.parametrize("field", ["optim.clip_norm", "optim.decay", "optim.lr", "task.max_depth"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(field, value):
  config = loader.changed(loader.load("configs/nyu_depth.py:tiny"), {field: value})
  with pytest.raises(ValueError, match=rf"config\.{re.escape(field)}={value} must be a finite number"):
    loader.check(config)


@pytest.mark.parametrize("words", [3, (3,), ("flip", None)])
def test_test_time_that_is_no_words_is_refused(words):
  config = loader.load("configs/nyu_depth.py:tiny").copy_and_resolve_references().unlock()
  with config.ignore_type():
    config.eval.test_time = words
  with pytest.raises(ValueError, match=r"config\.eval\.test_time=.* must be a tuple of words"):
    loader.check(config)


def test_a_negative_seed_is_refused():
  with pytest.raises(ValueError, match=r"config\.seed=-1 must be at least 0"):
    loader.check(loader.changed(loader.load("configs/nyu_depth.py:tiny"), {"seed": -1}))


@pytest.mark.parametrize("field", ["data.batch_size", "eval.batch_size"])
def test_a_batch_of_nothing_is_refused(field):
  with pytest.raises(ValueError, match=rf"config\.{re.escape(field)}=0 must be at least 1"):
    loader.check(loader.changed(loader.load("configs/nyu_depth.py:tiny"), {field: 0}))


def test_tokenizers_without_files_are_compared_and_folders_are_not():
  config = lambda name: {"method": {"tokenizer": name}}
  assert loader.differences(config("/a/clip"), config("gs://b/clip")) == []
  assert loader.differences(config("words"), config("/a/clip")) == ["method.tokenizer: 'words' -> '/a/clip'"]
  assert loader.differences(config("words"), config("characters")) == ["method.tokenizer: 'words' -> 'characters'"]
  assert loader.differences(config("words"), config("words")) == []
