"""Every method on real pictures and on the rooms, as on NYU Depth v2, KITTI, ADE20K and Cityscapes; tiny networks.

Each is trained, scored and predicts. For depth on real frames the tiny network of the configs, else the smallest one.

VPD_REAL=FOLDER must name a folder with `nyu_depth_v2/` and `kitti/` in it, a few frames of each with their lists, and
`ADEChallengeData2016/` with a few pictures:
VPD_REAL=FOLDER python -m pytest -m slow -s tests/runs/test_real_cells.py
"""

import json
import os
import pathlib
import time

import cv2
import numpy as np
import pytest

from tests.helpers import tiny
from vpd_jax.config import loader
from vpd_jax.data.datasets.rooms import Rooms
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import predict_folder
from vpd_jax.training import train

pytestmark = pytest.mark.slow

METHODS = ("vpd", "meta_prompts", "iedp", "eco_depth", "tadp")
STEPS, ROOM_STEPS = 8, 100  # on few frames, which come again and again, and on rooms
ROOMS, SIZE = 4, (96, 128)  # embedded rooms and pixels of each
ROOTS = {"nyu": "nyu_depth_v2", "kitti": "kitti"}
PICTURES = {"nyu": "official_splits/test/*/rgb_*.jpg", "kitti": "raw_data/*/*/image_02/data/*.png"}
PNG_SCALE = {"nyu": 1000, "kitti": 256}  # units per meter of the files that are written


@pytest.fixture(scope="module")
def real() -> pathlib.Path:
  folder = os.environ.get("VPD_REAL")
  if not folder:
    pytest.skip("VPD_REAL=FOLDER must name the folder of the real pictures, with nyu_depth_v2 and kitti in it")
  return pathlib.Path(folder)


def config_of(data: str, method: str, root: pathlib.Path):
  """The shipped config with the tiny network, three images a step, and rates that move a network within few steps."""
  config = loader.load(f"configs/{data}_depth.py:{method},tiny").unlock()
  config.data.update(root=str(root), batch_size=3, workers=0)
  of_length(config, STEPS)
  config.optim.lr, config.optim.schedule.min_lr = 1e-3, 1e-3
  config.optim.norm_group = config.optim.loss_group = 0  # those of the release do not divide three images
  config.optim.lr_groups = ((r"/vae/", None), (r"", 1.0))  # nothing here is pretrained
  config.head.init = "fan_in"
  if method == "meta_prompts":
    config.method.refine_init = "fan_in"
  config.eval.batch_size = 1
  return config.lock()


def with_captions(config, folder: pathlib.Path, names) -> None:
  """A caption for each of the pictures, where the method reads one."""
  if config.method.name == "tadp":
    path = folder / "captions.json"
    path.write_text(json.dumps({name: f"a picture called {name}" for name in names}))
    config.data.captions = str(path)


def caption(config) -> dict:
  """What predicting a folder is given besides, where the method reads a sentence."""
  return {"sentence": "a picture"} if config.method.name == "tadp" else {}


def of_length(config, steps: int) -> None:
  """Scores and saves at the end, logs every step."""
  if "half" in config.optim.schedule:
    config.optim.schedule.half = steps // 2
  config.update(num_steps=steps, eval_every=steps, save_every=steps, log_every=1)


