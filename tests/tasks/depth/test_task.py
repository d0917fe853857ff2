"""SiLog, the nine scores and their averaging, against the authors' numbers and by their properties."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle
from tests.helpers.depth_truth import truth_of
from tests.helpers.vpd_depth import SCORES
from vpd_jax.data.readers import image_files
from vpd_jax.tasks.depth import task as depth_task
from vpd_jax.tasks.depth.task import Depth, silog

# case: size of the image, largest depth, crop
CASES = {
  "nyu": ((480, 640), 10.0, "eigen_nyu"),
  "kitti_garg": ((352, 1216), 80.0, "garg"),
  "kitti_eigen": ((352, 1216), 80.0, "eigen_kitti"),
}


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("metrics.depth.npz")


def pair(case, i, size, largest):
  """Truth with holes and a prediction around it; the last one holds infinities and NaN."""
  truth = truth_of(case, i, size, largest)
  noise = np.float32(0.8) + np.float32(0.5) * fill.uniform(f"metrics/{case}/noise/{i}", size, 0)
  prediction = np.where(truth == 0, np.float32(largest / 2), truth * noise)
  if i == 2:
    prediction[100:103, 200:260], prediction[200:203, 200:260], prediction[210:212, 300:360] = np.inf, np.nan, -np.inf
  return prediction, truth


def silog_pair():
  prediction, truth = (fill.uniform(f"metrics/silog/{name}", (2, 40, 50), 0, 0.1, 10) for name in ("pred", "gt"))
  valid = fill.uniform("metrics/silog/valid", (2, 40, 50), 0) > 0.25
  return jnp.asarray(prediction), jnp.asarray(truth * valid)


def scores(task, prediction, truth):
  rows = task.measure(jnp.asarray(prediction, jnp.float32), {"depth": jnp.asarray(truth, jnp.float32)})
  return {name: np.asarray(value) for name, value in rows.items()}


@pytest.fixture(scope="module", params=CASES)
def measured(request):
  size, largest, crop = CASES[request.param]
  task = Depth(max_depth=largest, eval_crop=crop)
  predictions, truths = zip(*(pair(request.param, i, size, largest) for i in range(3)), strict=True)
  batch = {"depth": jnp.asarray(np.stack(truths))}
  rows = jax.jit(task.measure)(jnp.asarray(np.stack(predictions)), batch)
  return request.param, task, jax.device_get(rows)


def test_the_scored_pixels_are_the_authors(measured, arrays):
  case, _, rows = measured
  np.testing.assert_array_equal(rows["pixels"], arrays[f"depth/{case}/pixels_used"])


def test_the_scores_of_every_image_are_the_authors(measured, arrays):
  case, _, rows = measured
  assert set(arrays["names"]) <= set(SCORES)
  # Sums of 150 000 float32 values; the authors' mean is numpy's float32 as well, widened afterwards.
  expected = arrays[f"depth/{case}/per_image"]
  np.testing.assert_allclose(np.stack([rows[name] for name in arrays["names"]], axis=1), expected, rtol=1e-6)


def test_the_summary_is_the_authors_mean_over_images(measured, arrays):
  case, task, rows = measured
  summary = task.summarize(rows)
  np.testing.assert_allclose([summary[name] for name in arrays["names"]], arrays[f"depth/{case}/global_avg"], rtol=1e-6)
  assert summary["images"] == 3


@pytest.mark.parametrize("case", CASES)
def test_the_scores_of_eco_depth_are_the_authors(case):
  """Clipped predictions, and silog as KITTI's benchmark has it."""
  (size, largest, crop), arrays = CASES[case], oracle.golden("metrics.eco_depth.npz")
  task = Depth(max_depth=largest, eval_crop=crop, clip_prediction=True, benchmark_silog=True)
  predictions, truths = zip(*(pair(case, i, size, largest) for i in range(3)), strict=True)
  rows = scores(task, np.stack(predictions), np.stack(truths))
  np.testing.assert_array_equal(rows["pixels"], arrays[f"eco_depth/{case}/pixels_used"])
  theirs = arrays[f"eco_depth/{case}/per_image"]
  np.testing.assert_allclose(np.stack([rows[name] for name in SCORES], axis=1), theirs, rtol=1e-6)
  summary = task.summarize(rows)
  np.testing.assert_allclose([summary[name] for name in SCORES], arrays[f"eco_depth/{case}/global_avg"], rtol=1e-6)


