"""Loss, rows, COCO's scores, pictures and files of pose, against written formulas and pycocotools called directly."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import coco_people
from tests.helpers.coco_scores import directly
from tests.helpers.written_heatmaps import written_targets
from vpd_jax.data.datasets.coco_pose import CocoPose
from vpd_jax.data.transforms.top_down import COCO, keypoints_from_names, mirrored
from vpd_jax.inference import tta
from vpd_jax.tasks.pose import heatmaps, oks
from vpd_jax.tasks.pose.task import Pose, joints_mse

CROP, SIZE = (256, 192), (64, 48)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root = coco_people.write(tmp_path_factory.mktemp("coco"))
  return CocoPose(root=str(root), crop=CROP, complete=False, boxes="annotated")


@pytest.fixture(scope="module")
def examples(data):
  source = data.source("eval")
  return [data.eval_transform(source[i]) for i in range(len(source))]


def batch_of(examples):
  return {key: jnp.asarray(np.stack([example[key] for example in examples])) for key in Pose.needs}


def rows_of(task, examples):
  """Rows of perfect heatmaps."""
  batch = batch_of(examples)
  maps, _ = heatmaps.targets(batch["keypoints"], CROP, SIZE, sigma=task.sigma, udp=task.udp)
  return {name: np.asarray(value) for name, value in jax.jit(task.measure)(maps, batch).items()}


def test_the_loss_is_the_written_formula():
  """Each keypoint's mean over batch and pixels of (w p - w t)^2, and the mean of those over keypoints."""
  rng = np.random.default_rng(0)
  points = np.concatenate([rng.uniform(-60, 250, (3, 17, 2)), rng.integers(0, 2, (3, 17, 1))], 2).astype(np.float32)
  predicted = rng.standard_normal((3, *SIZE, 17)).astype(np.float32)
  task = Pose(keypoints=COCO)
  found = task.loss({"heatmaps": jnp.asarray(predicted)}, {"keypoints": jnp.asarray(points)})
  losses = np.zeros((3, 17))
  for b in range(3):
    target, weights = written_targets(points[b].astype(np.float64))
    for k in range(17):
      losses[b, k] = np.mean((weights[k] * predicted[b, ..., k] - weights[k] * target[k]) ** 2)
  np.testing.assert_allclose(found.value, losses.mean(), rtol=1e-5)
  assert found.weight == 1 and set(found.logs) == {"joints_mse"}


def test_a_keypoint_without_label_teaches_nothing_and_counts_in_the_mean():
  maps, weights = jnp.ones((2, 4, 4, 2)), jnp.asarray([[1.0, 0.0], [1.0, 1.0]])
  value, gradient = jax.value_and_grad(joints_mse)(maps, jnp.zeros_like(maps), weights)
  assert value == 0.75
  assert not np.asarray(gradient)[0, ..., 1].any() and np.asarray(gradient)[1, ..., 1].all()
  task = Pose(keypoints=keypoints_from_names(("a", "b")))
  nobody = task.loss({"heatmaps": maps}, {"keypoints": jnp.zeros((2, 2, 3))})
  assert nobody.value == 0 and nobody.weight == 0


def test_perfect_heatmaps_score_one_though_one_image_is_without_people(data, examples):
  """Annotation to crop, heatmap, decoding, picture, COCO: the whole way of an evaluation."""
  task = Pose(keypoints=COCO)
  rows = rows_of(task, examples)
  scores = task.summarize(rows, data.truth("eval"))
  # Four of the file's people have keypoints to score and a box; one more has keypoints and a box that is impossible,
  # and one whose box lies outside: found by nobody.
  truth = data.truth("eval")
  kept = {person["id"] for person in truth["annotations"] if person["id"] not in (6, 7)}
  reachable = truth | {"annotations": [person for person in truth["annotations"] if person["id"] in kept]}
  assert task.summarize(rows, reachable)["AP"] > 0.99
  assert 0.5 < scores["AP"] < 0.75 and scores["people"] == 4
  for example, points in zip(examples, rows["keypoints"], strict=True):
    labeled = example["keypoints"][:, 2] > 0
    source = data.source("eval")[int(example["index"])]["keypoints"]
    np.testing.assert_allclose(points[labeled, :2], source[labeled, :2], atol=0.5)


