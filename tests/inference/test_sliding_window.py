"""Sliding windows, scales and mirror images for label maps: against a plain restatement, and by their properties."""

import gc
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import fill
from vpd_jax.checkpoints import initialize
from vpd_jax.config import loader
from vpd_jax.distributed import sharding
from vpd_jax.evaluation import evaluate
from vpd_jax.inference import blending, sliding_window, tiles
from vpd_jax.inference.sliding_window import SlidingWindowInference, SlidingWindowOptions, Views
from vpd_jax.prediction import protocols

CLASSES = 4
SLIDE = SlidingWindowOptions(window=32, stride=20)


def stand_in(weights, batch):
  """Scores that depend on color, on the place in the window and on its size; NumPy's of a NumPy array."""
  image = batch["image"]
  xp = np if isinstance(image, np.ndarray) else jnp  # the restatement compiles nothing for its many sizes
  height, width = image.shape[1:3]
  y = xp.arange(height, dtype=xp.float32)[None, :, None, None] / xp.float32(height)
  x = xp.arange(width, dtype=xp.float32)[None, None, :, None] / xp.float32(width)
  inputs = xp.concatenate([3 * image, xp.broadcast_to(y, (*image.shape[:3], 1)), x + 0 * image[..., :1]], axis=-1)
  extra = batch["shift"][:, None, None, None] if "shift" in batch else 0
  return inputs @ weights + extra * inputs[..., :1]


@pytest.fixture(scope="module")
def weights():
  return jnp.asarray(fill.normal("weights", (5, CLASSES), 0))


def picture(seed, size):
  return fill.uniform(f"picture{seed}", (*size, 3), 0)


def resized(scores, size):
  """Bilinear in float64: each new place weighs the old ones by one less their distance."""
  for axis, new in enumerate(size):
    old = scores.shape[axis]
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    weights = np.maximum(1 - np.abs(place[:, None] - np.arange(old)[None]), 0)
    scores = np.moveaxis(np.tensordot(weights, scores, (1, axis)), 0, axis)
  return scores