def test_the_loss_of_eco_depth_is_the_authors():
  arrays = oracle.golden("metrics.eco_depth.npz")
  prediction, truth = (fill.uniform(f"metrics/silog/{name}", (2, 40, 50), 0, 0.5, 9.5) for name in ("pred", "gt"))
  truth = jnp.asarray(truth * (fill.uniform("metrics/silog/valid", (2, 40, 50), 0) > 0.25))
  task = Depth(max_depth=10.0, variance_focus=0.85, loss_scale=10.0)
  loss = jax.value_and_grad(lambda p: task.loss({"depth": p}, {"depth": truth}).value)
  value, gradient = loss(jnp.asarray(prediction))
  np.testing.assert_allclose(value, arrays["eco_silog/loss"], rtol=1e-6)
  np.testing.assert_allclose(gradient, arrays["eco_silog/grad"], rtol=1e-4, atol=1e-8)


def test_silog_is_the_authors(arrays):
  prediction, truth = silog_pair()
  value, gradient = jax.value_and_grad(lambda p: silog(p, truth)[0])(prediction)
  np.testing.assert_allclose(value, arrays["silog/loss"], rtol=1e-6)
  expected = arrays["silog/grad"]
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=5e-7 * np.abs(expected).max())


@pytest.mark.x64
def test_silog_is_the_authors_in_float64(arrays):
  prediction, truth = silog_pair()
  value, gradient = jax.value_and_grad(lambda p: silog(p, truth)[0])(prediction.astype(jnp.float64))
  assert gradient.dtype == jnp.float64
  # The authors' own numbers are float32.
  np.testing.assert_allclose(value, arrays["silog/loss"], rtol=1e-6)
  expected = arrays["silog/grad"]
  np.testing.assert_allclose(gradient, expected, rtol=0, atol=5e-7 * np.abs(expected).max())


def test_silog_is_the_root_of_the_written_formula():
  prediction, truth = (np.asarray(x, np.float64) for x in silog_pair())
  e = np.log(truth[truth > 0]) - np.log(prediction[truth > 0])
  for focus in (0.0, 0.5, 1.0):
    value, any_valid = silog(
      jnp.asarray(prediction, jnp.float32), jnp.asarray(truth, jnp.float32), variance_focus=focus
    )
    np.testing.assert_allclose(value, np.sqrt((e**2).mean() - focus * e.mean() ** 2), rtol=1e-6)
    assert any_valid


def test_silog_with_full_variance_focus_ignores_scale():
  prediction, truth = silog_pair()
  plain, scaled = (silog(x, truth, variance_focus=1.0)[0] for x in (prediction, 2 * prediction))
  np.testing.assert_allclose(scaled, plain, rtol=1e-6)


def test_silog_pools_the_pixels_of_a_group():
  prediction, truth = silog_pair()
  order = np.random.default_rng(0).permutation(truth.size)
  mixed = [x.ravel()[order].reshape(x.shape) for x in (prediction, truth)]
  np.testing.assert_allclose(silog(*mixed)[0], silog(prediction, truth)[0], rtol=1e-6)


def test_silog_of_a_perfect_prediction_is_0_with_gradient_0():
  _, truth = silog_pair()
  value, gradient = jax.value_and_grad(lambda p: silog(p, truth)[0])(jnp.where(truth > 0, truth, 1))
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_pixel_without_truth_changes_neither_loss_nor_gradient(bad):
  prediction, truth = silog_pair()
  loss = jax.value_and_grad(lambda p: silog(p, truth)[0])
  (value, gradient), (other, other_gradient) = loss(prediction), loss(jnp.where(truth > 0, prediction, bad))
  assert value == other
  np.testing.assert_array_equal(gradient, other_gradient)
  np.testing.assert_array_equal(gradient[truth == 0], 0)


