"""The full network on real pictures through the command line: scores, pictures and two steps in bounded memory.

VPD_REAL=FOLDER must name a folder with NYU Depth v2 in it (`nyu_depth_v2/`, a few frames will do), for KITTI's networks
`kitti/`, for those of pose `coco/`. The weights are rebuilt from their names, or random, so the depth means nothing;
time, memory and agreement between the modes do. `pytest -s` shows the figures: on 2 cores about 15 minutes, 3.5 GB of
disk for the weights and 21 GB for two checkpoints; the networks that run forward once (`-k forward`) take 15 minutes
more for the six of depth.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import cv2
import jax
import numpy as np
import pytest

import vpd_jax
from tests.helpers import fill, oracle, pth
from vpd_jax.config import loader
from vpd_jax.data.datasets.coco_pose import CocoPose
from vpd_jax.data.datasets.refcoco import RefCoco
from vpd_jax.data.transforms import depth as depth_transforms

LIMIT_GIB = 18
TIMEOUT = 3600

pytestmark = pytest.mark.slow


class Rebuilt(pth.Storage):
  """The numbers of one entry of the manifest, made when they are asked for: together they are 3.4 GiB."""

  def __init__(self, entry: dict):
    self.entry = entry

  @property
  def array(self) -> np.ndarray:
    name = self.entry.get("alias_of") or self.entry["name"]
    return np.ascontiguousarray(fill.weight(name, self.entry["shape"], 0))


@pytest.fixture(scope="module")
def real() -> pathlib.Path:
  folder = os.environ.get("VPD_REAL")
  if not folder:
    pytest.skip("VPD_REAL=FOLDER must name the folder of the real pictures, with nyu_depth_v2 in it")
  return pathlib.Path(folder) / "nyu_depth_v2"


@pytest.fixture(scope="module")
def checkpoint(real, tmp_path_factory):
  """Full-size weights in the authors' names and file layout."""
  path = tmp_path_factory.mktemp("released") / "vpd_depth_480x480.pth"
  entries = [e for e in oracle.manifest("vpd_depth", "full") if not e["name"].startswith("sd_model.")]
  state = {f"module.{e['name']}": pth.tensor(Rebuilt(e), shape=tuple(e["shape"])) for e in entries}
  yield pth.write_zip(path, {"model": state, "epoch": 25})
  shutil.rmtree(path.parent)


@pytest.fixture
def command(real, checkpoint):
  """Runs one mode in a process of its own; returns what it printed."""

  def run(mode: str, workdir: pathlib.Path, *more: str) -> str:
    words = [sys.executable, "-m", "vpd_jax.main", "--config=configs/nyu_depth.py:vpd", f"--mode={mode}"]
    fields = {"data.root": real, "init.pretrained": checkpoint, "eval.batch_size": 1}
    words += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items()), *more]
    # Machine code as users have it; the tests' own is not optimized, and takes ten times as long here.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    begin, printed = time.monotonic(), workdir.parent / f"{mode}.txt"
    with printed.open("w") as file:
      process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
      _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, peak = time.monotonic() - begin, usage.ru_maxrss / 2**20
    text = printed.read_text()
    assert process.returncode == 0, text
    compiled = re.search(r"compiled; .*", text)
    print(f"\n{mode}: {seconds:.0f} s, {peak:.2f} GiB resident; {compiled[0] if compiled else ''}")
    assert peak < LIMIT_GIB, f"{mode} took {peak:.2f} GiB"
    return text

  return run


def rmse(meters: np.ndarray, truth: pathlib.Path) -> float:
  """RMSE of one picture over the pixels that are scored."""
  depth = cv2.imread(str(truth), cv2.IMREAD_UNCHANGED).astype(np.float64)[45:471, 41:601] / 1000
  valid = (depth > 1e-3) & (depth < 10)
  return float(np.sqrt(np.mean((meters[45:471, 41:601] - depth)[valid] ** 2)))


