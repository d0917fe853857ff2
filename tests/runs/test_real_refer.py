"""Referring segmentation on real photographs: two steps, scores and a folder of masks, with the tiny network.

VPD_REAL=FOLDER must name a folder with refer/ in it: a few pictures of COCO and their references:
VPD_REAL=FOLDER python -m pytest -m slow -s tests/runs/test_real_refer.py
"""

import json
import os
import pathlib
import time

import cv2
import numpy as np
import pytest

from vpd_jax.config import loader
from vpd_jax.data.datasets.refcoco import RefCoco
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import predict_folder
from vpd_jax.training import train

pytestmark = pytest.mark.slow

STEPS = 2


@pytest.fixture(scope="module")
def root() -> pathlib.Path:
  folder = os.environ.get("VPD_REAL")
  if not folder:
    pytest.skip("VPD_REAL=FOLDER must name the folder that holds refer/")
  return pathlib.Path(folder) / "refer"


def test_trains_scores_and_predicts(root, tmp_path):
  begin = time.monotonic()
  config = loader.load("configs/refcoco_refer.py:refcoco,tiny").unlock()
  config.data.update(root=str(root), complete=False, batch_size=2, workers=0, cache="memory")
  config.update(num_steps=STEPS, eval_every=STEPS, save_every=STEPS, log_every=1)
  config.method.tokenizer, config.eval.batch_size, config.optim.loss_group = "words", 2, 2
  workdir, output = tmp_path / "run", tmp_path / "masks"
  scores = train.run(config.lock(), str(workdir))
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert len([line for line in lines if np.isfinite(line.get("train/loss", np.nan))]) == STEPS
  again = evaluate.run(config, str(workdir))
  data = RefCoco(root=str(root), complete=False)
  assert again == scores and again["eval/refcoco/sentences"] == len(data.source("eval"))
  pictures = root / "images" / "train2014"
  said = [{"image": path.name, "sentences": ["the man on the left", "a shoe"]} for path in pictures.iterdir()]
  (tmp_path / "said.json").write_text(json.dumps(said))
  count = predict_folder.run(
    config, str(workdir), source=str(pictures), output=str(output), sentences=str(tmp_path / "said.json")
  )
  assert count == len(said)
  for path in pictures.iterdir():
    for number in (0, 1):
      mask = cv2.imread(str(output / f"{path.stem}_{number}.mask.png"), cv2.IMREAD_UNCHANGED)
      assert mask.shape[:2] == cv2.imread(str(path)).shape[:2] and set(np.unique(mask)) <= {0, 255}
      assert json.loads((output / f"{path.stem}_{number}.json").read_text())["sentence"] == said[0]["sentences"][number]
  print(f"\nreferring: {time.monotonic() - begin:.0f} s, {again}")