def test_a_group_without_truth_has_weight_0_and_finite_gradient():
  prediction, truth = silog_pair()
  task = Depth(max_depth=10.0)
  empty = {"depth": jnp.zeros_like(truth)}
  loss = task.loss({"depth": prediction}, empty)
  assert loss.weight == 0 and loss.value == 0
  np.testing.assert_array_equal(jax.grad(lambda p: task.loss({"depth": p}, empty).value)(prediction), 0)
  full = task.loss({"depth": prediction}, {"depth": truth})
  assert full.weight == 1 and full.logs["silog"] == full.value


def test_the_loss_uses_the_variance_focus_of_the_task():
  prediction, truth = silog_pair()
  loss = Depth(max_depth=10.0, variance_focus=0.85).loss({"depth": prediction}, {"depth": truth})
  np.testing.assert_allclose(loss.value, silog(prediction, truth, variance_focus=0.85)[0], rtol=1e-6)


def test_both_limits_of_depth_are_strict():
  task = Depth(max_depth=10.0, min_depth=1.0)
  truth = np.array([[[0.0, 1.0, 1.5, 9.5, 10.0, 11.0]]])
  assert scores(task, np.full(truth.shape, 2.0), truth)["pixels"] == 2


def test_the_prediction_is_clipped_where_the_task_says_so():
  task = Depth(max_depth=10.0, min_depth=0.5, clip_prediction=True)
  rows = scores(task, np.array([30.0, 0.1, np.nan, -np.inf]).reshape(4, 1, 1), np.full((4, 1, 1), 5.0))
  np.testing.assert_allclose(rows["rmse"], [5.0, 4.5, 4.5, 5.0], rtol=1e-6)


def test_the_prediction_is_not_clipped():
  task = Depth(max_depth=10.0)
  rows = scores(task, np.full((1, 1, 1), 30.0), np.full((1, 1, 1), 5.0))
  np.testing.assert_allclose(rows["rmse"], 25.0, rtol=1e-6)
  np.testing.assert_allclose(rows["abs_rel"], 5.0, rtol=1e-6)


def test_infinities_count_as_the_largest_depth_and_nan_as_the_least():
  task = Depth(max_depth=10.0, min_depth=0.5)
  rows = scores(task, np.array([np.inf, -np.inf, np.nan]).reshape(3, 1, 1), np.full((3, 1, 1), 5.0))
  np.testing.assert_allclose(rows["rmse"], [5.0, 5.0, 4.5], rtol=1e-6)


def test_scores_of_a_prediction_twice_too_deep_have_their_closed_form():
  truth = np.linspace(1, 4, 12).reshape(1, 3, 4)
  rows = scores(Depth(max_depth=10.0), 2 * truth, truth)
  expected = {
    "d1": 0,
    "d2": 0,
    "d3": 0,
    "abs_rel": 1,
    "sq_rel": truth.mean(),
    "rmse": np.sqrt((truth**2).mean()),
    "rmse_log": np.log(2),
    "log10": np.log10(2),
    "silog": np.log(2) * np.sqrt(0.5),
    "pixels": 12,
  }
  for name, value in expected.items():
    np.testing.assert_allclose(rows[name], [value], rtol=1e-6, err_msg=name)


def test_an_image_without_scored_pixels_is_left_out_of_the_mean():
  task = Depth(max_depth=10.0)
  truth = np.stack([np.full((2, 3), 4.0), np.zeros((2, 3)), np.full((2, 3), 2.0)])
  rows = scores(task, truth + 1, truth)
  assert rows["pixels"].tolist() == [6, 0, 6] and rows["rmse"][1] == 0
  summary = task.summarize(rows)
  assert summary["images"] == 2
  np.testing.assert_allclose([summary["rmse"], summary["abs_rel"]], [1.0, 0.375], rtol=1e-6)


def test_no_scored_pixel_at_all_is_an_error():
  task = Depth(max_depth=10.0)
  rows = scores(task, np.ones((2, 2, 2)), np.full((2, 2, 2), 5000.0))
  with pytest.raises(
    ValueError, match=r"none of 2 images has ground truth in \(0.001, 10.0\) meters; check the depth unit"
  ):
    task.summarize(rows)


