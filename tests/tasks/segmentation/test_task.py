"""Cross-entropy, Lovász-Softmax, mean IoU and files of segmentation: the authors' numbers, and properties."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import fill, oracle
from vpd_jax.tasks.segmentation import task as segmentation_task
from vpd_jax.tasks.segmentation.lovasz import lovasz_softmax
from vpd_jax.tasks.segmentation.task import Segmentation, cross_entropy

MIOU = {"ade": 150, "ade_labels_already_reduced": 150, "cityscapes": 19}


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("metrics.segmentation.npz")


def scores_and_label(dtype=np.float32):
  """The oracle's logits of 7 classes, and labels of which 5 occur and a fifth is ignored."""
  logits = fill.normal("metrics/segloss/logits", (2, 7, 20, 24), 0).transpose(0, 2, 3, 1)
  label = fill.integers("metrics/segloss/label", (2, 20, 24), 5, 0)
  label = np.where(fill.uniform("metrics/segloss/ignore", (2, 20, 24), 0) < 0.2, 255, label)
  return jnp.asarray(logits, dtype), jnp.asarray(label, jnp.int32)


def lovasz(logits, label):
  return lovasz_softmax(logits.reshape(-1, logits.shape[-1]), label.ravel(), label.ravel() != 255)


def labels_of(case, i):
  """Prediction and truth of the oracle's image, the truth reduced where the case leaves that to the metric."""
  size, classes = (60 + 7 * i, 80), MIOU[case]
  draw = lambda name, count: fill.integers(f"metrics/miou/{case}/{name}/{i}", size, count, 0)
  share = lambda name: fill.uniform(f"metrics/miou/{case}/{name}/{i}", size, 0)
  predicted = draw("pred", classes)
  if case == "ade":
    truth = np.where(share("same") < 0.6, predicted + 1, draw("gt", classes + 1))
    return predicted, np.where(truth == 0, 255, truth - 1)
  truth = np.where(share("same") < 0.6, predicted, draw("gt", classes))
  truth = np.where(share("ignore") < 0.15, 255, truth)
  if case == "cityscapes":
    predicted, truth = np.where(predicted == 18, 17, predicted), np.where(truth == 18, 255, truth)
  return predicted, truth


@pytest.fixture(scope="module", params=MIOU)
def measured(request):
  task = Segmentation(classes=MIOU[request.param])
  rows = []
  for i in range(3):
    predicted, truth = labels_of(request.param, i)
    rows.append(task.measure(jnp.asarray(predicted)[None], {"label": jnp.asarray(truth)[None]}))
  return request.param, task, {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("loss, name, limit", [
  (cross_entropy, "ce", 1e-6),
  # The authors' steps of J are float32 differences of numbers near 1, which costs them 1e-5; computed their way, ours
  # agree to 3e-7.
  (lovasz, "lovasz", 2e-5),
], ids=["ce", "lovasz"])  # fmt: skip
def test_losses_and_gradients_are_the_authors(arrays, loss, name, limit):
  logits, label = scores_and_label()
  value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, label)))(logits)
  np.testing.assert_allclose(value, arrays[f"segloss/{name}"], rtol=1e-6)
  expected = arrays[f"segloss/{name}_grad"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=limit * np.abs(expected).max())


def test_accuracy_is_the_authors(arrays):
  np.testing.assert_allclose(segmentation_task.accuracy(*scores_and_label()), arrays["segloss/accuracy"], rtol=1e-6)