@pytest.mark.parametrize("udp", [True, False])
def test_both_ways_of_counting_pixels_come_back_to_the_picture(data, udp):
  made = CocoPose(root=data.root, crop=CROP, complete=False, boxes="annotated", udp=udp)
  source = made.source("eval")
  task = Pose(keypoints=COCO, udp=udp)
  chosen = [made.eval_transform(source[i]) for i in range(2)]
  errors = []
  for example, points in zip(chosen, rows_of(task, chosen)["keypoints"], strict=True):
    known = source[int(example["index"])]["keypoints"]
    labeled = known[:, 2] > 0
    errors.append(np.abs(points[labeled, :2] - known[labeled, :2]).max())
  pixel = max(example["extent"].max() for example in chosen) / 64
  assert max(errors) < (0.1 if udp else 1.0) * pixel  # the classic target is rounded to a pixel


def perturbed(data, seed, deviation):
  """Rows of annotated people with noise, doubles and false ones, as a network might give them."""
  rng, truth = np.random.default_rng(seed), data.truth("eval")
  number = {image["id"]: i for i, image in enumerate(truth["images"])}
  rows = {"keypoints": [], "area": [], "box_score": [], "image_index": []}
  for person in truth["annotations"]:
    for _ in range(rng.integers(1, 4)):
      points = np.array(person["keypoints"], float).reshape(17, 3)
      points[:, :2] += rng.normal(0, deviation, (17, 2))
      points[:, 2] = rng.uniform(0, 1, 17)
      rows["keypoints"].append(points)
      rows["area"].append(1.25**2 * person["bbox"][2] * person["bbox"][3] + 1)
      rows["box_score"].append(rng.uniform(0, 1))
      rows["image_index"].append(number[person["image_id"]])
  return {key: np.array(value) for key, value in rows.items()}, truth


@pytest.mark.parametrize("deviation", [0.5, 2.0, 6.0])
def test_scores_are_those_of_pycocotools_called_directly(data, deviation):
  """With results written out by plain loops: rescoring, suppression and all."""
  rows, truth = perturbed(data, 1, deviation)
  entries = []
  for i, image in enumerate(truth["images"]):
    own = [k for k in range(len(rows["area"])) if rows["image_index"][k] == i]
    scores = {}
    for k in own:
      above = [s for s in rows["keypoints"][k][:, 2] if s > 0.2]
      scores[k] = rows["box_score"][k] * (sum(above) / len(above) if above else 0)
    kept = []
    for k in sorted(own, key=lambda k: -scores[k]):
      if all(written_oks(rows, k, other) <= 0.9 for other in kept):
        kept.append(k)
    entries += [{"image_id": image["id"], "category_id": 1, "score": scores[k],
                 "keypoints": rows["keypoints"][k].ravel().tolist()} for k in kept]  # fmt: skip
  task = Pose(keypoints=COCO)
  assert len(entries) <= len(rows["area"])
  found = task.summarize(rows, truth)
  expected = dict(zip(oks.SCORES, directly(truth, entries), strict=True))
  assert found == pytest.approx({name: x for name, x in expected.items() if x >= 0} | {"people": len(rows["area"])})
  assert "AP_L" not in found  # nobody in these pictures is that large


def written_oks(rows, i, j):
  total = 0
  for k, sigma in enumerate(COCO.sigmas):
    dx, dy, _ = rows["keypoints"][i][k] - rows["keypoints"][j][k]
    total += np.exp(-(dx**2 + dy**2) / (2 * (2 * sigma) ** 2 * (rows["area"][i] + rows["area"][j]) / 2))
  return total / 17


def test_a_handmade_file_of_two_images():
  """One person found exactly, one missed by far, one double, one person in an empty image."""
  pose = np.array(coco_people.pose((10, 10, 40, 60), 0))
  people = [coco_people.person(1, 5, (10, 10, 40, 60), keypoints=pose.tolist())]
  people.append(coco_people.person(2, 5, (60, 20, 30, 50)))
  truth = {"images": [coco_people.image(5), coco_people.image(6)], "annotations": people}
  truth["categories"] = [coco_people.CATEGORY]
  points = pose.reshape(17, 3) * [1, 1, 0] + [0, 0, 0.9]
  rows = {
    "keypoints": points + np.array([[0.0, 0, 0], [0.01, 0, 0], [200, 0, 0], [0, 0, 0]])[:, None],
    "area": np.full(4, 40 * 60 * 1.5),
    "box_score": np.array([0.9, 0.8, 0.7, 0.95]),
    "image_index": np.array([0, 0, 0, 1]),
  }
  task = Pose(keypoints=COCO)
  entries = task.results(rows, truth)
  assert [entry["image_id"] for entry in entries] == [5, 5, 6]
  np.testing.assert_allclose([entry["score"] for entry in entries], [0.81, 0.63, 0.855])
  found = task.summarize(rows, truth)
  np.testing.assert_allclose(found["AP"], directly(truth, entries)[0])
  assert found["AR"] == 0.5 and 0.2 < found["AP"] < 0.3  # half of them found, after the false one of image 6


