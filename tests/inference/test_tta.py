"""Mirrored images and shifted windows: the authors' validation loop, and what no window may get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill, oracle
from tests.helpers.depth_truth import truth_of
from tests.helpers.vpd_depth import SCORES
from vpd_jax.inference import tta
from vpd_jax.tasks.depth.task import Depth

# case: words of eval.test_time, size of the image, largest depth, crop
CASES = {
  "nyu_flip_shift2": (("flip", "shift:2"), (480, 640), 10.0, "eigen_nyu"),
  "kitti_flip_shift16": (("flip", "shift:16"), (352, 1216), 80.0, "garg"),
  "nyu_shift2_noflip": (("shift:2",), (480, 640), 10.0, "eigen_nyu"),
}


@pytest.fixture(scope="module")
def arrays():
  return oracle.golden("metrics.depth.npz")


def stand_in(batch):
  """The oracle's model: it knows where in its window a pixel is, what color it has, and the class."""
  height, width = batch["image"].shape[1:3]
  red, green, blue = (batch["image"][..., i] for i in range(3))
  x = jnp.arange(width, dtype=jnp.float32)[None, None] / width
  y = jnp.arange(height, dtype=jnp.float32)[None, :, None] / height
  return 0.5 + 2 * red + green * x + 0.5 * blue * y + 0.25 * x + 0.01 * batch["class_id"][:, None, None]


def image_of(case, i, size):
  return fill.uniform(f"metrics/tta/{case}/image/{i}", (1, 3, *size), 0).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module", params=CASES)
def validated(request):
  """Depth of the two images, one after the other as the release does, and the shape the model saw."""
  words, size, largest, crop = CASES[request.param]
  shapes = []

  def model(batch):
    shapes.append(batch["image"].shape)
    return stand_in(batch)

  predict = jax.jit(tta.with_test_time_augmentation(model, words))
  batches = [
    {
      "image": jnp.asarray(image_of(request.param, i, size)),
      "class_id": jnp.asarray([5 + i if request.param.startswith("nyu") else 0]),
    }
    for i in range(2)
  ]
  depths = [predict(batch) for batch in batches]
  task = Depth(max_depth=largest, eval_crop=crop)
  truths = [truth_of(f"tta_{request.param}", i, size, largest)[None] for i in range(2)]
  rows = [task.measure(d, {"depth": jnp.asarray(t)}) for d, t in zip(depths, truths, strict=True)]
  rows = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
  return request.param, batches, [np.asarray(d)[0] for d in depths], task.summarize(rows), shapes


def test_the_merged_depth_is_the_authors(validated, arrays):
  case, _, depths, _, _ = validated
  for i, depth in enumerate(depths):
    stored = {key: arrays[f"tta/{case}/{key}.{i}"] for key in ("merged_stride7", "merged_last_row", "merged_l2")}
    np.testing.assert_allclose(depth[::7, ::7], stored["merged_stride7"], rtol=1e-6)  # NaN where they have NaN
    np.testing.assert_allclose(depth[-1], stored["merged_last_row"], rtol=1e-6)
    known = depth[~np.isnan(depth)].astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(known), stored["merged_l2"], rtol=1e-6)


def test_the_scores_of_the_merged_depth_are_the_authors(validated, arrays):
  case, _, _, summary, _ = validated
  np.testing.assert_allclose([summary[name] for name in arrays["names"]], arrays[f"tta/{case}/metrics"], rtol=1e-6)


def test_the_model_sees_windows_and_mirrors_in_one_batch(validated, arrays):
  case, _, _, _, shapes = validated
  batch, channels, height, width = arrays[f"tta/{case}/model_batch_shape"]
  assert shapes == [(batch, height, width, channels)]


def test_only_kitti_leaves_columns_uncovered_and_full_coverage_none(validated):
  case, batches, depths, _, _ = validated
  uncovered = np.isnan(depths[0]).all(axis=0).nonzero()[0]
  assert uncovered.tolist() == (list(range(1207, 1216)) if case.startswith("kitti") else [])
  assert np.isnan(depths[0]).sum() == uncovered.size * depths[0].shape[0]
  full = tta.with_test_time_augmentation(stand_in, CASES[case][0], coverage="full")(batches[0])
  assert np.isfinite(full).all()


def test_images_of_a_batch_stay_apart():
  """Windows and mirrors of several images, with a class each, are those of the single images."""
  images = fill.uniform("batch", (3, 12, 20, 3), 0)
  classes = np.array([0, 40, 80])
  predict = tta.with_test_time_augmentation(stand_in, ("flip", "shift:3"))
  together = predict({"image": jnp.asarray(images), "class_id": jnp.asarray(classes)})
  for i in range(3):
    alone = predict({"image": jnp.asarray(images[i : i + 1]), "class_id": jnp.asarray(classes[i : i + 1])})
    np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


