"""From a file of weights to a colored picture: what the whole process costs, against PyTorch and another commit.

python benchmarks/first_picture.py --weights=vpd_depth_480x480.pth [--rounds=5] [--pictures=1] [--baseline=880ccdc]

VPD depth at full size on a CPU, one 640 x 480 picture of a drawn room, in the views of the paper: two windows, mirrored
too. Each side is a process of its own, by turns: ours without any cache ("cold"), ours with the programs that its first
run left in the workdir ("warm"), `torch_depth.py --predict` (mmap, assign, one batch of all views), and, likewise cold
and warm, the commit that --baseline names, from a checkout of its own.

Prints a table of medians: CPU seconds (user and system), which depend less on what else runs, wall seconds, peak of the
resident memory, and the ratio of CPU seconds to PyTorch's. With --pictures=20: a folder of that many pictures of four
sizes, and pictures a minute.

The weights are in the authors' layout; PyTorch reads the same file, whose names are mapped to diffusers' by the tables
of vpd_jax.convert. Needs the extra `reference`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import cv2
from ml_collections import ConfigDict

from vpd_jax import experiment
from vpd_jax.config import loader
from vpd_jax.convert.rules import Rule
from vpd_jax.convert.tables import released, stable_diffusion
from vpd_jax.data.datasets import nyu, rooms
from vpd_jax.files import atomic

HERE = pathlib.Path(__file__).resolve().parent
CLASS = "kitchen"
SIZES = ((480, 640), (640, 480), (600, 800), (768, 1024))  # height, width
SIDES = ("torch", "ours", "baseline")


class Cost(NamedTuple):
  """What a process took: CPU and wall seconds, and GiB of resident memory at the peak."""

  cpu: float
  wall: float
  peak: float


def measured(command: list[str], folder: pathlib.Path, log: pathlib.Path) -> Cost:
  """Runs a command in a folder; what it prints goes to a file."""
  environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
  begin = time.monotonic()
  with log.open("w") as file:
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
  return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - begin, usage.ru_maxrss / 2**20)


def torch_names(config: ConfigDict, weights_prefix: str) -> dict[str, str]:
  """The names of torch_depth.VpdDepth, by way of ours, to those of the authors' file."""
  shapes = experiment.model_shapes(config)
  table = [rule for rule in released.vpd_depth() if isinstance(rule, Rule)]
  authors = {}
  for name, x in shapes.items():
    authors[name] = next(found[0] for rule in table if (found := rule.to_source(name, len(x.shape))))
  script = "import json, sys; sys.path.insert(0, sys.argv[1]); import torch, torch_depth\n"
  script += "with torch.device('meta'): model = torch_depth.VpdDepth(json.loads(sys.stdin.read()))\n"
  script += "print('\\n' + json.dumps({n: list(x.shape) for n, x in model.state_dict().items()}))"
  given = json.dumps(config.to_dict())
  made = subprocess.run([sys.executable, "-c", script, HERE], input=given, capture_output=True, text=True, check=True)
  held = json.loads(made.stdout.splitlines()[-1])
  inner = {name.removeprefix("encoder."): name for name in held if name.startswith(("encoder.unet.", "encoder.vae."))}
  rules = [rule for rule in stable_diffusion.diffusers(inner, shapes) if isinstance(rule, Rule)]
  names = {name: weights_prefix + name for name in held}
  for short, name in inner.items():
    ours = next(found[0] for rule in rules if (found := rule.to_target(short, len(held[name]))))
    names[name] = weights_prefix + authors[ours]
  return names