def test_similarity_of_a_pose_with_itself_is_one_and_one_of_two_copies_stays():
  rng = np.random.default_rng(2)
  points = rng.uniform(0, 100, (3, 17, 3))
  points[1] = points[0]
  sigmas = np.array(COCO.sigmas)
  np.testing.assert_allclose(oks.similarity(points[0], points, 900.0, np.full(3, 900.0), sigmas)[:2], 1)
  assert oks.suppress(points, np.array([0.3, 0.9, 0.5]), np.full(3, 900.0), sigmas, 0.9) == [1, 2]
  assert oks.suppress(points, np.array([0.3, 0.9, 0.5]), np.full(3, 900.0), sigmas, 1.0) == [1, 2, 0]
  assert oks.suppress(points[:0], np.zeros(0), np.zeros(0), sigmas, 0.9) == []


def test_rescoring_takes_the_mean_of_the_scores_above_the_threshold():
  joints = np.array([[0.1, 0.5, 0.7], [0.1, 0.2, 0.0]])
  np.testing.assert_allclose(oks.rescored(np.array([0.5, 0.9]), joints, 0.2), [0.3, 0.0])


def test_no_detection_at_all_scores_zero(data):
  assert oks.coco_scores(data.truth("eval"), [], np.array(COCO.sigmas))["AP"] == 0
  empty = data.truth("eval") | {"annotations": []}
  with pytest.raises(ValueError, match=r"^none of 4 images has a labeled keypoint to score"):
    Pose(keypoints=COCO).summarize({"area": np.zeros(0)}, empty)


def test_results_are_taken_by_the_official_tool(data, examples, tmp_path):
  task = Pose(keypoints=COCO)
  rows, truth = rows_of(task, examples), data.truth("eval")
  path = task.write_results(tmp_path / "results.json", rows, truth)
  entries = json.loads(path.read_text())
  assert set(entries[0]) == {"image_id", "category_id", "keypoints", "score"} and len(entries[0]["keypoints"]) == 51
  np.testing.assert_allclose(directly(truth, entries)[0], task.summarize(rows, truth)["AP"])
  assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_mirroring_averages_heatmaps_whose_sides_are_swapped():
  """A made-up network that shows each color channel as a keypoint: left in red, right in green."""
  three = keypoints_from_names(("nose", "left_eye", "right_eye"))
  task = Pose(keypoints=three)
  seen = []

  def network(batch):
    seen.append(batch["image"].shape)
    maps = batch["image"].astype(jnp.float32)
    return jnp.stack([maps[..., 2], maps[..., 0], maps[..., 1]], -1)

  image = np.random.default_rng(3).uniform(0, 1, (2, 8, 6, 3)).astype(np.float32)
  batch = {"image": jnp.asarray(image), "extra": jnp.arange(2)}
  plain = tta.with_test_time_augmentation(network, ())(batch)
  both = tta.with_test_time_augmentation(network, ("flip",), mirrored=task.mirrored)(batch)
  assert seen == [(2, 8, 6, 3), (4, 8, 6, 3)]
  # Mirrored twice the pixels are where they were; left and right colors are exchanged.
  np.testing.assert_allclose(both[..., 0], plain[..., 0], rtol=1e-6)
  np.testing.assert_allclose(both[..., 1], (plain[..., 1] + plain[..., 2]) / 2, rtol=1e-6)
  np.testing.assert_array_equal(both[..., 1], both[..., 2])
  with pytest.raises(ValueError, match=r"^eval\.test_time has 'shift:2'; known are 'flip'\.$"):
    tta.parse(("shift:2",), task.test_time_protocol)