def written_lovasz(logits, label):
  """The formula of Berman et al. in float64, ignored pixels removed, and its gradient for the probabilities."""
  logits, label = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1]), np.asarray(label).ravel()
  p = np.exp(logits - logits.max(1, keepdims=True))
  p, label = (p / p.sum(1, keepdims=True))[label != 255], label[label != 255]
  losses = []
  for c in np.unique(label):
    truth = label == c
    errors = np.abs(truth - p[:, c])
    order = np.argsort(-errors, kind="stable")
    inside = truth[order]
    left, union = inside.sum() - inside.cumsum(), inside.sum() + (~inside).cumsum()
    losses.append(errors[order] @ np.diff(1 - left / union, prepend=0))
  return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_lovasz_is_the_written_formula(seed):
  """Over sizes, shares of ignored pixels and numbers of present classes."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (1, 31, 17, 11)).astype(np.float32)
  label = np.where(rng.random((1, 31, 17)) < 0.3 * seed, 255, rng.integers(0, 1 + 4 * seed, (1, 31, 17)))
  value = lovasz(jnp.asarray(logits), jnp.asarray(label))
  np.testing.assert_allclose(value, written_lovasz(logits, label), rtol=1e-5)


@pytest.mark.x64
def test_losses_in_float64():
  logits, label = scores_and_label(np.float64)
  value, gradient = jax.value_and_grad(lambda x: lovasz(x, label))(logits)
  assert gradient.dtype == jnp.float64
  np.testing.assert_allclose(value, written_lovasz(logits, label), rtol=1e-12)
  step = 1e-6 * jnp.asarray(fill.normal("direction", logits.shape, 0), jnp.float64)
  numeric = lovasz(logits + step, label) - lovasz(logits - step, label)
  np.testing.assert_allclose(2 * (gradient * step).sum(), numeric, rtol=1e-6)


def test_ignored_pixels_change_neither_lovasz_nor_its_gradient():
  logits, label = scores_and_label()
  other = jnp.where((label == 255)[..., None], 5 * logits[::-1] + 1, logits)
  first, second = (jax.value_and_grad(lambda x: lovasz(x, label))(x) for x in (logits, other))
  np.testing.assert_allclose(first[0], second[0], rtol=1e-6)
  assert not np.asarray(first[1])[np.asarray(label) == 255].any()


def test_a_picture_without_labels_has_loss_zero_and_gradient_zero():
  logits, _ = scores_and_label()
  label = jnp.full(logits.shape[:3], 255)
  for loss in (cross_entropy, lovasz, lambda x, t: cross_entropy(x, t, avg_non_ignore=True)):
    value, gradient = jax.value_and_grad(lambda x, loss=loss: loss(x, label))(logits)
    assert value == 0 and not gradient.any()


def test_avg_non_ignore_divides_by_the_labeled_pixels(arrays):
  logits, label = scores_and_label()
  share = float((label != 255).mean())
  value = cross_entropy(logits, label, avg_non_ignore=True)
  np.testing.assert_allclose(value * share, arrays["segloss/ce"], rtol=1e-6)


@pytest.mark.parametrize("number", [-1, 7, 254])
def test_a_label_that_is_no_class_is_not_hidden(number):
  logits, label = scores_and_label()
  assert np.isnan(cross_entropy(logits, label.at[0, 0, 0].set(number)))


def test_another_number_may_mean_no_label():
  logits, label = scores_and_label()
  moved = jnp.where(label == 255, 254, label)
  first, second = cross_entropy(logits, label), cross_entropy(logits, moved, ignore_label=254)
  np.testing.assert_array_equal(first, second)


def test_the_loss_of_the_task_is_the_sum_of_its_parts(arrays):
  logits, label = scores_and_label()
  task = Segmentation(classes=7, lovasz=1.0, auxiliary=0.4)
  loss = task.loss({"logits": logits, "aux_logits": logits}, {"label": label})
  ce, lovasz_value = float(arrays["segloss/ce"]), float(arrays["segloss/lovasz"])
  np.testing.assert_allclose(loss.value, 1.4 * ce + lovasz_value, rtol=1e-6)
  expected = {
    "decode.loss_ce": ce,
    "decode.loss_lovasz": lovasz_value,
    "aux.loss_ce_aux": 0.4 * ce,
    "decode.acc_seg": float(arrays["segloss/accuracy"]),
    "aux.acc_seg": float(arrays["segloss/accuracy"]),
  }
  assert loss.logs.keys() == expected.keys() and loss.weight == 1
  np.testing.assert_allclose([loss.logs[name] for name in expected], list(expected.values()), rtol=1e-6)


def test_scores_are_resized_to_the_labels_before_the_loss():
  logits, label = scores_and_label()
  task, small = Segmentation(classes=7), logits[:, ::2, ::2]
  resized = segmentation_task.resized(small, label.shape[1:])
  first, second = (task.loss({"logits": x}, {"label": label}).value for x in (small, resized))
  np.testing.assert_array_equal(first, second)


def test_groups_of_one_image_are_the_losses_of_single_images():
  """What the training step does with loss_group=1: the loop over present classes runs side by side."""
  logits, label = scores_and_label()
  label = label.at[1].set(jnp.where(label[1] == 255, 255, label[1] % 2))
  task = Segmentation(classes=7, lovasz=1.0)
  both = jax.vmap(task.loss)({"logits": logits[:, None]}, {"label": label[:, None]})
  for i in range(2):
    alone = task.loss({"logits": logits[i : i + 1]}, {"label": label[i : i + 1]})
    np.testing.assert_allclose(both.value[i], alone.value, rtol=1e-6)


@pytest.mark.parametrize("auxiliary, outputs", [(0.4, ("logits",)), (0.0, ("logits", "aux_logits"))])
def test_head_and_task_agree_on_the_auxiliary_part(auxiliary, outputs):
  logits, label = scores_and_label()
  with pytest.raises(ValueError, match=r"^task\.auxiliary=0\.\d, but the head has (no|an) auxiliary part"):
    Segmentation(classes=7, auxiliary=auxiliary).loss(dict.fromkeys(outputs, logits), {"label": label})


def test_areas_are_the_authors(measured, arrays):
  case, _, rows = measured
  for ours, theirs in (("intersect", "intersect"), ("predicted", "pred_area"), ("labeled", "label_area")):
    np.testing.assert_array_equal(rows[ours], arrays[f"miou/{case}/{theirs}"])
  union = rows["predicted"] + rows["labeled"] - rows["intersect"]
  np.testing.assert_array_equal(union, arrays[f"miou/{case}/union"])


def test_scores_are_the_authors(measured, arrays):
  case, task, rows = measured
  summary, of_class = task.summarize(rows), task.per_class(rows)
  for name in ("mIoU", "mAcc", "aAcc"):
    np.testing.assert_allclose(summary[name], arrays[f"miou/{case}/{name}"], rtol=1e-7)
  for name in ("IoU", "Acc"):
    np.testing.assert_allclose(of_class[name], arrays[f"miou/{case}/{name}"], rtol=1e-7)  # NaN where they have NaN
  assert np.isnan(of_class["IoU"]).any() == (case == "cityscapes") and summary["images"] == 3


def test_scores_of_classes_are_taken_at_their_largest():
  scores = jnp.asarray(fill.normal("scores", (2, 6, 9, 5), 0))
  label = jnp.asarray(fill.integers("truth", (2, 6, 9), 5, 0))
  task = Segmentation(classes=5)
  first, second = (task.measure(p, {"label": label}) for p in (scores, scores.argmax(-1)))
  for name in second:
    np.testing.assert_array_equal(first[name], second[name])


def test_a_set_without_labels_is_refused():
  task = Segmentation(classes=3)
  rows = task.measure(jnp.zeros((1, 4, 4), jnp.int32), {"label": jnp.full((1, 4, 4), 255)})
  with pytest.raises(ValueError, match=r"^none of 1 images has a labeled pixel"):
    task.summarize(jax.device_get(rows))


@pytest.mark.parametrize("options, message", [
  (dict(classes=256), r"^task\.classes=256 must lie between 1 and 255\."),
  (dict(classes=150, ignore_label=0), r"^task\.ignore_label=0 is one of the 150 classes"),
  (dict(classes=3, class_names=("a", "b")), r"^task\.class_names has 2 entries for 3 classes"),
  (dict(classes=3, palette=((0, 0, 0),)), r"^task\.palette has 1 entries for 3 classes"),
  (dict(classes=3, label_ids=(7, 8)), r"^task\.label_ids has 2 entries for 3 classes"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Segmentation(**options)


def picture(seed, classes=4, size=(40, 56)):
  """Stripes of classes, whose color gives them away up to noise."""
  rng = np.random.default_rng(seed)
  label = np.broadcast_to((np.arange(size[1]) * classes // size[1])[None], size).copy()
  colors = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 250]])[:classes]
  image = np.clip(colors[label] + rng.normal(0, 20, (*size, 3)), 0, 255).astype(np.uint8)
  return {"image": image, "label": np.where(rng.random(size) < 0.1, 255, label).astype(np.uint8)}


def test_baselines_know_frequency_position_and_color():
  """On stripes everything but the most frequent class is right; mirrored ones leave only the color."""
  task = Segmentation(classes=4)
  train = [picture(i, size=(40, 56 + 8 * i)) for i in range(3)]
  scores = task.baselines(train, [picture(9, size=(64, 128))])
  assert scores.keys() == {"most_frequent", "position_mode", "linear_rgb_position"}
  np.testing.assert_allclose(scores["most_frequent"], 0.25 / 4, rtol=0.2)
  assert scores["position_mode"] > 0.9 and scores["linear_rgb_position"] > 0.95
  mirrored = {name: x[:, ::-1] for name, x in picture(9).items()}
  scores = task.baselines([*train, *({k: v[:, ::-1] for k, v in t.items()} for t in train)], [mirrored])
  assert scores["position_mode"] < 0.6 < 0.95 < scores["linear_rgb_position"]


def test_baselines_need_a_labeled_pixel():
  example = picture(0) | {"label": np.full((40, 56), 255, np.uint8)}
  with pytest.raises(ValueError, match=r"^no training image has a labeled pixel"):
    Segmentation(classes=4).baselines([example], [example])


def test_the_panel_shows_image_label_and_prediction():
  task, example = Segmentation(classes=4, class_names=("",) * 4), picture(0)
  panel = task.panel(example, np.pad(np.zeros((40, 56), np.int32), ((0, 8), (0, 8))))
  assert panel.shape == (40 + 18, 3 * 56, 3) and panel.dtype == np.uint8
  panel = panel[18:]  # below the titles
  np.testing.assert_array_equal(panel[:, :56], example["image"])
  y, x = np.argwhere(example["label"] == 2)[0]
  np.testing.assert_array_equal(panel[y, 56 + x], task.palette[2])
  assert (panel[:, 112:] == task.palette[0]).all()
  y, x = np.argwhere(example["label"] == 255)[0]
  assert panel[y, 56 + x].tolist() == [128, 128, 128]


def test_files_of_a_result(tmp_path):
  names = ("wall", "floor", "person", "lamp")
  task = Segmentation(classes=4, class_names=names, label_ids=(7, 8, 24, 33))
  label = picture(1)["label"] % 4
  paths = task.save(tmp_path / "a.b", label, {"source": "a.png"}, picture(1)["image"])
  assert [p.name for p in paths] == [f"a.b.{s}" for s in ("label.png", "overlay.png", "label_ids.png", "json")]
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
  with Image.open(paths[0]) as stored:
    assert stored.mode == "P"
    np.testing.assert_array_equal(np.asarray(stored), label)
    np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), task.palette[label])
  with Image.open(paths[1]) as overlay:
    assert overlay.width >= 56 and overlay.height > 40
  with Image.open(paths[2]) as ids:
    np.testing.assert_array_equal(np.asarray(ids), np.array([7, 8, 24, 33])[label])
  described = json.loads(paths[3].read_text())
  assert described["source"] == "a.png" and described["size"] == [40, 56]
  np.testing.assert_allclose(sum(c["share"] for c in described["classes"].values()), 1, atol=1e-5)
  assert {name: c["number"] for name, c in described["classes"].items()} == {n: names.index(n) for n in names}


def test_merged_classes_are_described():
  names = ("wall", "car", "tree", "bus")
  plain = Segmentation(classes=4, class_names=names)
  merging = Segmentation(classes=4, class_names=names, merge=("vehicle=car+bus", "plant=tree"))
  assert plain.output_descriptions["result"] == "the class of a pixel is the index of its largest score"
  assert merging.output_descriptions["result"] == (
    "after a softmax of the scores, probabilities are added: vehicle = car + bus, plant = tree; the class of a pixel "
    "is the index of the largest of wall, vehicle, plant"
  )
  assert merging.output_descriptions["logits"] == plain.output_descriptions["logits"]


@pytest.mark.parametrize("merge", [("car=bus+tree",), ("x=wall+car", "x=tree+bus")])
def test_two_classes_of_one_name_are_refused(merge):
  with pytest.raises(ValueError, match=r"task\.merge leaves several classes named (car|x); choose another NEW"):
    Segmentation(classes=4, class_names=("wall", "car", "tree", "bus"), merge=merge)
  merged = Segmentation(classes=4, class_names=("wall", "car", "tree", "bus"), merge=("car=car+bus",))
  assert [name for name, _ in merged.merge] == ["wall", "car", "tree"]


def test_the_default_colors_differ():
  palette = Segmentation(classes=255).palette
  assert len({tuple(color) for color in palette.tolist()}) == 255
  np.testing.assert_array_equal(palette[[0, 1, 14]], [[128, 0, 0], [0, 128, 0], [192, 128, 128]])  # VOC: person is 15