def restated(weights, views, procedure, *, softmax=True, smooth=False):
  """mmseg's loops, in numpy: each window by itself, sums and counts, then the mean over views."""
  total, weights = 0, np.asarray(weights)
  for image in views.images:
    for mirrored in (False, True) if procedure.flip else (False,):
      image_here = image[:, ::-1] if mirrored else image
      height, width = image.shape[:2]
      crop, stride = procedure.window or max(height, width), procedure.stride or 1
      sums, count = np.zeros((height, width, CLASSES)), np.zeros((height, width, 1))
      for i in range(max(height - crop + stride - 1, 0) // stride + 1):
        for j in range(max(width - crop + stride - 1, 0) // stride + 1):
          y2, x2 = min(i * stride + crop, height), min(j * stride + crop, width)
          y1, x1 = max(y2 - crop, 0), max(x2 - crop, 0)
          fade = lambda n: np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 if smooth else np.ones(n)
          weight = fade(y2 - y1)[:, None, None] * fade(x2 - x1)[None, :, None]
          scores = stand_in(weights, {"image": np.asarray(image_here[None, y1:y2, x1:x2])})[0]
          sums[y1:y2, x1:x2] += weight * scores
          count[y1:y2, x1:x2] += weight
      scores = resized(sums / count, views.size)
      if softmax:
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
      total = total + (scores[:, ::-1] if mirrored else scores)
  return total / (len(views.images) * (2 if procedure.flip else 1))


def cropped(results, many):
  return [np.asarray(r)[: v.size[0], : v.size[1]] for r, v in zip(results, many, strict=True)]


CASES = {
  "slide": (SLIDE, [Views([picture(0, (40, 71))], (50, 60), {})]),
  "whole": (SlidingWindowOptions(), [Views([picture(0, (40, 71))], (40, 71), {})]),
  "scales and mirror": (
    SLIDE._replace(flip=True),
    [Views([picture(1, (40, 71)), picture(2, (50, 89)), picture(3, (20, 35))], (33, 130), {})],
  ),
  "several": (SLIDE, [Views([picture(i, (40 + 9 * i, 90 - 11 * i))], (60, 60 + i), {}) for i in range(4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_those_of_the_plain_loops(case, weights):
  procedure, many = CASES[case]
  results = list(SlidingWindowInference(stand_in, procedure, batch_size=3)(weights, many))
  for views, result in zip(many, cropped(results, many), strict=True):
    np.testing.assert_allclose(result, restated(weights, views, procedure), rtol=0, atol=2e-6)
    np.testing.assert_allclose(result.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("case", ["slide", "scales and mirror"])
def test_smooth_windows_are_those_of_the_plain_loops(case, weights):
  procedure, many = CASES[case]
  results = list(SlidingWindowInference(stand_in, procedure, batch_size=3, smooth=True)(weights, many))
  for views, result in zip(many, cropped(results, many), strict=True):
    np.testing.assert_allclose(result, restated(weights, views, procedure, smooth=True), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
  "length, stride, side", [(32, 20, 91), (512, 341, 1300), (300, 300, 600), (7, 1, 11), (1, 1, 3)]
)
def test_smooth_weights_are_positive_everywhere_and_keep_a_constant(length, stride, side):
  starts, _, (length, _) = tiles.corners((side, side), length, stride)
  total, over = np.zeros(side), blending.overlap_weights(starts, length, side, smooth=True)
  for start in starts:
    weight = blending.smooth_profile(jnp.arange(length), length)
    np.testing.assert_allclose(weight, np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2, rtol=1e-6)
    assert (weight > 0).all()
    total[start : start + length] += weight
  assert (total > 0).all()
  np.testing.assert_allclose(total * over[:side], 1, rtol=1e-6)
  plain = blending.overlap_weights(starts, length, side)
  np.testing.assert_array_equal(1 / plain[:side], [sum(s <= x < s + length for s in starts) for x in range(side)])


def test_scores_without_softmax_are_averaged_as_they_are(weights):
  procedure, many = CASES["slide"]
  (result,) = SlidingWindowInference(stand_in, procedure, softmax=False)(weights, many)
  expected = restated(weights, many[0], procedure, softmax=False)
  np.testing.assert_allclose(cropped([result], many)[0], expected, rtol=1e-5, atol=1e-5)


def test_labels_are_the_most_probable_classes(weights):
  procedure, many = CASES["several"]
  engine = SlidingWindowInference(stand_in, procedure, batch_size=3)
  for label, result in zip(
    map(sliding_window.most_probable, engine(weights, many)), engine(weights, many), strict=True
  ):
    assert label.dtype == jnp.int32
    np.testing.assert_array_equal(label, np.asarray(result).argmax(-1))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_windows_of_all_pictures_fill_calls_of_one_shape(batch_size, weights):
  """The network is traced once; each picture keeps its own extras, whatever it shares a call with."""
  shapes = []

  def network(weights, batch):
    shapes.append(batch["image"].shape)
    return stand_in(weights, batch)

  many = [Views([picture(i, (33 + i, 50 + 9 * i))], (40, 40), {"shift": np.float32(i)}) for i in range(4)]
  together = list(SlidingWindowInference(network, SLIDE, batch_size=batch_size)(weights, many))
  assert shapes == [(batch_size, 32, 32, 3)]
  alone = [next(SlidingWindowInference(stand_in, SLIDE, batch_size=2)(weights, [views])) for views in many]
  for first, second in zip(cropped(together, many), cropped(alone, many), strict=True):
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)
  assert np.abs(np.asarray(together[0])[:40, :40] - np.asarray(together[3])[:40, :40]).max() > 0.01


def test_at_most_one_batch_of_pictures_are_open(weights):
  """Also where every picture has a shape of its own, so that no call is ever filled."""
  taken = []

  def source():
    for i in range(12):
      taken.append(i)
      yield Views([picture(i, (20 + i, 30))], (20, 30), {})

  ahead = [
    len(taken) - i for i, _ in enumerate(SlidingWindowInference(stand_in, SLIDE, batch_size=4)(weights, source()))
  ]
  assert len(ahead) == 12 and max(ahead) <= 4


def test_nothing_outlives_its_picture(weights):
  """Without the help of the collector of cycles, which does not know how large arrays are on a device."""
  many = [Views([picture(i, (33, 50))], (200, 300), {}) for i in range(8)]
  engine, alive = SlidingWindowInference(stand_in, SLIDE, batch_size=2), []
  large = lambda: sum(x.size > 40_000 for x in jax.live_arrays())
  gc.collect()
  gc.disable()
  try:
    before = large()  # of other tests
    for _ in engine(weights, many):
      alive.append(large() - before)
  finally:
    gc.enable()
  assert max(alive) <= 3  # the one in hand, and those of pictures that share its call


def test_what_is_smaller_than_the_window_is_taken_whole_or_padded(weights):
  views = Views([picture(0, (20, 71))], (20, 71), {})
  whole, padded = (
    next(SlidingWindowInference(stand_in, SLIDE, small_images=small)(weights, [views])) for small in ("whole", "padded")
  )
  np.testing.assert_allclose(whole[:20, :71], restated(weights, views, SLIDE), rtol=0, atol=2e-6)
  grown = Views([np.pad(views.images[0], ((0, 12), (0, 0), (0, 0)), constant_values=0.5)], (32, 71), {})
  np.testing.assert_allclose(padded[:20, :71], restated(weights, grown, SLIDE)[:20], rtol=0, atol=2e-6)


def sizes(count):
  """Drawn evenly on a logarithmic scale, so that one in nine is more than four times as long as it is wide."""
  rng = np.random.default_rng(0)
  return [tuple(int(256 * 8 ** rng.random()) for _ in range(2)) for _ in range(count)]


PUBLISHED = ("resize:2048:512", "slide:512:341", "ms:0.5:0.75:1:1.25:1.5:1.75:2", "flip")


def test_few_shapes_of_windows_serve_a_whole_data_set():
  procedure = sliding_window.parse(PUBLISHED)
  scaled = [sliding_window.scaled_size(s, procedure.scale, ratio) for s in sizes(2000) for ratio in procedure.ratios]
  shapes = {small: {tiles.window_of(s, 512, small) for s in scaled} for small in sliding_window.SMALL_IMAGE_MODES}
  assert len(shapes["whole"]) > 1000 and len(shapes["few_shapes"]) == 9 and shapes["padded"] == {(512, 512)}
  assert shapes["few_shapes"] == set(tiles.few_shapes(512))
  assert all(side % 64 == 0 for shape in shapes["few_shapes"] for side in shape)
  for size in scaled:
    few, whole = (tiles.window_of(size, 512, small) for small in ("few_shapes", "whole"))
    assert whole == tuple(min(512, side) for side in size)  # as released
    assert few == whole or min(size) < 512
    if min(size) >= 128 and (max(size) >= 512 or min(size) >= 256):  # all of the picture, nothing else
      assert all(a <= b for a, b in zip(few, size, strict=True))


# Configs of label maps, and the sizes of their pictures where all have one.
LABEL_MAPS = {
  "ade20k_seg.py": sizes(2000),
  "my_segmentation.py": sizes(2000),
  "cityscapes_seg.py": [(1024, 2048)],
  "rooms.py:segmentation": [(480, 640)],
}


def test_every_config_of_label_maps_is_known():
  configs = [loader.load(f"configs/{name}") for name in LABEL_MAPS]
  assert {config.task.name for config in configs} == {"segmentation"}
  assert {name.split(".")[0] for name in LABEL_MAPS} == {"rooms"} | {
    path.stem
    for path in (loader.PROJECT / "configs").glob("*.py")
    if path.stem != "rooms" and loader.load(f"configs/{path.name}").task.name == "segmentation"
  }


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_every_config_of_label_maps_is_evaluated_with_few_shapes_of_windows(name):
  config = loader.load(f"configs/{name}")
  scales = (*config.eval.test_time, "ms:0.5:0.75:1:1.25:1.5:1.75:2", "flip")
  for procedure in map(sliding_window.parse, (config.eval.test_time, scales)):
    scaled = [sliding_window.scaled_size(s, procedure.scale, r) for s in LABEL_MAPS[name] for r in procedure.ratios]
    assert len({tiles.window_of(size, procedure.window, config.eval.small_images) for size in scaled}) <= 9


@pytest.mark.parametrize("small", sliding_window.SMALL_IMAGE_MODES)
def test_evaluation_and_prediction_cut_windows_as_the_config_says(small, monkeypatch):
  config = loader.changed(loader.load("configs/my_segmentation.py:tiny"), {"eval.small_images": small})
  task = types.SimpleNamespace(measure=lambda *_: {}, decide=sliding_window.most_probable, result="label")
  exp = types.SimpleNamespace(task=task)
  monkeypatch.setattr(initialize, "gather", lambda *_: None)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  made = (evaluate._Images(config, exp, None, mesh), protocols.SlidingWindowProtocol(config, exp))
  assert [made[0]._labeling.small_images, made[1]._inference.small_images] == [small, small]


@pytest.mark.parametrize("window, expected", [
  (512, 9), (1024, 9), (256, 9), (128, 4), (64, 1), (32, 1), (500, 9),
])  # fmt: skip
def test_few_shapes_fit_the_network(window, expected):
  shapes = tiles.few_shapes(window)
  assert shapes[0] == (window, window) and len(shapes) == expected
  assert all(side == window or side % 64 == 0 for shape in shapes for side in shape)


def test_all_programs_of_a_data_set_are_at_most_twelve():
  """Those of the network, one for each shape, and those that put its scores together."""
  compiled, shapes = [], []

  def network(weights, batch):
    shapes.append(batch["image"].shape[1:3])
    return stand_in(weights, batch)

  procedure = sliding_window.parse(("resize:512:128", "slide:128:85", "ms:0.5:0.75:1", "flip"))
  options = {"batch_size": 4, "small_images": "few_shapes", "postprocess": sliding_window.most_probable}
  engine, weights = SlidingWindowInference(network, procedure, **options), fill.normal("weights", (5, CLASSES), 0)
  pictures = [picture(i, size) for i, size in enumerate([(48, 64), (64, 47), (24, 130), (90, 91)])]
  listener = lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    labels = list(engine(weights, (engine.views({"image": image}) for image in pictures)))
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert [label.shape for label in labels] == [image.shape[:2] for image in pictures]
  assert set(shapes) == engine.shapes == set(tiles.few_shapes(128)) and len(shapes) == 4
  assert len(compiled) == len(shapes) + 2


def test_few_shapes_change_nothing_but_what_the_network_sees(weights):
  """A network of single pixels gives the same scores; where no side is short, every network does."""
  pixels = lambda w, batch: batch["image"] @ w[:3]
  for size in ((130, 400), (300, 64), (100, 90), (40, 300), (30, 20)):
    views = Views([picture(0, size)], size, {})
    few, whole = (
      next(
        SlidingWindowInference(pixels, SlidingWindowOptions(256, 171), batch_size=2, small_images=small)(
          weights, [views]
        )
      )
      for small in ("few_shapes", "whole")
    )
    np.testing.assert_allclose(few, whole, rtol=0, atol=1e-6)
  views = Views([picture(0, (70, 64))], (70, 64), {})
  few, whole = (
    next(SlidingWindowInference(stand_in, SlidingWindowOptions(64, 40), small_images=s)(weights, [views]))
    for s in ("few_shapes", "whole")
  )
  np.testing.assert_array_equal(few, whole)


LARGE = {
  "enlarged": (SLIDE, [(40, 71)], (700, 530)),
  "several tiles of views": (SlidingWindowOptions(300, 200), [(310, 560)], (290, 600)),
  "reduced": (SlidingWindowOptions(300, 200, flip=True), [(310, 560), (64, 40)], (3, 20)),
  "views larger than the result": (SLIDE._replace(flip=True), [(40, 71), (270, 480), (20, 36)], (33, 300)),
}


@pytest.mark.parametrize("case", LARGE)
def test_labels_do_not_depend_on_where_tiles_end(case, weights):
  procedure, sizes, size = LARGE[case]
  views = Views([picture(i, s) for i, s in enumerate(sizes)], size, {})
  expected = restated(weights, views, procedure)
  options = {"postprocess": sliding_window.most_probable}, {}
  label, probabilities = (
    next(SlidingWindowInference(stand_in, procedure, batch_size=3, **o)(weights, [views])) for o in options
  )
  assert label.shape == size and label.dtype == np.int32
  np.testing.assert_allclose(probabilities, expected, rtol=0, atol=2e-6)
  np.testing.assert_array_equal(label, probabilities.argmax(-1))
  lost = expected.max(-1) - np.take_along_axis(expected, label[..., None], -1)[..., 0]
  assert lost.max() < 2e-6  # another label is a tie


def test_a_large_picture_never_has_all_of_its_probabilities(weights):
  """A quarter of 12 megapixels with 4 classes are 48 MB."""
  engine = SlidingWindowInference(stand_in, SLIDE, batch_size=2, postprocess=sliding_window.most_probable)
  views, held = Views([picture(0, (32, 43))], (1500, 2000), {}), []
  gc.collect()
  others = sum(x.nbytes for x in jax.live_arrays())
  fold = engine._fold

  def watched(*given):
    held.append(sum(x.nbytes for x in jax.live_arrays()) - others)
    return fold(*given)

  engine._fold = watched
  (label,) = engine(weights, [views])
  assert label.shape == (1500, 2000) and len(held) == 6 * 8
  assert max(held) < 4e6
  shapes = lambda *given: jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), given)
  tile, places = np.zeros((tiles.TILE, tiles.TILE, 150), np.float32), np.zeros(tiles.TILE, np.int32)
  axis = (places, places, places.astype(np.float32), np.zeros(2 * tiles.TILE, np.float32))
  lowered = fold.lower(*shapes(tile, [tile] * 4, (axis, axis), np.zeros(2, bool), np.float32(1)))
  assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**29


def test_squares_hold_every_pixel_once():
  image = np.arange(300 * 140).reshape(300, 140) % 7 + 1
  squares = tiles.squares(image, 0)
  assert squares.shape == (16, 128, 128)
  np.testing.assert_array_equal(np.bincount(squares.ravel())[1:], np.bincount(image.ravel())[1:])
  np.testing.assert_array_equal(squares[1, :, :12], image[:128, 128:])


@pytest.mark.parametrize("size", [(32, 32), (33, 52), (31, 100), (5, 7), (52, 53), (512, 683)])
@pytest.mark.parametrize("window, stride", [(32, 20), (32, 32), (40, 7)])
def test_windows_cover_every_pixel_and_lie_inside(size, window, stride):
  rows, columns, shape = sliding_window.corners(size, window, stride)
  assert shape == tuple(min(window, side) for side in size)
  for starts, length, side in zip((rows, columns), shape, size, strict=True):
    assert starts[0] == 0 and starts[-1] + length == side
    assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("size, scale, ratio, expected", [
  ((480, 640), (2048, 512), 1.0, (512, 683)), ((640, 480), (2048, 512), 1.0, (683, 512)),
  ((256, 2560), (2048, 512), 1.0, (205, 2048)), ((480, 640), (2048, 512), 1.25, (640, 853)),
  ((1024, 2048), (2048, 1024), 0.5, (512, 1024)), ((40, 71), None, 1.0, (40, 71)), ((40, 71), None, 0.5, (20, 36)),
])  # fmt: skip
def test_sizes_of_scaled_pictures(size, scale, ratio, expected):
  assert sliding_window.scaled_size(size, scale, ratio) == expected


def test_pictures_are_resized_to_every_ratio(weights):
  procedure = sliding_window.parse(("resize:64:32", "slide:32:20", "ms:1:0.5", "flip"))
  engine = SlidingWindowInference(stand_in, procedure)
  example = {"image": (255 * picture(0, (50, 70))).astype(np.uint8), "shift": np.float32(0)}
  views = engine.views(example)
  assert [x.shape for x in views.images] == [(32, 45, 3), (16, 22, 3)] and views.size == (50, 70)
  assert {x.dtype for x in views.images} == {np.dtype(np.uint8)} and views.extras.keys() == {"shift"}
  floats = views._replace(images=[x.astype(np.float32) / 255 for x in views.images])
  (result,) = engine(weights, [views])
  np.testing.assert_allclose(result[:50, :70], restated(weights, floats, procedure), rtol=0, atol=2e-6)


def test_words_are_understood_in_any_order():
  words = ("flip", "ms:0.5:1:1.75", "slide:512:341", "resize:2048:512")
  expected = SlidingWindowOptions(512, 341, (2048, 512), (0.5, 1.0, 1.75), True)
  assert sliding_window.parse(words) == sliding_window.parse(words[::-1]) == expected
  assert sliding_window.parse(()) == SlidingWindowOptions()


@pytest.mark.parametrize("words, word", [
  (("shift:2",), "shift:2"), (("slide:512",), "slide:512"), (("slide:512:600",), "slide:512:600"), (("ms",), "ms"),
  (("slide:512:0",), "slide:512:0"), (("ms:1:-1",), "ms:1:-1"), (("ms:x",), "ms:x"), (("flip:1",), "flip:1"),
  (("resize:512:a",), "resize:512:a"), (("flip", "flip"), "flip"),
])  # fmt: skip
def test_an_unknown_word_names_the_known_ones(words, word):
  with pytest.raises(ValueError, match=rf"^eval\.test_time has '{word}'; known are 'flip', 'slide:WINDOW:STRIDE'"):
    sliding_window.parse(words)


@pytest.mark.parametrize("options, message", [
  (dict(small_images="crop"), r"^eval\.small_images='crop' is unknown; choose one of \('whole', 'padded', 'few"),
  (dict(batch_size=0), r"^batch_size=0 must be at least 1\."),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    SlidingWindowInference(stand_in, SLIDE, **options)