def test_a_mirrored_input_gives_mirrored_keypoints():
  """With "flip", for a network that looks at left and right differently and moves its keypoints by what it sees."""
  task, rng = Pose(keypoints=COCO), np.random.default_rng(4)
  points = np.concatenate([rng.uniform(40, 150, (17, 2)), np.ones((17, 1))], axis=1)
  symmetric = jnp.asarray((points + mirrored(points, CROP[1], COCO.pairs)) / 2, jnp.float32)[None]

  def network(batch):
    moved = batch["image"][:, :, :20].mean((1, 2, 3)) * 12  # pixels of the crop
    shift = moved[:, None, None] * jnp.asarray([[[1.0, 0.5, 0]]])
    return heatmaps.targets(symmetric + shift, CROP, SIZE)[0]

  predict = tta.with_test_time_augmentation(network, ("flip",), mirrored=task.mirrored)
  center, extent = jnp.full((2, 2), 100.0), jnp.full((2, 2), 64.0)
  image = jnp.asarray(rng.uniform(0, 1, (2, *CROP, 3)), jnp.float32).at[0, :, 30:].set(0)
  plain, turned, bare = (
    np.asarray(task.locate(maps, center, extent))
    for maps in (predict({"image": image}), predict({"image": image[:, :, ::-1]}), network({"image": image}))
  )
  expected = mirrored(plain[0], 201, COCO.pairs)  # about the center of the crop
  np.testing.assert_allclose(turned[0], expected, atol=1e-3)
  np.testing.assert_allclose(turned[1], mirrored(plain[1], 201, COCO.pairs), atol=1e-3)
  assert np.abs(bare - plain).max() > 0.3


def test_trivial_predictors_are_scored_as_ours(data, examples):
  """On one and the same person both are exact."""
  task = Pose(keypoints=COCO)
  truth = data.truth("eval")
  first = truth | {"annotations": truth["annotations"][:1]}
  scores = task.baselines(examples[:1] * 3, examples[:1], first)
  assert set(scores) == {"mean_pose", "linear_crop"} and min(scores.values()) > 0.99
  mixed = task.baselines(examples, examples, truth)
  assert mixed["mean_pose"] < mixed["linear_crop"]  # as many inputs as it likes on four crops


def test_pictures_show_skeletons_and_files_name_keypoints(data, examples, tmp_path):
  task = Pose(keypoints=COCO)
  batch = batch_of(examples[:1])
  maps, _ = heatmaps.targets(batch["keypoints"], CROP, SIZE)
  panel = task.panel(examples[0], np.asarray(maps[0]))
  assert panel.shape == (256 + 18, 3 * 192, 3) and panel.dtype == np.uint8
  panel = panel[18:]  # below the titles
  # Prediction and annotation are drawn alike but for the size of a pixel.
  assert np.mean(np.abs(panel[:, :192].astype(int) - panel[:, 192:384]).max(-1) > 60) < 0.02
  assert np.mean(panel[:, :192] != examples[0]["image"]) > 0.02
  people = np.asarray(task.measure(maps, batch)["keypoints"])
  image = data.source("eval")[0]["image"]
  facts = {"source": "a.jpg", "people": [{"box": [1, 2, 3, 4], "score": 0.5}]}
  paths = task.save(tmp_path / "a", people, facts, image)
  assert [path.name for path in paths] == ["a.skeleton.png", "a.json"]
  drawn = cv2.imread(str(paths[0]))[..., ::-1]
  assert drawn.shape == image.shape and np.mean(drawn != image) > 0.02
  written = json.loads(paths[1].read_text())
  assert written["source"] == "a.jpg" and written["people"][0]["box"] == [1, 2, 3, 4]
  np.testing.assert_allclose(written["people"][0]["keypoints"]["left_knee"], people[0, 13], atol=1e-3)
  assert len(task.save(tmp_path / "b", people[:0], {})) == 1
  np.testing.assert_array_equal(task.save(tmp_path / "c", people[:0], {}, image / 255.0)[0].suffix, ".png")


def test_a_person_without_a_sure_keypoint_is_drawn_as_a_box(tmp_path):
  image, people = np.zeros((40, 60, 3), np.uint8), np.full((1, 17, 3), 0.1)
  path, _ = Pose(keypoints=COCO).save(tmp_path / "a", people, {"people": [{"box": [10, 5, 30.0, 200]}]}, image)
  drawn = cv2.imread(str(path))
  assert (drawn[5, 10:40] == 128).all() and (drawn[20, 10] == 128).all() and not drawn[15:30, 15:35].any()


def test_options_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"^task: sigma=0 must be .*; nms=0 must be above 0"):
    Pose(keypoints=COCO, sigma=0, blur=11, nms=0)
  with pytest.raises(ValueError, match=r"blur=10 must be an odd number"):
    Pose(keypoints=COCO, blur=10)
  assert [Pose(keypoints=COCO, sigma=sigma).blur for sigma in (2, 3, 4, 6)] == [11, 17, 23, 35]