def logged_losses(workdir: pathlib.Path) -> list[float]:
  """Of every step."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [line["train/loss"] for line in lines if "train/loss" in line]


def listed(root: pathlib.Path) -> list[str]:
  """Names of the pictures in the lists of a data set for depth, with their folders."""
  lines = [line for name in ("train_list.txt", "test_list.txt") for line in (root / name).read_text().splitlines()]
  return [line.split()[0].strip("/") for line in lines if line.strip()]


ROOM_NAMES = [*(f"train/{i}" for i in range(64)), *(f"eval/{i}" for i in range(ROOMS))]


def rooms(task: str, *, batch_size: int):
  """The section data of a few embedded rooms."""
  data = loader.load(f"configs/rooms.py:{task},tiny").data
  data.update(train_count=64, eval_count=ROOMS, size=SIZE, crop=(64, 64), batch_size=batch_size, workers=0)
  return data


def write_rooms(folder: pathlib.Path, task: str) -> None:
  """The rooms of the evaluation as pictures."""
  folder.mkdir()
  shown = Rooms(task=task, size=SIZE, eval_count=ROOMS).source("eval")
  for i in range(len(shown)):
    cv2.imwrite(str(folder / f"{i}.png"), shown[i]["image"][..., ::-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", ["nyu", "kitti"])
def test_trains_scores_and_predicts(data, method, real, tmp_path):
  begin, root = time.monotonic(), real / ROOTS[data]
  config, workdir = config_of(data, method, root).unlock(), tmp_path / "run"
  with_captions(config, tmp_path, listed(root))
  config.lock()
  scores, losses = train.run(config, str(workdir)), logged_losses(workdir)
  assert len(losses) == STEPS and np.mean(losses[-4:]) < np.mean(losses[:4])
  again = evaluate.run(config, str(workdir))
  assert again == pytest.approx(scores, rel=1e-5)
  lines = (root / "test_list.txt").read_text().split("\n")
  assert again[f"eval/{data}/images"] == len([line for line in lines if line.strip()])
  assert all(np.isfinite(value) for value in again.values())
  source, output = tmp_path / "pictures", tmp_path / "depth"
  source.mkdir()
  for path in sorted(root.glob(PICTURES[data])):
    (source / path.name).write_bytes(path.read_bytes())
  count = predict_folder.run(config, str(workdir), source=str(source), output=str(output), **caption(config))
  assert count == len(list(source.iterdir())) > 0
  for path in source.iterdir():
    meters = np.load(output / f"{path.stem}.npy")
    assert meters.shape == cv2.imread(str(path)).shape[:2]
    seen = ~np.isnan(meters)  # all but rows that the data set takes off its own frames
    assert seen.mean() > 0.9 and 0 < meters[seen].min() <= meters[seen].max() <= config.task.max_depth
    stored = cv2.imread(str(output / f"{path.stem}.depth.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(stored / PNG_SCALE[data], np.where(seen, meters, 0), atol=1 / PNG_SCALE[data])
  print(
    f"\n{data} {method}: {time.monotonic() - begin:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}, "
    f"rmse {again[f'eval/{data}/rmse']:.3f} m"
  )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", ["nyu", "kitti"])
def test_trains_scores_and_predicts_on_the_rooms(data, method, tmp_path):
  """The cells of both data sets, with the rooms in place of the frames."""
  config = tiny.shrunk(config_of(data, method, pathlib.Path())).unlock()
  config.data, config.eval.batch_size = rooms("depth", batch_size=3), 1
  with_captions(config, tmp_path, ROOM_NAMES)
  of_length(config, ROOM_STEPS)
  config.task.update(eval_crop="none", max_depth=10.0)
  config.eval.test_time = ("flip", "shift:2")
  workdir, config = tmp_path / "run", config.lock()
  scores, losses = train.run(config, str(workdir)), logged_losses(workdir)
  assert len(losses) == ROOM_STEPS and np.mean(losses[-20:]) < np.mean(losses[:20])
  assert evaluate.run(config, str(workdir)) == pytest.approx(scores, rel=1e-5)
  source, output = tmp_path / "pictures", tmp_path / "depth"
  write_rooms(source, "depth")
  assert predict_folder.run(config, str(workdir), source=str(source), output=str(output), **caption(config)) == ROOMS
  for path in source.iterdir():
    meters = np.load(output / f"{path.stem}.npy")
    assert meters.shape == SIZE and 0 < meters.min() < meters.max() <= 10
  print(f"\n{data} {method} on rooms: loss {losses[0]:.3f} to {losses[-1]:.3f}, rmse {scores['eval/rooms/rmse']:.3f} m")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", ["ade20k", "cityscapes"])
@pytest.mark.parametrize("data", ["photos", "rooms"])
def test_segments_trained_scored_and_predicting(data, cell, method, real, tmp_path):
  """The cells of both data sets, on the photos of ADE20K and on the embedded rooms."""
  begin, root = time.monotonic(), real / "ADEChallengeData2016"
  config = tiny.shrunk(loader.load(f"configs/{cell}_seg.py:{method},tiny")).unlock()
  if data == "photos":
    config.data = loader.load("configs/ade20k_seg.py:tiny").data
    config.data.update(root=str(root), complete=False, crop=(64, 64), batch_size=2, workers=0)
    config.task.avg_non_ignore = True  # only people are labeled
    with_captions(config, tmp_path, [path.name for path in root.glob("images/*/*.jpg")])
  else:
    config.data = rooms("segmentation", batch_size=2)
    with_captions(config, tmp_path, ROOM_NAMES)
    config.eval.test_time = ("slide:96:32",)
  steps = STEPS if data == "photos" else ROOM_STEPS
  of_length(config, steps)
  config.optim.lr, config.optim.schedule.warmup = 1e-3, 0
  config.optim.loss_group = min(config.optim.loss_group, 2)
  config.optim.lr_groups = ((r"/vae/", None), (r"", 1.0))  # nothing here is pretrained
  if method == "meta_prompts":
    config.method.refine_init = "fan_in"
  config.eval.batch_size = 1
  workdir, config = tmp_path / "run", config.lock()
  scores, losses = train.run(config, str(workdir)), logged_losses(workdir)
  # A crop without people counts as 0 where each image has a loss of its own: the largest values tell.
  level = max if data == "photos" else np.mean
  assert len(losses) == steps and level(losses[steps // 2 :]) < level(losses[: steps // 2])
  again = evaluate.run(config, str(workdir))
  assert again == pytest.approx(scores, rel=1e-5) and all(np.isfinite(value) for value in again.values())
  source, output = tmp_path / "pictures", tmp_path / "labels"
  if data == "rooms":
    write_rooms(source, "segmentation")
  else:
    source.mkdir()
    for path in (root / "images" / "validation").iterdir():
      (source / path.name).write_bytes(path.read_bytes())
  count = predict_folder.run(config, str(workdir), source=str(source), output=str(output), **caption(config))
  assert count == again[f"eval/{config.data.name}/images"] == len(list(source.iterdir()))
  for path in source.iterdir():
    label = cv2.imread(str(output / f"{path.stem}.label.png"), cv2.IMREAD_UNCHANGED)
    assert label.shape[:2] == cv2.imread(str(path)).shape[:2]
  print(
    f"\n{cell} {method} on {data}: {time.monotonic() - begin:.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}, "
    f"mIoU {again[f'eval/{config.data.name}/mIoU']:.3f}"
  )
