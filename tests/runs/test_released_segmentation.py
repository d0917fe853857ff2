"""The authors' segmentation checkpoints, as mmsegmentation writes them: eval, predict, Predictor, start."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

import vpd_jax
from tests.helpers import oracle, pth
from tests.helpers import segmentation_setups as setups
from tests.helpers.label_files import write_pairs
from vpd_jax import experiment
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.convert.tables import released_segmentation
from vpd_jax.evaluation import evaluate
from vpd_jax.prediction import predict_folder
from vpd_jax.tasks import label_images

META = {"CLASSES": ("wall",), "PALETTE": [[120, 120, 120]], "config": pth.Call("mmcv.utils", "Config", {}), "iter": 8}


def write_checkpoint(folder, setup):
  """Tiny rebuilt weights, wrapped in `state_dict` beside a pickled `meta` and an optimizer."""
  held = oracle.weights(setup) | released_segmentation.constants()
  state = {entry["name"]: pth.tensor(held[entry["name"]]) for entry in oracle.manifest(setup)}
  optimizer = {"state": {0: {"step": 8}}, "param_groups": [{"lr": 8e-5, "params": [0]}]}
  return pth.write_zip(folder / f"{setup}.pth", {"meta": META, "state_dict": state, "optimizer": optimizer})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_checkpoint(tmp_path_factory.mktemp("released"), "vpd_seg")


def config(root="", checkpoint=""):
  made = loader.load("configs/ade20k_seg.py:vpd,tiny").unlock()
  made.data.update(root=str(root), complete=False)
  made.init.pretrained, made.eval.batch_size = str(checkpoint), 2
  return made.lock()


@pytest.fixture(scope="module")
def predictor(checkpoint):
  return vpd_jax.Predictor.load(config(), weights=checkpoint)


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory, predictor):
  """Two pictures of each split, in ADE20K's layout; two thirds of the labels to be scored are as predicted."""
  root = tmp_path_factory.mktemp("ade20k")
  for split, size in (("training", (64, 64)), ("validation", (128, 192))):
    write_pairs(root / "images" / split, root / "annotations" / split, range(151), ("a", "b"), size=size)
  for name in ("a", "b"):
    path = root / "annotations" / "validation" / f"{name}.png"
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    label[:, :128] = predicted(predictor, root, name)[:, :128] + 1
    label[:7] = 0
    cv2.imwrite(str(path), label)
  return root


def predicted(predictor, root, name):
  image = cv2.imread(str(root / "images" / "validation" / f"{name}.jpg"))[..., ::-1].copy()
  return predictor.predict([image])[0]["label"]


def test_class_vectors_come_from_the_checkpoint(predictor):
  assert any(line.startswith("class vectors: those of") for line in predictor.origin)
  expected = oracle.weights("vpd_seg")["class_embeddings"]
  np.testing.assert_array_equal(predictor.weights[1]["method/class_vectors"], expected)


def test_forward_is_the_authors_output(predictor):
  out = predictor.forward(np.asarray(setups.batch_of("vpd_seg")["image"]))
  assert set(out) == {"logits"} and out["logits"].dtype == np.float32 and out["logits"].shape == (2, 128, 128, 150)
  oracle.compare(oracle.nchw(out["logits"]), oracle.golden("vpd_seg.tiny.npz"), "output/logits", 1e-5)


def test_predict_is_the_label_of_averaged_windows(predictor):
  image = np.random.default_rng(1).random((128, 170, 3), np.float32)
  windows = predictor.forward(np.stack([image[:, :128], image[:, 42:]]))["logits"]
  total = np.zeros((128, 170, 150))
  total[:, :128] += windows[0]
  total[:, 42:] += windows[1]
  total[:, 42:128] /= 2
  (result,) = predictor.predict([image])
  assert result["label"].shape == (128, 170) and np.issubdtype(result["label"].dtype, np.integer)
  best = np.take_along_axis(total, result["label"][..., None], axis=-1)[..., 0]
  assert (total.max(axis=-1) - best).max() < 1e-4 and len(np.unique(result["label"])) > 3
  assert predictor.predict([]) == []


def test_evaluation_scores_the_checkpoint_in_an_empty_workdir(ade20k, checkpoint, tmp_path, predictor, capsys):
  scores = evaluate.run(config(ade20k, checkpoint), str(tmp_path / "empty"))
  assert "released:vpd_segmentation" in capsys.readouterr().out
  both, either = np.zeros(150), np.zeros(150)
  for name in ("a", "b"):
    label = cv2.imread(str(ade20k / f"annotations/validation/{name}.png"), cv2.IMREAD_UNCHANGED).astype(int) - 1
    found = predicted(predictor, ade20k, name)
    for k in range(150):
      seen, true = (found == k) & (label >= 0), label == k
      both[k] += (seen & true).sum()
      either[k] += (seen | true).sum()
  occurring = either > 0
  expected = np.mean(both[occurring] / either[occurring])
  assert expected > 0.05
  np.testing.assert_allclose(scores["eval/ade20k/mIoU"], expected, rtol=1e-4)
  assert scores["eval/ade20k/images"] == 2


def test_prediction_of_a_folder_writes_the_labels(ade20k, checkpoint, tmp_path, predictor):
  source, out = ade20k / "images" / "validation", tmp_path / "out"
  where = {"source": str(source), "output": str(out)}
  assert predict_folder.run(config("", checkpoint), str(tmp_path / "none"), **where, attention=True) == 2
  np.testing.assert_array_equal(np.asarray(Image.open(out / "a.label.png")), predicted(predictor, ade20k, "a"))
  assert json.loads((out / "a.json").read_text())["size"] == [128, 192]
  assert (out / "a.overlay.png").exists()
  tiles = np.asarray(Image.open(out / "a.attention.png"))
  assert tiles.shape[1] % 192 == 0 and tiles.shape[0] % (128 + label_images.LINE) == 0
  (maps,) = predictor.attention([np.zeros((50, 70, 3), np.uint8)])
  assert maps.shape == (8, 8, 150)
  np.testing.assert_allclose(maps.sum(axis=-1), 1, rtol=1e-5)  # shares of all classes


@pytest.mark.parametrize("setup", ["meta_seg_ade", "meta_seg_cityscapes"])
def test_the_files_of_meta_prompts_leave_nothing_to_chance(setup, tmp_path):
  made = setups.config(setup)
  exp = experiment.assemble(made, training=False)
  named, lines = initialize.weights(made, exp, str(write_checkpoint(tmp_path, setup)))
  assert named.keys() == exp.spec.shapes.keys() and not any(line.startswith("randomly") for line in lines)
  back = setups.named_as_by_the_authors(setup, named)
  for name, value in oracle.weights(setup).items():
    if not name.endswith("num_batches_tracked") and name in back:
      np.testing.assert_array_equal(back[name], value, err_msg=name)
  assert len(back) == len(exp.spec.shapes)