def draw(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
  """Pictures of rooms, of SIZES by turns."""
  folder.mkdir(parents=True)
  made = []
  for i in range(count):
    made.append(folder / f"{i}.png")
    cv2.imwrite(str(made[-1]), rooms.draw(1, "eval", i, SIZES[i % len(SIZES)]).image[..., ::-1])
  return made


@contextlib.contextmanager
def checkout(commit: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The files of a commit in a folder, for as long as it is needed."""
  subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=HERE, check=True)
  try:
    yield folder
  finally:
    subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=HERE, check=True)


def table(costs: dict[str, list[Cost]], pictures: int) -> str:
  """The medians as Markdown."""
  middle = {side: Cost(*map(statistics.median, zip(*runs, strict=True))) for side, runs in costs.items()}
  rate = " pictures/min |" if pictures > 1 else ""
  lines = [f"| side | CPU s | wall s | peak GiB | CPU, of PyTorch's |{rate}", f"|{'---|' * (5 + (pictures > 1))}"]
  for side, cost in middle.items():
    ratio = f"{cost.cpu / middle['torch'].cpu:.2f}" if "torch" in middle else "-"
    lines.append(f"| {side} | {cost.cpu:.0f} | {cost.wall:.0f} | {cost.peak:.2f} | {ratio} |")
    if pictures > 1:
      lines[-1] += f" {60 * pictures / cost.wall:.2f} |"
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--weights", type=pathlib.Path, required=True, help="in the authors' layout, with 'model' at the top"
  )
  parser.add_argument("--config", default="configs/nyu_depth.py:vpd", help="VPD depth, of any size")
  parser.add_argument("--prefix", default="module.", help="of the names in the file; the release has one")
  parser.add_argument("--rounds", type=int, default=5, help="runs of each side, by turns")
  parser.add_argument("--pictures", type=int, default=1, help="number of pictures")
  parser.add_argument("--baseline", default="", help="commit to compare with")
  parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all")
  parser.add_argument("--keep", type=pathlib.Path, help="folder for all pictures, which stays")
  parser.add_argument("--json", type=pathlib.Path, help="file for every run")
  options = parser.parse_args()
  sides = [side for side in options.sides if side != "baseline" or options.baseline]
  weights, costs = options.weights.absolute(), {}
  with contextlib.ExitStack() as stack:
    folder = (options.keep and options.keep.absolute()) or pathlib.Path(
      stack.enter_context(tempfile.TemporaryDirectory())
    )
    pictures = draw(folder / "pictures", options.pictures)
    roots = {"ours": HERE.parent}
    if "baseline" in sides:
      roots["baseline"] = stack.enter_context(checkout(options.baseline, folder / "checkout"))
    if "torch" in sides:
      config = loader.load(options.config)
      settings = {"config": config.to_dict(), "weights": str(weights), "class_id": nyu.CLASSES.index(CLASS)}
      settings |= {"names": torch_names(config, options.prefix), "side": config.data.crop[0]}
      settings["pictures"] = [(str(path), str(folder / f"torch_{path.name}")) for path in pictures]
      atomic.write_json(folder / "settings.json", settings)
    for turn in range(options.rounds):
      for side in sides:
        if side == "torch":
          runs = {"torch": [str(HERE / "torch_depth.py"), f"--settings={folder / 'settings.json'}", "--predict"]}
        else:
          work = folder / f"{side}{turn}"
          command = ["-m", "vpd_jax.main", "--mode=predict", f"--config={options.config}", f"--class={CLASS}"]
          command += [f"--config.init.pretrained={weights}", f"--workdir={work}", f"--input={folder / 'pictures'}"]
          runs = {f"{side}, {state}": [*command, f"--output={work}/{state}"] for state in ("cold", "warm")}
        for name, words in runs.items():
          cost = measured([sys.executable, *words], roots.get(side, HERE), folder / "log")
          costs.setdefault(name, []).append(cost)
          print(f"{name}: {cost.cpu:.1f} s CPU, {cost.wall:.1f} s wall, {cost.peak:.2f} GiB", flush=True)
          if options.json:
            atomic.write_json(options.json, costs)
  print(table(costs, options.pictures))


if __name__ == "__main__":
  main()