def test_scores_are_those_of_the_predicted_pictures(command, real, tmp_path):
  """Mirrored and in two windows, both ways; each picture with the class of its folder."""
  command("eval", tmp_path / "run")
  scores = json.loads((tmp_path / "run" / "eval.json").read_text())["scores"]
  errors = []
  for i, line in enumerate((real / "test_list.txt").read_text().splitlines()):
    image, truth = (real / "official_splits" / "test" / name.strip("/") for name in line.split())
    source, output = tmp_path / f"in{i}", tmp_path / f"out{i}"
    source.mkdir()
    shutil.copy(image, source)
    command("predict", tmp_path / "run", f"--input={source}", f"--output={output}", f"--class={image.parent.name}")
    errors.append(rmse(np.load(output / f"{image.stem}.npy"), truth))
  assert scores["eval/nyu/images"] == len(errors)
  # With the mean of the class vectors instead it is 1e-3 away.
  assert scores["eval/nyu/rmse"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_two_steps_of_one_picture(command, tmp_path):
  lengths = ("--config.num_steps=2", "--config.log_every=1", "--config.data.batch_size=1", "--config.data.workers=0")
  groups = ("--config.optim.norm_group=1", "--config.optim.loss_group=1", "--config.backbone.remat=True")
  text = command("train", tmp_path / "run", *lengths, *groups)
  losses = [float(value) for value in re.findall(r"step \d/2 .*?loss (\S+)", text)]
  assert len(losses) == 2 and 0 < losses[1] < losses[0]
  assert (tmp_path / "run" / "checkpoints" / "2" / "state").is_dir()


def random_weights(config) -> None:
  """Nothing is looked for on disk, and the result depends on the image."""
  if "class_vectors" in config.method:
    config.method.class_vectors = "random:0"
  if "refine_init" in config.method:
    config.method.refine_init = "fan_in"  # with zeros and no pretrained weights the second step does not see the image
  config.init.clip = "random:0" if config.method.name in ("iedp", "tadp") else ""
  if "vit" in config.init:
    config.init.vit = "random:0"
  if config.method.name == "tadp":
    config.method.tokenizer = "words"


def sentences(config) -> dict:
  """What a forward pass is given besides, where the method reads a sentence."""
  return {"sentences": ["a room with a chair"]} if config.method.name == "tadp" else {}


def forward(words: str, picture: str, scene: str) -> None:
  """Prints what a network of random weights takes for one picture; called in a process of its own."""
  name, method = words.split(":")
  config = loader.load(f"configs/{name}_depth.py:{method}").unlock()
  random_weights(config)
  config.head.init = "fan_in"  # the released one, beside random weights, gives the same depth everywhere
  image = cv2.imread(picture)[..., ::-1]
  if "kb_crop" in config.data:
    empty = {"image": image, "depth": np.zeros(image.shape[:2], np.float32)}
    image = depth_transforms.kb_crop(empty, size=config.data.kb_crop)["image"]
  clock = time.monotonic()
  predictor = vpd_jax.Predictor.load(config.lock(), random_init=True)
  made, clock = time.monotonic() - clock, time.monotonic()
  class_id = predictor.class_id(scene) if predictor.takes_class else None
  depth = predictor.forward(image[None].astype(np.float32) / 255, class_id=class_id, **sentences(config))["depth"]
  first = time.monotonic() - clock
  assert depth.shape == (1, *image.shape[:2]) and depth.dtype == np.float32
  assert 0 < depth.min() < depth.max() < config.task.max_depth, (depth.min(), depth.max())
  count = sum(x.size for part in predictor.weights for x in part.values())
  size = "x".join(map(str, image.shape[:2]))
  print(f"{count / 1e6:.0f} M parameters, image {size}: made in {made:.0f} s, compiled and run in {first:.0f} s")


@pytest.mark.parametrize("method", ["vpd", "meta_prompts", "iedp", "eco_depth", "tadp", "vpd,sd21"])
@pytest.mark.parametrize("data", ["nyu", "kitti"])
def test_every_network_runs_forward_on_a_real_picture(data, method, real, tmp_path):
  pattern, scene = {
    "nyu": ("official_splits/test/basement/*.jpg", "basement"),
    "kitti": ("../kitti/raw_data/*/*/image_02/data/*.png", "street"),
  }[data]
  picture = min(real.glob(pattern), default=None)
  if picture is None:
    pytest.skip(f"{real.parent} holds no {pattern}")
  text, peak = apart(f"forward({f'{data}:{method}'!r}, {str(picture)!r}, {scene!r})", tmp_path / "printed")
  print(f"\n{data} {method}: {peak:.2f} GiB resident; {text.splitlines()[-1]}")
  assert peak < LIMIT_GIB, f"{data} {method} took {peak:.2f} GiB"


def forward_segmentation(data: str, method: str, path: str) -> None:
  """As `forward`, for a crop of the published size of a real picture."""
  config = loader.load(f"configs/{data}.py:{method}").unlock()
  random_weights(config)
  image = cv2.resize(cv2.imread(path)[..., ::-1], tuple(config.data.crop)[::-1])
  clock = time.monotonic()
  predictor = vpd_jax.Predictor.load(config.lock(), random_init=True)
  made, clock = time.monotonic() - clock, time.monotonic()
  out = predictor.forward(image[None].astype(np.float32) / 255, **sentences(config))
  first, clock = time.monotonic() - clock, time.monotonic()
  predictor.forward(image[None].astype(np.float32) / 255, **sentences(config))
  assert out["logits"].shape == (1, *config.data.crop, len(predictor.experiment.classes))
  assert all(np.isfinite(x).all() and np.ptp(x) > 0 for x in out.values()) and ("aux_logits" in out) == (
    method == "meta_prompts"
  )
  count = sum(x.size for part in predictor.weights for x in part.values())
  size = "x".join(map(str, image.shape[:2]))
  print(
    f"{count / 1e6:.0f} M parameters, crop {size}: made in {made:.0f} s, first {first:.0f} s, "
    f"then {time.monotonic() - clock:.1f} s"
  )


@pytest.mark.parametrize("method", ["vpd", "meta_prompts", "iedp", "eco_depth", "tadp"])
@pytest.mark.parametrize("data", ["ade20k_seg", "cityscapes_seg"])
def test_every_network_of_segmentation_runs_forward_on_a_real_crop(data, method, real, tmp_path):
  picture = min(real.parent.glob("ADEChallengeData2016/images/validation/*.jpg"), default=None)
  if picture is None:
    pytest.skip(f"{real.parent} holds no ADEChallengeData2016/")
  text, peak = apart(f"forward_segmentation({data!r}, {method!r}, {str(picture)!r})", tmp_path / "printed")
  print(f"\n{data} {method}: {peak:.2f} GiB resident; {text.splitlines()[-1]}")
  assert peak < LIMIT_GIB, f"{data} {method} took {peak:.2f} GiB"


def forward_pose(method: str, root: str) -> None:
  """As `forward`, for the crop of a real person at 256 x 192."""
  config = loader.load(f"configs/coco_pose.py:{method}").unlock()
  config.data.update(root=root, complete=False, boxes="annotated")
  random_weights(config)
  data = CocoPose(root=root, complete=False, boxes="annotated")
  crop = data.eval_transform(data.source("eval")[0])["image"]
  clock = time.monotonic()
  predictor = vpd_jax.Predictor.load(config.lock(), random_init=True)
  made, clock = time.monotonic() - clock, time.monotonic()
  maps = predictor.forward(crop[None].astype(np.float32) / 255)["heatmaps"]
  assert maps.shape == (1, 64, 48, 17) and maps.dtype == np.float32
  assert np.isfinite(maps).all() and np.ptp(maps) > 0
  count = sum(x.size for part in predictor.weights for x in part.values())
  print(f"{count / 1e6:.0f} M parameters: made in {made:.0f} s, first {time.monotonic() - clock:.0f} s")


@pytest.mark.parametrize("method", ["vpd", "meta_prompts", "iedp", "eco_depth"])
def test_every_network_of_pose_runs_forward_on_a_real_crop(method, real, tmp_path):
  root = real.parent / "coco"
  if not root.exists():
    pytest.skip(f"{real.parent} holds no coco/")
  text, peak = apart(f"forward_pose({method!r}, {str(root)!r})", tmp_path / "printed")
  print(f"\npose {method}: {peak:.2f} GiB resident; {text.splitlines()[-1]}")
  assert peak < LIMIT_GIB, f"pose {method} took {peak:.2f} GiB"


def forward_referring(root: str) -> None:
  """As `forward`, for a real sentence about a real picture; also what the VAE alone takes of the time."""
  config = loader.load("configs/refcoco_refer.py:refcoco").unlock()
  config.data.update(root=root, complete=False)
  config.method.tokenizer, config.init.clip = "words", "random:0"
  data = RefCoco(root=root, complete=False)
  example = data.eval_transform(data.source("eval")[0])
  seconds, clock = [], time.monotonic()
  predictor = vpd_jax.Predictor.load(config.lock(), random_init=True)
  image, parts = example["image"][None].astype(np.float32) / 255, predictor.experiment.spec
  vae = jax.jit(lambda frozen, image: parts.partial(frozen).method.latents({"image": image}))
  calls = [lambda: predictor.forward(image, sentences=[example["sentence"]])["logits"]] * 2
  for call in (*calls, *[lambda: jax.device_get(vae(predictor.weights[1], image))] * 2):
    seconds.append(time.monotonic() - clock)
    clock = time.monotonic()
    result = call()
    if result.shape[-1] == 2:
      logits = result
  seconds.append(time.monotonic() - clock)
  assert logits.shape == (1, 512, 512, 2) and logits.dtype == np.float32
  assert np.isfinite(logits).all() and np.ptp(logits) > 0
  count = sum(x.size for part in predictor.weights for x in part.values())
  made, first, warm, _, alone = seconds
  print(
    f"{count / 1e6:.0f} M parameters, {example['sentence']!r}: made in {made:.0f} s, first {first:.0f} s, then "
    f"{warm:.1f} s, of which the VAE {alone:.1f} s"
  )


def test_the_network_of_referring_runs_forward_on_a_real_sentence(real, tmp_path):
  root = real.parent / "refer"
  if not root.exists():
    pytest.skip(f"{real.parent} holds no refer/")
  text, peak = apart(f"forward_referring({str(root)!r})", tmp_path / "printed")
  print(f"\nreferring: {peak:.2f} GiB resident; {text.splitlines()[-1]}")
  assert peak < LIMIT_GIB, f"referring took {peak:.2f} GiB"


def apart(call: str, printed: pathlib.Path) -> tuple[str, float]:
  """What a function of this file prints in a process of its own, and the GiB it takes at most."""
  words = [sys.executable, "-c", f"from tests.runs import test_full_size; test_full_size.{call}"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  with printed.open("w") as file:
    process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  text = printed.read_text()
  assert process.returncode == 0, text
  return text, usage.ru_maxrss / 2**20