def test_a_flip_averages_with_the_mirrored_prediction():
  image = fill.uniform("flip", (2, 4, 6, 3), 0)
  batch = {"image": jnp.asarray(image), "class_id": jnp.asarray([1, 2])}
  mirrored = stand_in(batch | {"image": jnp.asarray(image[:, :, ::-1])})[:, :, ::-1]
  expected = (stand_in(batch) + mirrored) / 2
  np.testing.assert_allclose(tta.with_test_time_augmentation(stand_in, ("flip",))(batch), expected, rtol=1e-6)


def test_no_words_leave_the_prediction_as_it_is():
  batch = {"image": np.random.default_rng(0).random((2, 8, 12, 3), np.float32), "class_id": np.zeros(2, np.int32)}
  np.testing.assert_array_equal(tta.with_test_time_augmentation(stand_in, ())(batch), stand_in(batch))


@pytest.mark.parametrize("size", [(9, 9), (9, 13), (13, 9), (5, 40), (40, 5), (352, 1216), (480, 640)])
@pytest.mark.parametrize("count", [2, 3, 16])
def test_full_coverage_covers_every_pixel(size, count):
  corners = tta.offsets(size, count, coverage="full")
  side = min(size)
  seen = np.zeros(size, int)
  for y, x in corners:
    assert 0 <= y <= size[0] - side and 0 <= x <= size[1] - side
    seen[y : y + side, x : x + side] += 1
  assert seen.min() >= 1
  assert len(corners) == (1 if size[0] == size[1] else max(count, -(-max(size) // side)))


@pytest.mark.parametrize("size, count, expected", [
  ((480, 640), 2, [0, 160]),
  ((352, 1216), 16, [57 * i for i in range(16)]),
  ((352, 1216), 2, [0, 864]),
])  # fmt: skip
def test_released_windows_start_at_multiples_of_a_whole_step(size, count, expected):
  assert tta.offsets(size, count) == [(0, x) for x in expected]
  assert tta.offsets(size[::-1], count) == [(x, 0) for x in expected]


def test_a_square_image_is_one_window():
  for coverage in tta.COVERAGES:
    assert tta.offsets((480, 480), 2, coverage=coverage) == [(0, 0)]


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("shape", [(2, 6, 11), (2, 11, 6, 3), (1, 7, 7)])
def test_merge_undoes_cut(kind, shape):
  image = kind(fill.normal("cut", shape, 0))
  corners = tta.offsets(shape[1:3], 3, coverage="full")
  windows = tta.cut(image, corners)
  assert type(windows) is type(image) and windows.shape[0] == len(corners) * shape[0]
  merged = tta.merge(windows, corners, shape[1:3])
  assert type(merged) is type(image) and merged.dtype == image.dtype
  np.testing.assert_allclose(merged, image, rtol=1e-6)


def test_overlaps_are_averaged_and_the_rest_is_nan():
  windows = np.stack([np.full((2, 2), 1.0), np.full((2, 2), 4.0)])
  merged = tta.merge(windows, [(0, 0), (0, 1)], (2, 4))
  np.testing.assert_array_equal(merged, [[[1, 2.5, 4, np.nan]] * 2])


@pytest.mark.parametrize("size", [(5, 12), (30, 7), (480, 640), (352, 1216), (6, 6)])
def test_smooth_windows_keep_a_constant_and_have_no_seam(size):
  corners = tta.offsets(size, 2, coverage="full")
  side, along = min(size), 0 if size[0] > size[1] else 1
  constant = np.full((len(corners), side, side), 3.7, np.float32)
  np.testing.assert_allclose(tta.merge(constant, corners, size, smooth=True), 3.7, rtol=1e-6)
  different = np.arange(len(corners), dtype=np.float32)[:, None, None] + np.zeros((side, side), np.float32)
  step = {
    smooth: np.abs(np.diff(tta.merge(different, corners, size, smooth=smooth)[0], axis=along)).max(initial=0)
    for smooth in (False, True)
  }
  if side > 100:  # the mean of two windows jumps by half of their difference
    assert step[False] >= 0.5 > 0.05 > step[True]


def test_smooth_windows_weigh_the_nearer_one_more_and_leave_the_rest_nan():
  windows = np.stack([np.full((3, 3), 1.0), np.full((3, 3), 4.0)])
  merged = tta.merge(windows, [(0, 0), (0, 1)], (3, 5), smooth=True)[0]
  np.testing.assert_allclose(merged, [[1, 1 + 3 * 0.25 / 1.25, 1 + 3 * 1 / 1.25, 4, np.nan]] * 3)


@pytest.mark.parametrize("words, expected", [
  ((), (False, 1, 0)), (("flip",), (True, 1, 0)), (("shift:2",), (False, 2, 0)), (("shift:16", "flip"), (True, 16, 0)),
  (("flip", "halves:64"), (True, 1, 64)),
])  # fmt: skip
def test_words_are_understood_in_any_order(words, expected):
  assert tta.parse(words) == expected


@pytest.mark.parametrize("word", ["flop", "flip:2", "shift", "shift:1", "shift:two", "shift:-2", "halves", "halves:0"])
def test_an_unknown_word_names_the_known_ones(word):
  known = "'flip' and 'shift:N' with N at least 2 and 'halves:N' with N at least 1"
  with pytest.raises(ValueError, match=rf"eval\.test_time has '{word}'; known are {known}\.$"):
    tta.parse((word,))


def test_windows_and_halves_exclude_each_other():
  with pytest.raises(
    ValueError, match=r"eval\.test_time=\('shift:2', 'halves:64'\) has both windows and halves; choose"
  ):
    tta.parse(("shift:2", "halves:64"))


# EcoDepth's cases: words of eval.test_time, size of the image, largest depth, crop, factor where it leaves the range
HALVES = {
  "nyu_flip": (("flip",), (480, 640), 10.0, "eigen_nyu", 0),
  "nyu_noflip": ((), (480, 640), 10.0, "eigen_nyu", 0),
  "nyu_flip_clip": (("flip",), (480, 640), 10.0, "eigen_nyu", 8),
  "kitti_halves_flip": (("flip", "halves:64"), (352, 1216), 80.0, "garg", 0),
  "kitti_halves_noflip": (("halves:64",), (352, 1216), 80.0, "garg", 0),
  "kitti_halves_flip_clip": (("flip", "halves:64"), (352, 1216), 80.0, "garg", 70),
  "kitti_whole_flip": (("flip",), (352, 1216), 80.0, "garg", 0),
}


@pytest.mark.parametrize("case", HALVES)
def test_the_procedure_of_eco_depth_is_the_authors(case):
  words, size, largest, crop, factor = HALVES[case]
  arrays, shapes = oracle.golden("metrics.eco_depth.npz"), []

  def model(batch):
    """Knows where in the padded window a pixel is; its result is cut back to the window."""
    (height, width), padding = batch["image"].shape[1:3], [(0, -side % 64) for side in batch["image"].shape[1:3]]
    padded = jnp.pad(batch["image"], ((0, 0), *padding, (0, 0)))
    shapes.append(padded.shape)
    depth = stand_in({"image": padded, "class_id": jnp.zeros(len(padded))})[:, :height, :width]
    return factor * (depth - 2) if factor else depth

  predict = jax.jit(tta.with_test_time_augmentation(model, words))
  task = Depth(max_depth=largest, eval_crop=crop, clip_prediction=True, benchmark_silog=True)
  rows = []
  for i in range(2):
    depth = predict({"image": jnp.asarray(image_of(case, i, size))})
    truth = truth_of(f"tta_{case}", i, size, largest)[None]
    rows.append(task.measure(depth, {"depth": jnp.asarray(truth)}))
    clipped = np.asarray(depth[0].clip(1e-3, largest))
    stored = {key: arrays[f"eco_tta/{case}/merged_{key}.{i}"] for key in ("stride35", "row100", "l2")}
    rounding = factor * 4 * np.finfo(np.float32).eps  # of the stand-in before it is multiplied: two steps at 2
    np.testing.assert_allclose(clipped[::35, ::35], stored["stride35"], rtol=1e-6, atol=rounding)
    np.testing.assert_allclose(clipped[100], stored["row100"], rtol=1e-6, atol=rounding)
    np.testing.assert_allclose(np.linalg.norm(clipped.astype(np.float64)), stored["l2"], rtol=1e-6)
  scores = task.summarize({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
  np.testing.assert_allclose([scores[name] for name in SCORES], arrays[f"eco_tta/{case}/metrics"], rtol=3e-6)
  batch, channels, height, width = arrays[f"eco_tta/{case}/model_batch_shape"]
  assert shapes == [(batch, height, width, channels)]


@pytest.mark.parametrize("width, overlap, side", [(10, 4, 7), (11, 4, 8), (6, 1, 4), (4, 4, 4), (3, 9, 3)])
def test_halves_of_any_width_meet(width, overlap, side):
  seen = []

  def predict(batch):
    seen.append(batch["image"].shape[2])
    return batch["image"][..., 0]

  image = fill.uniform("halves", (2, 3, width, 3), 0)
  np.testing.assert_allclose(tta.halves(predict, overlap)({"image": jnp.asarray(image)}), image[..., 0], rtol=1e-6)
  assert seen == [side]


def test_an_unknown_coverage_names_the_known_ones():
  with pytest.raises(ValueError, match=r"eval\.coverage='all' is unknown; choose one of \('released', 'full'\)"):
    tta.offsets((4, 6), 2, coverage="all")
