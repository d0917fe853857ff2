"""Commands as users give them, and what they go wrong on: good files, and ways to damage them.

Every command is a process of its own, forked from one that has imported the package but touched no device: a second
per command in place of ten.
"""

import contextlib
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import cv2
import jax.numpy as jnp
import numpy as np

from tests.helpers import oracle, pth, tiny
from tests.helpers.depth_frames import write_frames
from tests.helpers.paths import ROOT
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader

SECONDS = 100  # after which a command is ended
Change = Callable[[pathlib.Path], object]

CONFIG = """
from tests.helpers import tiny
from vpd_jax.config import loader

def get_config(argument=""):
  loader.parse_variant(argument, method=("vpd",), size=("tiny",))
  config = tiny.shrunk(loader.load("configs/nyu_depth.py:tiny")).unlock()
  config.update(num_steps=4, log_every=1, eval_every=4, save_every=4)
  config.data.root = {root!r}
  return config.lock()
"""

# Reads argv, env and folder of a command as JSON, answers with its exit code.
SERVER = f"""
import gc, json, os, signal, sys
import vpd_jax.main, vpd_jax.training.train, vpd_jax.prediction.predictor
gc.freeze()  # a collection in a child would copy every page it touches
for line in sys.stdin:
  case = json.loads(line)
  child = os.fork()
  if not child:
    signal.alarm({SECONDS})
    os.chdir(case["folder"])
    os.environ.update(case["env"])
    sys.argv = ["main", *case["argv"]]
    for number, name in enumerate((os.devnull, "../stdout", "../stderr")):
      os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    vpd_jax.main.entry()
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def write_good(home: pathlib.Path) -> None:
  """A good data set `nyu`, the config `frames.py` for it, and `run`, a workdir of that config at step 2."""
  scenes = ("kitchen", "bedroom", "office", "study", "bathroom", "cafe")
  for split, folder, end in (("train", "sync", "_0001"), ("test", "official_splits/test", "")):
    lines = write_frames(home / "nyu" / folder, [f"{scene}{end}/{{}}_00000" for scene in scenes], (64, 96))
    (home / "nyu" / f"{split}_list.txt").write_text("\n".join(lines) + "\n")
  (home / "frames.py").write_text(CONFIG.format(root=str(home / "nyu")))
  frames = loader.load(str(home / "frames.py"))
  exp = experiment.assemble(frames)
  state = tiny.train_state(exp, tiny.filled(exp.spec.shapes)).replace(step=jnp.int32(2))
  with initialize.checkpoints(frames, exp, str(home / "run")) as checkpoints:
    checkpoints.save(2, state, initialize.to_json(frames), {initialize.best_metric(frames, exp): 1.0}, force=True)


@contextlib.contextmanager
def started() -> Iterator[subprocess.Popen]:
  """The process that `command` talks to."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:os.fork"}
  command = [sys.executable, "-c", SERVER]
  with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    yield process
    process.stdin.close()


def command(
  server: subprocess.Popen, home: pathlib.Path, here: pathlib.Path, argv: str, env: dict[str, str]
) -> tuple[int, str, str]:
  """Exit code, output and errors of a command whose last word for a flag counts."""
  words = [f"--config={home}/frames.py"] if "--config=" not in argv else []
  words += [f"--workdir={here}/work", *argv.format(home=home, here=here).split()]
  words += [f"--config.data.root={here}/nyu"] if (here / "nyu").is_dir() else []
  print(json.dumps({"argv": words, "env": env, "folder": str(here)}), file=server.stdin, flush=True)
  code = int(server.stdout.readline())
  return code, (here.parent / "stdout").read_text(), (here.parent / "stderr").read_text()


def files(*folders: pathlib.Path) -> dict[str, int]:
  """Time of the last change of every file below, by its path from there; but for what Python keeps of the config."""
  below = [(p, f) for f in folders for p in f.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
  return {str(p.relative_to(f)): p.stat().st_mtime_ns for p, f in below}


def cut_all(folder: pathlib.Path) -> None:
  """Cuts every file below a folder."""
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      cut(path)


def in_copy(name: str, change: Change) -> Change:
  """Copies a good folder, the first part of `name`, and changes a file in it."""

  def prepare(here: pathlib.Path) -> None:
    part = name.split("/")[0]
    shutil.copytree(here.parents[1] / part, here / part)
    change(here / name)

  return prepare


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: pathlib.Path) -> None:
  path.write_bytes(b"")


def picture(array: np.ndarray) -> Change:
  """Writes an array in place of a file, as PNG, or as TIFF where that cannot hold it."""
  suffix = ".tiff" if array.dtype == np.float32 else ".png"
  return lambda path: path.write_bytes(cv2.imencode(suffix, array)[1].tobytes())


def text(name: str, content: str) -> Change:
  return lambda here: (here / name).write_text(content)


def config(lines: str) -> Change:
  """A config file mine.py: the good one, changed by some lines."""
  return lambda here: (here / "mine.py").write_text(
    "from vpd_jax.config import loader\n"
    "def get_config():\n"
    f"  config = loader.load({str(here.parents[1] / 'frames.py')!r}).unlock()\n"
    f"  {lines}\n"
    "  return config\n"
  )


def pictures(here: pathlib.Path) -> None:
  """Two good pictures, one cut off, and notes."""
  folder = here / "pictures"
  folder.mkdir()
  for name in ("a.png", "b.png", "broken.png"):
    picture(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))(folder / name)
  cut(folder / "broken.png")
  (folder / "notes.txt").write_text("not a picture")


class _Opens:
  """Unpickled by the full unpickler, this makes a file."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __reduce__(self):
    return os.open, (str(self.path), os.O_CREAT)


def references(here: pathlib.Path) -> None:
  """References of RefCOCO that ask for a function."""
  (here / "refcoco").mkdir()
  (here / "refcoco" / "instances.json").write_text("{}")
  (here / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([_Opens(here / "made by a pickle")], protocol=2))


def released(here: pathlib.Path, without: str = "") -> pathlib.Path:
  """The authors' checkpoint of the tiny network, all numbers 1 and stored once."""
  one = pth.Storage(np.ones(1, np.float32))
  entries = [e for e in oracle.manifest("vpd_depth") if e["name"] != without and not e["name"].startswith("sd_model.")]
  state = {e["name"]: pth.tensor(one, shape=e["shape"], strides=(0,) * len(e["shape"])) for e in entries}
  return pth.write_zip(here / "released.pth", {"model": state})


def foreign(here: pathlib.Path) -> None:
  pth.write_zip(here / "a.pth", {"conv1.weight": pth.tensor(np.ones(3, np.float32))})


def vectors(width: int) -> Change:
  return lambda here: np.save(here / "v.npy", np.ones((27, width), np.float32))
