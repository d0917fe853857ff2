"""Referring segmentation: the loss against PyTorch, the scores against the authors', sizes, baselines, files."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle
from vpd_jax.tasks.referring import baselines, visualize
from vpd_jax.tasks.referring import task as referring_task
from vpd_jax.tasks.referring.task import Referring


@pytest.fixture(scope="module")
def authors():
  return oracle.golden("metrics.refer.npz")


def one_hot(masks):
  return jnp.asarray(np.stack([1.0 - masks, masks], axis=-1), jnp.float32)


def random_masks(name, shape, share=0.3):
  return (fill.uniform(name, shape, 0) < share).astype(np.uint8)


@pytest.mark.reference
def test_the_loss_is_pytorchs_weighted_mean():
  import torch
  import torch.nn.functional as F

  logits, mask = fill.normal("logits", (2, 9, 11, 2), 0), random_masks("mask", (2, 9, 11))
  x = torch.tensor(oracle.nchw(logits).copy(), requires_grad=True)
  expected = F.cross_entropy(x, torch.tensor(mask).long(), weight=torch.tensor([0.9, 1.1]))
  expected.backward()
  loss = lambda x: Referring().loss({"logits": x}, {"mask": jnp.asarray(mask)}).value
  value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
  np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
  np.testing.assert_allclose(oracle.nchw(gradient), x.grad.numpy(), atol=1e-7)


def test_weights_move_the_loss_and_equal_ones_do_not():
  logits, mask = jnp.asarray(fill.normal("logits", (1, 8, 8, 2), 0)), jnp.asarray(random_masks("mask", (1, 8, 8)))
  of = lambda *w: float(referring_task.weighted_cross_entropy(logits, mask, w))
  np.testing.assert_allclose(of(3.0, 3.0), of(1.0, 1.0), rtol=1e-6)
  inside = mask[..., None].astype(bool)
  lost = -jax.nn.log_softmax(logits)
  plain = jnp.where(inside[..., 0], lost[..., 1], lost[..., 0])
  np.testing.assert_allclose(of(1.0, 1.0), plain.mean(), rtol=1e-6)
  assert abs(of(1.0, 5.0) - of(1.0, 1.0)) > 1e-3


def test_the_log_is_the_share_of_right_pixels():
  mask = random_masks("mask", (2, 8, 8))
  wrong = mask.copy()
  wrong[0, :4] ^= 1
  logs = Referring().loss({"logits": one_hot(wrong)}, {"mask": jnp.asarray(mask)}).logs
  np.testing.assert_allclose(logs["pixel_accuracy"], 0.75)


def test_scores_are_the_authors(authors):
  targets = authors["refer/targets"][authors["refer/image_of_sentence"]]
  task = Referring()
  rows = jax.jit(task.measure)(one_hot(authors["refer/predicted"]), {"mask": jnp.asarray(targets)})
  found = np.stack([rows["intersection"], rows["union"]], axis=1)
  np.testing.assert_array_equal(found, authors["refer/intersection_union"])
  scores = task.summarize({name: np.asarray(x) for name, x in rows.items()})
  np.testing.assert_allclose([scores["mIoU"], scores["oIoU"]], [authors["refer/mIoU"], authors["refer/oIoU"]])
  precision = [scores[f"P@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)]
  np.testing.assert_allclose(precision, authors["refer/precision_at_0.5_0.6_0.7_0.8_0.9"])
  assert scores["sentences"] == 9 and authors["refer/intersection_union"][-1, 1] == 0  # a union of 0 is there


def test_a_share_of_exactly_the_threshold_counts():
  rows = {"intersection": np.array([5, 9, 0]), "union": np.array([10, 10, 0])}
  scores = Referring().summarize(rows)
  assert scores["P@0.5"] == 2 / 3 and scores["P@0.9"] == 1 / 3 and scores["oIoU"] == 14 / 20


def test_at_the_original_size_scores_are_resized_as_pytorch_does():
  """Against jax.image.resize, which agrees with align_corners=False, whatever the canvas."""
  size, full = (16, 16), (23, 31)
  logits, mask = fill.normal("logits", (1, *size, 2), 0), random_masks("full", full, 0.5)
  canvas = np.ones((1, 40, 33), np.uint8)  # what lies beyond the picture must not count
  canvas[0, : full[0], : full[1]] = mask
  batch = {"full_mask": jnp.asarray(canvas), "full_size": jnp.asarray([full], jnp.int32)}
  task = Referring(eval_at="original")
  assert task.eval_needs == {"full_mask", "full_size"} and not Referring().eval_needs
  rows = jax.jit(task.measure)(jnp.asarray(logits), batch)
  resized = jax.image.resize(logits, (1, *full, 2), "linear", antialias=False)
  expected = np.asarray(resized[0, ..., 1] > resized[0, ..., 0])
  assert int(rows["intersection"][0]) == (expected & (mask > 0)).sum()
  assert int(rows["union"][0]) == (expected | (mask > 0)).sum()


def test_a_smaller_original_is_not_averaged():
  margin = jnp.asarray(fill.normal("margin", (12, 10), 0))
  found = referring_task.resize_to_dynamic_size(margin, jnp.asarray([5, 4]), (8, 8))[:5, :4]
  np.testing.assert_allclose(found, jax.image.resize(margin, (5, 4), "linear", antialias=False), atol=1e-6)


def test_the_best_constant_mask_beats_every_other_one():
  masks = random_masks("masks", (7, 2, 4), 0.4)
  oiou = lambda guess: (masks & guess).sum() / (masks | guess).sum()
  best = baselines.best_constant(list(masks)).astype(np.uint8)
  every = [np.array([code >> bit & 1 for bit in range(8)], np.uint8).reshape(2, 4) for code in range(1, 256)]
  assert oiou(best) == max(map(oiou, every)) > oiou(np.ones_like(best))


def test_baselines_are_fitted_on_training_and_scored_on_evaluation():
  train = [{"mask": m} for m in random_masks("train", (9, 4, 4), 0.4)]
  evaluation = [{"mask": m} for m in random_masks("eval", (5, 4, 4), 0.4)]
  best = baselines.best_constant([e["mask"] for e in train])
  masks = np.stack([e["mask"] for e in evaluation]).astype(bool)
  found = Referring().baselines(train, evaluation)
  assert found["constant_mask"] == (masks & best).sum() / (masks | best).sum()
  np.testing.assert_allclose(found["everything"], masks.mean())


def test_baselines_at_the_original_size_see_that_size():
  train = [{"mask": np.array([[1, 0], [0, 0]], np.uint8)}]
  full = np.zeros((6, 8), np.uint8)
  full[:2, :3] = 1
  evaluation = [{"mask": train[0]["mask"], "full_mask": full, "full_size": np.array([4, 6])}]
  found = Referring(eval_at="original").baselines(train, evaluation)
  assert found == {"constant_mask": 1.0, "everything": 6 / 24}


def test_panels_show_picture_mask_and_prediction_with_the_sentence():
  mask = np.zeros((20, 30), np.uint8)
  mask[5:10, 5:20] = 1
  example = {"image": np.full((20, 30, 3), 100, np.uint8), "mask": mask, "sentence": "the red box"}
  panel = Referring().panel(example, np.asarray(one_hot(mask[None])[0]))
  assert panel.dtype == np.uint8 and panel.shape[1:] == (90, 3) and panel.shape[0] > 20
  panel = panel[18:]  # below the titles
  np.testing.assert_array_equal(panel[:20, :30], 100)
  np.testing.assert_array_equal(panel[:20, 30:60], panel[:20, 60:])
  assert (panel[7, 37] != 100).any() and (panel[20:] < 255).any()


def test_files_of_a_sentence(tmp_path):
  mask = np.zeros((20, 30), bool)
  mask[5:10, 4:20] = True
  image = np.full((20, 30, 3), 0.5)
  paths = Referring().save(tmp_path / "a", mask, {"sentence": "the red box"}, image)
  assert (
    [p.name for p in paths]
    == ["a.mask.png", "a.overlay.png", "a.json"]
    == sorted((p.name for p in tmp_path.iterdir()), key=lambda name: ("mask" not in name, "overlay" not in name))
  )
  np.testing.assert_array_equal(cv2.imread(str(paths[0]), cv2.IMREAD_UNCHANGED), mask * 255)
  facts = json.loads(paths[2].read_text())
  assert facts["box"] == [4, 5, 16, 5] and facts["sentence"] == "the red box" and facts["size"] == [20, 30]
  Referring().save(tmp_path / "b", np.zeros((20, 30), bool), {})
  assert json.loads((tmp_path / "b.json").read_text())["box"] is None


def test_a_picture_says_where_nothing_was_found(tmp_path, monkeypatch):
  titles, mask = [], np.zeros((20, 30), bool)
  monkeypatch.setattr(visualize, "titled", lambda picture, title: titles.append(title) or picture)
  for found in (mask, ~mask):
    Referring().save(tmp_path / "a", found, {"sentence": "a box"})
  assert titles == ["a box (nothing found)", "a box"]


@pytest.mark.parametrize("call, message", [
  (lambda: Referring(class_weights=(1.0,)), r"^task\.class_weights=\(1\.0,\) must be two numbers above 0"),
  (lambda: Referring(class_weights=(0.0, 1.0)), r"^task\.class_weights=\(0\.0, 1\.0\) must be two numbers above 0"),
  (lambda: Referring(eval_at="full"), r"^task\.eval_at='full' is unknown; choose one of \('network', 'original'\)"),
  (lambda: Referring().loss({"logits": jnp.zeros((1, 4, 4, 2))}, {"mask": jnp.zeros((1, 4, 5), jnp.uint8)}),
   r"^the scores have the size \(4, 4\), the masks \(4, 5\); data\.crop must be that of both"),
  (lambda: Referring().baselines([{"mask": np.zeros((2, 2))}], []), r"^no training example has an object"),
  (lambda: baselines.best_constant([np.ones((2, 2)), np.ones((2, 3))]), r"^masks of the sizes"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
