"""JSON of users in which any value is another: it is taken, or refused in one line, and never a traceback."""

import copy
import json

import numpy as np
import pytest

from tests.helpers import coco_people
from tests.helpers.outlines import OVERLAPPING, SQUARE, disc, run_lengths
from vpd_jax.data.datasets import refcoco, refer_list
from vpd_jax.data.readers import coco_json, coco_masks, persons
from vpd_jax.data.transforms import top_down as top_down_transforms
from vpd_jax.inference import top_down
from vpd_jax.prediction import predict_folder

NAMES = top_down_transforms.COCO.names
ODD = [None, True, -1, 0, 2.5, 10**400, -(10**30), float("inf"), float("nan"), "", "text", "1", [], [1], [[]], {}]
ODD += [{"a": 1}, ["text"], "\udc80", "a\0b"]
GONE = object()


def places(content, path=(), most=3):
  """Where values stand in JSON; of long lists the first ones and the last."""
  yield path
  inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
  for key, value in inner:
    if not isinstance(content, list) or key < most or key == len(content) - 1:
      yield from places(value, (*path, key), most)


def spoilt(content):
  """Copies in which one value is an odd one, or not there."""
  for path in places(content):
    for odd in [*ODD, GONE]:
      if not path:
        if odd is not GONE:
          yield odd
        continue
      made = copy.deepcopy(content)
      holder = made
      for key in path[:-1]:
        holder = holder[key]
      if odd is not GONE:
        holder[path[-1]] = odd
      elif isinstance(holder, dict):
        del holder[path[-1]]
      else:
        holder.pop(path[-1])
      yield made


def survives(path, content, read):
  """How many odd files are refused; every refusal is one line."""
  refused = 0
  for odd in spoilt(content):
    path.write_text(json.dumps(odd))
    try:
      read(path)
    except ValueError as error:
      assert "\n" not in str(error) and "Error" not in str(error).split("(")[0], error
      refused += 1
  return refused


def small_coco():
  content = coco_people.content()
  return content | {"images": content["images"][::2], "annotations": content["annotations"][:1]}


def read_annotations(path):
  found = coco_json.annotations(path, NAMES)
  chosen = range(len(found.images))
  json.dumps(coco_json.truth(found, chosen), allow_nan=False)
  samples = coco_json.annotated(found, chosen)
  assert np.isfinite(samples.box).all() and np.isfinite(samples.keypoints).all()
  persons.open_split(path.parent, found, chosen, samples, "x")


def test_annotations(tmp_path):
  assert survives(tmp_path / "a.json", small_coco(), read_annotations) > 100


def test_names_of_keypoints(tmp_path):
  def read(path):
    top_down_transforms.keypoints_from_names(coco_json.keypoint_names(path), pairs=(), skeleton=(), sigmas=(), upper=())

  assert survives(tmp_path / "a.json", small_coco(), read) > 20


def test_an_area_that_is_null_is_that_of_the_box_and_one_in_words_is_counted(tmp_path):
  content = small_coco()
  content["annotations"][0]["area"] = None
  (tmp_path / "a.json").write_text(json.dumps(content))
  assert coco_json.annotations(tmp_path / "a.json", NAMES).people[0][0]["area"] == 2400
  content["annotations"] += [content["annotations"][0] | {"area": "large"}, 7, {"id": 3}]
  (tmp_path / "a.json").write_text(json.dumps(content))
  with pytest.raises(
    ValueError, match=r"3 entries cannot be used: annotation 1, annotation 2, annotation 3; .* its area"
  ):
    coco_json.annotations(tmp_path / "a.json", NAMES)


def test_detections(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps(small_coco()))
  found = coco_json.annotations(tmp_path / "a.json", NAMES)
  read = lambda path: coco_json.detected(path, found, range(2), others="error", threshold=0.0, remedy="")
  assert survives(tmp_path / "b.json", coco_people.detections()[:2], read) > 50


@pytest.mark.parametrize(
  "content",
  [
    {"a.jpg": [[1, 2, 3, 4], [5, 6, 7, 8, 0.5]]},
    [{"file_name": "a.jpg", "bbox": [1, 2, 3, 4], "score": 0.5}, {"file_name": "a.jpg", "bbox": [1, 2, 3, 4]}],
  ],
)
def test_boxes(tmp_path, content):
  def read(path):
    for name, boxes in top_down.read_boxes(path).items():
      assert np.isfinite(top_down.check_boxes(boxes, (60, 80), name)).all()

  assert survives(tmp_path / "a.json", content, read) > 50


def test_digits_in_a_text_are_no_box():
  for boxes in (["1234"], [["1", "2", "3", "4"]], [[True, True, 3, 4]], [5], 5, None, [[10**400, 1, 1, 1]]):
    with pytest.raises(ValueError, match=r"^boxes of a must be lists of x, y, width, height"):
      top_down.check_boxes(boxes, (60, 80), "a")


def test_sentences(tmp_path):
  content = [{"image": "a.jpg", "sentence": "b"}, {"image": "a.jpg", "sentences": ["b", "c"]}]
  assert survives(tmp_path / "a.json", content, lambda path: predict_folder.read_sentences(str(path))) > 50


def test_entries_of_referring(tmp_path):
  content = [{"image": "a.jpg", "mask": "a.png", "sentences": ["b", "c"], "value": 3, "split": "eval"}]

  def read(path):
    (tmp_path / "a.jpg").touch(), (tmp_path / "a.png").touch()
    refer_list.ReferList(root=str(tmp_path), file=str(path)).source("eval")

  assert survives(tmp_path / "a.json", content, read) > 50


def test_instances_and_outlines(tmp_path):
  runs = [run_lengths(disc((20, 30)), compressed=which) for which in (False, True)]
  outlines = [[SQUARE], OVERLAPPING, *runs, [runs[1]]]
  content = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 20, "width": 30}],
    "annotations": [{"id": i, "segmentation": outline} for i, outline in enumerate(outlines)],
  }

  def read(path):
    for outline in refcoco.read_instances(path)[1].values():
      if not coco_masks.problem(outline):
        assert coco_masks.decode(outline, (20, 30)).shape == (20, 30)

  assert survives(tmp_path / "a.json", content, read) > 50


@pytest.mark.parametrize("compressed", [False, True])
def test_runs_are_read_as_they_were_written(compressed):
  rng = np.random.default_rng(0)
  for share in (0, 0.003, 0.1, 0.5, 1):
    mask = (rng.random((61, 83)) < share).astype(np.uint8)
    read = coco_masks.decode(run_lengths(mask, compressed=compressed), mask.shape)
    np.testing.assert_array_equal(read, mask)


@pytest.mark.parametrize(
  "counts", [[5], [600, 1], [300, 100], [2**31, 1], [-5, 605], [1.5], ["a"], "zzzz~~~~", "PP`", "é"]
)
def test_runs_of_another_number_of_pixels_are_no_mask(counts):
  words = "cannot be read|is a run-length code whose counts are not"
  with pytest.raises(ValueError, match=rf"^the outline of an object ({words})"):
    coco_masks.decode({"size": [20, 30], "counts": counts}, (20, 30))


def test_an_outline_far_outside_is_none(tmp_path):
  for wrong in (1e9, float("nan"), float("inf"), "text", None):
    assert "not numbers or are out of range" in coco_masks.problem([[1, 2, 3, 4, 5, wrong]])
