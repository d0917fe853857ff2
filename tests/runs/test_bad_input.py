"""Bad input, as users give it: one line that names cause and remedy, exit code 2, and no file begun."""

import dataclasses
import fnmatch
import pathlib
import re
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers import commands
from tests.helpers.commands import (
  config,
  cut,
  cut_all,
  empty,
  foreign,
  in_copy,
  picture,
  pictures,
  references,
  released,
  text,
  vectors,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A command, and what its one line must say.

  Attributes:
    argv: --config={home}/frames.py and --workdir={here}/work stand for those it does not bring; {home} is the folder of
      what is good, {here} that of the case.
    cause, remedy: found in the message.
    prepare: makes the files of the case in {here}; where it makes nyu/, that is the data set.
    env: variables of the environment.
    makes: patterns of all files that are made or changed, below {here} or {home}.
  """

  argv: str
  cause: str
  remedy: str
  prepare: Callable[[pathlib.Path], object] = lambda here: None
  env: dict[str, str] = dataclasses.field(default_factory=dict)
  makes: tuple[str, ...] = ()


DEPTH = "nyu/sync/kitchen_0001/sync_depth_00000.png"
TEST_DEPTH = "nyu/official_splits/test/kitchen/sync_depth_00000.png"
TRAIN_LIST = "nyu/train_list.txt"
LAST_KERNEL = "last_layer_depth.2.weight"
TINY = "--config=configs/nyu_depth.py:tiny --config.data.root={home}/nyu --config.init.pretrained={here}/released.pth"
MINE = "--config=mine.py"
REFER = "--config=configs/my_refer.py:tiny --config.data.root={here}"
EVAL, OTHER = "--mode=eval --workdir={home}/run", "--workdir={home}/run"
PREDICT = "--mode=predict --workdir={home}/run --input={here}/pictures --output={here}"
VIDEO = "--mode=predict --workdir={home}/run --input={here}/clip.mp4 --output={here}/out"
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # a port where nobody answers
BEGUN = ("work/config.json", "work/parameters.txt", "work/events.*")  # a run that is set up, without a checkpoint
RESULTS = tuple(f"out/{name}{end}" for name in "ab" for end in (".npy", ".json", ".depth.png", ".color.png"))

CASES = {
  # The command line and the config file.
  "no config": Case("--config=", "names no file", "give one like"),
  "a config file that is not there": Case("--config=configs/mine_own.py", "was not found", "like configs/"),
  "a config file that is nearly there": Case(
    "--config=configs/nyu_dept.py", "was not found", "mean configs/nyu_depth.py?"
  ),
  "a config file that fails": Case(
    MINE, "line 2, fails with NameError", "fix the file", text("mine.py", "import vpd_jax\nx = nothing\n")
  ),
  "a config file that is not Python": Case(MINE, "SyntaxError", "fix the file", text("mine.py", "def get_config(:\n")),
  "a get_config that fails": Case(
    MINE, "line 2, fails with KeyError", "fix the file", text("mine.py", "def get_config():\n  return {}['a']\n")
  ),
  "no get_config": Case(MINE, "no function get_config", "write one", text("mine.py", "")),
  "a dict for a config": Case(
    MINE, "returns a dict", "return a ConfigDict", text("mine.py", "def get_config():\n  return {}\n")
  ),
  "words nobody takes": Case(
    MINE + ":tiny", "takes no words", "remove ':tiny'", text("mine.py", "def get_config():\n  return {}\n")
  ),
  "an unknown word": Case("--config={home}/frames.py:vdp", "'vdp' is unknown", "method: vpd; size: tiny"),
  "two misspelled fields": Case(
    "--config.optim.decai=1 --config.lr=1",
    "config.optim.decai is unknown: did you mean --config.optim.decay?",
    "config.lr is unknown: did you mean --config.lora.lr or --config.optim.lr?",
  ),
  "a wrong kind of value": Case("--config.optim.lr=fast", "optim.lr=fast", "convert string to float"),
  "an unknown flag": Case("--modus=eval", "Unknown command line flag 'modus'", "Did you mean: mode"),
  "an unknown mode": Case("--mode=test", "--mode=test", "train|eval|predict"),
  "a word without a flag": Case("eval", "['eval']", "write --flag=value"),
  "a section left out": Case(MINE, "config.neck is left out", "copy it from", config("del config['neck']")),
  "initial weights left out": Case(MINE, "config.init is left out", "copy it from", config("del config['init']")),
  "a field that a part does not take": Case(
    MINE, "does not take ['depth']", "remove or correct", config("config.head.depth = 3")
  ),
  # Names and numbers.
  "an unknown method": Case("--config.method.name=vdp", "config.method.name='vdp'", "choose one of ["),
  "an unknown neck": Case("--config.neck.name=vdp", "config.neck.name='vdp'", "choose one of ["),
  "an unknown head": Case("--config.head.name=vdp", "config.head.name='vdp'", "choose one of ["),
  "an unknown task": Case("--config.task.name=vdp", "config.task.name='vdp'", "choose one of ["),
  "an unknown data set": Case("--config.data.name=vdp", "config.data.name='vdp'", "choose one of ["),
  "an unknown schedule": Case("--config.optim.schedule.name=vdp", "schedule.name='vdp'", "choose one of ["),
  "an unknown attention": Case("--config.backbone.attention=vdp", "backbone.attention='vdp'", "choose one of ("),
  "an unknown dtype": Case("--config.dtype=float16", "config.dtype='float16'", "choose one of ["),
  "float64 without x64": Case(
    "--config.dtype=float64 --config.param_dtype=float64", "config.dtype='float64'", "needs JAX_ENABLE_X64=1"
  ),
  "an unknown test time": Case("--config.eval.test_time=('flop',)", "has 'flop'", "known are 'flip'"),
  "test time as a string": Case("--config.eval.test_time=flop", "has 'flop'", "known are 'flip'"),
  "an unknown coverage": Case("--config.eval.coverage=half", "eval.coverage='half'", "choose one of ("),
  "an unknown checkpoint": Case("--config.eval.checkpoint=last", "eval.checkpoint='last'", "choose one of ("),
  "accumulation that does not divide": Case("--config.optim.accumulation=4", "accumulation=4", "must divide"),
  "groups that do not divide": Case("--config.optim.norm_group=4", "norm_group=4", "must divide the 6 images"),
  "numbers below their least": Case(
    "--config.num_steps=-4 --config.log_every=0", "config.num_steps=-4", "config.log_every=0 must be at least 1"
  ),
  "a crop larger than the resized image": Case("--config.data.crop=(96,96)", "crop=(96, 96)", "make data.crop smaller"),
  "a rule without effect": Case(
    "--config.optim.lr_groups=(('/vea/',None),('',1.0))", "match no array: ['/vea/']", "remove or correct"
  ),
  "a batch that does not divide among devices": Case("", "batch_size=6", "multiple of the 4 devices; use 8", env=FOUR),
  "an evaluation batch that does not": Case(
    "--config.data.batch_size=12 --config.eval.batch_size=3", "batch_size=3", "of the 4 devices; use 4", env=FOUR
  ),
  "a mesh that does not fit": Case("--config.mesh.fsdp=3", "fsdp=3 does not cover", "divides 4", env=FOUR),
  # Data.
  "no data root": Case("--config.data.root=", "data.root is empty", "set it to the folder"),
  "a data root that is not there": Case("--config.data.root={home}/no", "/no' is not a folder", "set data.root"),
  "a listed file that is not there": Case(
    "", "missing in {here}/nyu/sync: kitchen_0001/sync_depth", "sync.zip", in_copy(DEPTH, pathlib.Path.unlink)
  ),
  "no list": Case(
    "", "list file train_list.txt", "name it in data.train_list", in_copy(TRAIN_LIST, pathlib.Path.unlink)
  ),
  "an empty list": Case("", "it is empty", "the image and the ground truth", in_copy(TRAIN_LIST, empty)),
  "a list of one column": Case(
    "",
    "lines 1 do not hold",
    "the image and the ground truth, separated by a space",
    in_copy(TRAIN_LIST, lambda path: path.write_text("/kitchen_0001/rgb_00000.jpg\n")),
  ),
  "a truncated depth map in training": Case(
    "--config.init.run={home}/run", "{here}/" + DEPTH, "copy or download it again", in_copy(DEPTH, cut), makes=BEGUN
  ),
  "a crop larger than the image": Case(
    "--config.init.run={home}/run --config.data.resize=() --config.data.crop=(96,96)",
    "crop=96x96 does not fit into an image of 64x96",
    "make data.crop smaller",
    makes=BEGUN,
  ),
  "a truncated depth map in evaluation": Case(
    EVAL, "{here}/" + TEST_DEPTH, "copy or download it again", in_copy(TEST_DEPTH, cut)
  ),
  "a depth map of another size": Case(
    EVAL, "sync_depth_00000.png is 32x96", "one size", in_copy(TEST_DEPTH, picture(np.ones((32, 96), np.uint16)))
  ),
  "a depth map of 8 bits": Case(
    EVAL, "1 channel(s) of 8 bits", "one of 16 bits", in_copy(TEST_DEPTH, picture(np.ones((64, 96), np.uint8)))
  ),
  "a depth map of NaN": Case(
    EVAL, "of 32 bits", "one of 16 bits", in_copy(TEST_DEPTH, picture(np.full((64, 96), np.nan, np.float32)))
  ),
  # Sentences.
  "references that would run something": Case(
    "--config=configs/refcoco_refer.py:tiny --config.data.root={here}",
    "refs(unc).p asks for posix.open, which could run anything",
    "fetch the file from where the data set is published",
    references,
  ),
  "an empty sentence": Case(
    REFER,
    "1 of 1 entries are wrong: number 1 has an empty sentence",
    "One is like",
    text("sentences.json", '[{"image": "1.jpg", "mask": "1.png", "sentences": [" "]}]'),
  ),
  # Weights.
  "weights that are not there": Case("--config.init.pretrained={here}/no.ckpt", "no.ckpt' does not exist", "give a"),
  "a run that is not there": Case("--config.init.run={here}/no", "no' does not exist", "give a diffusers folder"),
  "a hub that does not answer": Case(
    "--config.init.pretrained=nobody/nothing", "'nobody/nothing'", "give a local folder", env=NO_HUB
  ),
  "a misspelled name of known weights": Case(
    "--config.init.pretrained=vpd/nyu_dept", "weights 'vpd/nyu_dept' are not known", "did you mean the known weights"
  ),
  "known weights that must be fetched by hand": Case(
    "--config.init.pretrained=vpd/nyu_depth",
    "vpd/nyu_depth is not downloaded: get VPD",
    "save it as {here}/weights/vpd_depth_480x480.pth",
    env={"VPD_WEIGHTS": "weights"},
  ),
  "known weights in a folder that cannot be made": Case(
    "--config.init.pretrained=sd/1.5",
    "sd/1.5 cannot be fetched",
    "and the free space in /proc/weights",
    env={"VPD_WEIGHTS": "/proc/weights"} | NO_HUB,
  ),
  "no checkpoint": Case(
    "--config.init.pretrained={here}/a.ckpt", "is not a checkpoint", "give a .safetensors", text("a.ckpt", "weights")
  ),
  "a web page": Case(
    "--config.init.pretrained={here}/a.ckpt", "is a web page", "fetch the file again", text("a.ckpt", "<!DOCTYPE html>")
  ),
  "a truncated checkpoint": Case(TINY, "released.pth is damaged", "fetch it again", lambda here: cut(released(here))),
  "a foreign checkpoint": Case(
    "--config.init.pretrained={here}/a.pth", "no known kind, like ['conv1.weight']", "give a diffusers", foreign
  ),
  "a checkpoint with a missing key": Case(
    TINY,
    "released.pth: released:vpd_depth: the weights do not fit: 1 are filled by nothing",
    "head/last_layer_depth/2/kernel; give weights of the network",
    lambda here: released(here, LAST_KERNEL),
  ),
  "class vectors of another width": Case(
    "--config.method.class_vectors={here}/v.npy", "are [27, 5], the model needs [27, 16]", "FILE", vectors(5)
  ),
  "no class vectors": Case(
    "--config.method.class_vectors=", "there are no class vectors", "random:SEED for smoke tests"
  ),
  # The workdir.
  "a workdir below a file": Case("--workdir={here}/file/run", "/file/run' cannot be", "another", text("file", "")),
  "a workdir that is a file": Case("--workdir={here}/file", "/file' cannot be", "another", text("file", "")),
  "a workdir that cannot be made": Case("--workdir=/proc/run", "workdir='/proc/run' cannot be", "another"),
  "a workdir of another method": Case(
    OTHER + " --config.method.timestep=2", "method.timestep: 1 -> 2", "--accept_config_changes"
  ),
  "a workdir of another head": Case(
    OTHER + " --config.head.init=fan_in", "head.init: 'released' -> 'fan_in'", "--accept_config_changes"
  ),
  "a workdir of another task": Case(
    OTHER + " --config.task.max_depth=80.0", "task.max_depth: 10.0 -> 80.0", "--accept_config_changes"
  ),
  "a workdir of other data": Case(
    OTHER + " --config.data.cut_depth=off", "data.cut_depth: 'released' -> 'off'", "--accept_config_changes"
  ),
  "a workdir of another optimizer": Case(
    OTHER + " --config.optim.lr=1.0", "optim.lr: 0.0005 -> 1.0", "--accept_config_changes"
  ),
  "evaluation of another network": Case(
    EVAL + " --config.neck.width=64", "is not of this config", "give the config it was trained with"
  ),
  "a damaged state in a workdir": Case(
    "--mode=eval --workdir={here}/run", "is damaged", "remove", in_copy("run/checkpoints/2/state", cut_all)
  ),
  "a damaged config in a workdir": Case(
    "--mode=eval --workdir={here}/run", "is damaged", "remove", in_copy("run/checkpoints/2/config", shutil.rmtree)
  ),
  "evaluation of nothing": Case("--mode=eval", "no trained weights to evaluate", "give one of them"),
  # Prediction.
  "prediction with nothing": Case(
    PREDICT + "/out --workdir={here}/no", "no' holds no checkpoint", "give one of them", pictures
  ),
  "prediction of nothing": Case(PREDICT + "/out --input={here}/no", "does not exist", "give an image, or a folder"),
  "prediction of an empty folder": Case(
    PREDICT + "/out", "contains no image", "give a folder that does", lambda here: (here / "pictures").mkdir()
  ),
  "results in a file": Case(PREDICT + "/pictures/a.png", "a.png is not a folder", "give another", pictures),
  "results below a file": Case(PREDICT + "/pictures/a.png/b", "a.png is not a folder", "give another", pictures),
  "results among the pictures": Case(PREDICT + "/pictures", "folder of the images", "give another", pictures),
  "an unknown class": Case(PREDICT + "/out --class=castle", "class 'castle'", "choose one of printer_room", pictures),
  "a sentence for a method that reads none": Case(
    PREDICT + "/out --sentence=car", "--sentence='car' has no effect", "leave it out", pictures
  ),
  "sentences of another form": Case(
    PREDICT + "/out --sentences={here}/s.json",
    "s.json' must hold a list of entries",
    'entries like {"image": "1.jpg", "sentence": "the red car"}',
    lambda here: (pictures(here), (here / "s.json").write_text('[{"image": "a.png", "sentence": " "}]')),
  ),
  "sentences about a picture that is not there": Case(
    PREDICT + "/out --sentences={here}/s.json",
    "names images that are not in {here}/pictures: c.png",
    "correct it",
    lambda here: (pictures(here), (here / "s.json").write_text('[{"image": "c.png", "sentence": "car"}]')),
  ),
  "a damaged picture among good ones": Case(
    PREDICT + "/out", "1 of 3 images", "other 2 are done; fix or remove these", pictures, makes=RESULTS
  ),
  "results where nothing can be written": Case(
    PREDICT + " --output=/proc/out", "/proc is not a folder", "another", pictures
  ),
  "a focal length for a video": Case(
    VIDEO + " --focal=0", "--focal: no effect on a video", "leave it out", text("clip.mp4", "")
  ),
  "a focal length for training": Case(
    "--mode=train --focal=0", "--focal: only valid with --mode=predict", "--mode=train"
  ),
  "a video without frames": Case(VIDEO, "clip.mp4' holds no frame", "give another video", text("clip.mp4", "")),
  "flags without effect on a video": Case(
    VIDEO + " --ply --boxes=a.json", "--boxes, --ply: no effect on a video", "leave it out", text("clip.mp4", "")
  ),
  # Export.
  "an export of nothing": Case("--mode=export --output={here}/net", "work' holds no checkpoint", "give one of them"),
  "an export into a folder that is there": Case(
    "--mode=export --workdir={home}/run --output={here}", "exists already", "give a folder that does not"
  ),
  "an export without a place": Case("--mode=export --workdir={home}/run", "needs a place", "give --output=FOLDER"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
  """The folder of what is good."""
  home = tmp_path_factory.mktemp("home")
  commands.write_good(home)
  return home


@pytest.fixture(scope="module")
def server():
  with commands.started() as process:
    yield process


@pytest.fixture
def here(home, request) -> pathlib.Path:
  """The folder of a case, and the working directory of its command."""
  folder = home / re.sub(r"\W+", "_", request.node.name) / "here"
  folder.mkdir(parents=True)
  return folder


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_with_cause_and_remedy(server, home, here, name):
  case = CASES[name]
  case.prepare(here)
  before = commands.files(here, home / "run", home / "nyu")
  code, out, errors = commands.command(server, home, here, case.argv, case.env)
  lines = errors.splitlines()
  assert code == 2, errors
  assert [line.startswith("error: ") for line in lines] == [True], errors
  assert "Traceback" not in out + errors
  assert all(part.replace("{here}", str(here)) in lines[0] for part in (case.cause, case.remedy)), lines[0]
  after = commands.files(here, home / "run", home / "nyu")
  made = [path for path in after if before.get(path) != after[path]]
  assert before.keys() <= after.keys()
  assert [p for p in made if not any(fnmatch.fnmatch(p, pattern) for pattern in case.makes)] == []
  assert [pattern for pattern in case.makes if not fnmatch.filter(made, pattern)] == []


def test_steps_logging_and_evaluation_are_no_other_config(server, home, here):
  shutil.copytree(home / "run", here / "work")
  argv = (
    "--config.num_steps=2 --config.log_every=3 --config.save_every=7 --config.eval_every=9 --config.keep=4 "
    "--config.eval.panels=1 --config.eval.batch_size=3 --config.eval.test_time=() --config.data.workers=1 "
    "--config.optim.lr=1.0 --accept_config_changes"
  )
  code, out, errors = commands.command(server, home, here, argv, {})
  assert code == 0 and "nothing to do: step 2 of 2" in out, errors
  assert re.findall("changed: .*", out) == ["changed: optim.lr: 0.0005 -> 1.0"]


def test_a_run_is_exported_by_its_own_config(server, home, here):
  code, out, errors = commands.command(server, home, here, "--mode=export --workdir={home}/run --output={here}/net", {})
  assert code == 0 and f"network written to {here}/net; python {here}/net/load.py runs it" in out, errors
  assert sorted(path.name for path in (here / "net").iterdir()) == [
    "load.py", "network.jax_export", "network.json", "weights.safetensors",
  ]  # fmt: skip