@pytest.mark.parametrize("crop, size, expected", [
  ("none", (480, 640), (0, 480, 0, 640)),
  ("eigen_nyu", (480, 640), (45, 471, 41, 601)),
  ("eigen_nyu", (120, 192), (45, 120, 41, 192)),
  ("eigen_nyu", (30, 40), (30, 30, 40, 40)),
  ("eigen_nyu_scaled", (480, 640), (45, 471, 41, 601)),
  ("eigen_nyu_scaled", (96, 128), (9, 94, 8, 120)),
  ("garg", (352, 1216), (143, 349, 43, 1172)),
  ("eigen_kitti", (352, 1216), (117, 321, 43, 1172)),
])  # fmt: skip
def test_crops_are_these_rows_and_columns(crop, size, expected):
  assert depth_task.EVAL_CROPS[crop](*size) == expected


def test_wrong_options_are_one_line():
  with pytest.raises(ValueError, match=r"task\.eval_crop='eigen' is unknown; choose one of .*'eigen_nyu'"):
    Depth(max_depth=10.0, eval_crop="eigen")
  for low, high in ((10.0, 10.0), (-1.0, 10.0)):
    with pytest.raises(ValueError, match=f"task.min_depth={low} must be at least 0 and below task.max_depth={high}"):
      Depth(max_depth=high, min_depth=low)
  for scale in (1000, -1):
    with pytest.raises(
      ValueError, match=rf"task\.png_scale={scale} must be above 0 and at most 819\.2, so that 16 bits"
    ):
      Depth(max_depth=80.0, png_scale=scale)
  for spacing in (-1.0, float("inf"), float("nan")):
    with pytest.raises(ValueError, match=r"task\.contours=.* must be a number of meters, or 0"):
      Depth(max_depth=10.0, contours=spacing)


def test_columns_without_a_window_count_as_the_least_depth_and_only_outside_of_gargs_crop():
  """The released windows of KITTI leave out columns 1207 to 1215, and both crops end before."""
  truth = np.full((1, 352, 1216), 10.0)
  prediction = truth + 1
  prediction[..., 1207:] = np.nan
  for crop, rmse in (("garg", 1.0), ("eigen_kitti", 1.0), ("none", np.sqrt((1207 + 9 * (10 - 1e-3) ** 2) / 1216))):
    rows = scores(Depth(max_depth=80.0, eval_crop=crop), prediction, truth)
    np.testing.assert_allclose(rows["rmse"], [rmse], rtol=1e-6)


@pytest.mark.parametrize(
  "largest, chosen, scale", [(80.0, 256, 256), (10.0, 1000, 1000), (80.0, 0, 256), (65.0, 0, 1000), (300.0, 0, 100)]
)
def test_the_png_holds_meters_times_its_scale_and_0_for_no_value(tmp_path, largest, chosen, scale):
  """The rule of KITTI's development kit: uint16, value / 256 is meters, 0 is not valid."""
  task = Depth(max_depth=largest, png_scale=chosen)
  prediction = np.random.default_rng(0).uniform(0.5, largest, (6, 8))
  prediction[0, :4] = np.nan, 1e-6, np.inf, largest
  paths = task.save(tmp_path / "0000000008", prediction, {"class": "street"})
  facts = json.loads(paths[-1].read_text())
  assert facts["png_units_per_meter"] == scale and facts["png_no_value"] == 0 and facts["class"] == "street"
  stored = cv2.imread(str(tmp_path / "0000000008.depth.png"), cv2.IMREAD_UNCHANGED)
  assert stored.dtype == np.uint16 and stored.shape == (6, 8)
  assert stored[0, :3].tolist() == [0, 1, 65535]  # what is a number never becomes "no value"
  read = image_files.read_depth(tmp_path / "0000000008.depth.png", scale=scale)
  np.testing.assert_allclose(read[1:], prediction[1:], atol=0.501 / scale)
  np.testing.assert_allclose(read[0, 3], largest, atol=0.501 / scale)


def test_trivial_predictors_read_the_evaluation_once_and_score_the_crop():
  """Images of a large data set must not all be held in memory."""
  example = {"image": np.zeros((10, 20, 3), np.uint8), "depth": np.full((10, 20), 4.0, np.float32)}
  example["depth"][:4] = 8.0  # above the crop
  given = iter([example] * 3)
  result = Depth(max_depth=80.0, eval_crop="garg").baselines([dict(example, depth=0 * example["depth"] + 5)], given)
  assert next(given, None) is None
  assert result["constant"] == pytest.approx(1.0, abs=5e-3)
