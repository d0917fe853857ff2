"""People in pictures of any size, with a made-up network that knows where everybody is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpd_jax.data.transforms.top_down import COCO, Augmentation
from vpd_jax.inference import top_down
from vpd_jax.tasks.pose.task import Pose

CROP, SIZE = (64, 48), (16, 12)


def picture(size, places):
  """Black, with a white square at each place."""
  image = np.zeros((*size, 3), np.uint8)
  for x, y in places:
    image[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = 255
  return image


def brightest(weights, batch):
  """Heatmaps that are the brightness of the crop, for all keypoints alike."""
  image = batch["image"].astype(jnp.float32)[..., 0] / 255 * weights
  maps = jax.image.resize(image, (image.shape[0], *SIZE), "linear")[..., None]
  return jnp.broadcast_to(maps, (*maps.shape[:3], 17))


@pytest.fixture(scope="module")
def made():
  task = Pose(keypoints=COCO, sigma=1)
  crop = Augmentation(CROP, COCO).evaluation
  options = {"keypoints": 17, "rescore": task.rescored, "batch_size": 4}
  return top_down.TopDownPoseEstimator(jax.jit(brightest), crop, jax.jit(task.locate), **options)


def test_everybody_is_found_in_the_picture_whatever_its_size_and_however_many_there_are(made):
  spots = [[(30, 40), (90, 20)], [], [(200, 150)], [(20, 30), (60, 60), (100, 20)]]
  sizes = [(80, 120), (50, 50), (300, 260), (90, 120)]
  images = [picture(size, places) for size, places in zip(sizes, spots, strict=True)]
  boxes = [
    top_down.check_boxes([(x - 14, y - 18, 28, 36, 0.5) for x, y in places], size, "it")
    for size, places in zip(sizes, spots, strict=True)
  ]
  people = made(1.0, images, boxes)
  assert [len(found.keypoints) for found in people] == [2, 0, 1, 3]
  for found, places in zip(people, spots, strict=True):
    for points, place in zip(found.keypoints, places, strict=True):
      np.testing.assert_allclose(points[:, :2], np.broadcast_to(place, (17, 2)), atol=1.5)
    np.testing.assert_allclose(found.scores, 0.5 * found.keypoints[:, 0, 2], rtol=1e-5)
    assert found.keypoints.shape[1:] == (17, 3) and found.boxes.shape[1:] == (4,)


def test_a_whole_picture_is_one_person(made):
  image = picture((80, 60), [(40, 30)])
  assert top_down.full_image_box(image).tolist() == [[0, 0, 60, 80]]
  boxes = top_down.check_boxes(top_down.full_image_box(image), (80, 60), "it")
  (found,) = made(1.0, [image], [boxes])
  np.testing.assert_allclose(found.keypoints[0, 0, :2], (40, 30), atol=2)


@pytest.mark.parametrize("people, sizes", [(0, []), (1, [1]), (3, [4]), (6, [4, 4])])
def test_calls_are_no_larger_than_there_are_people(people, sizes):
  task, seen = Pose(keypoints=COCO, sigma=1), []

  def predict(weights, batch):
    seen.append(len(batch["image"]))
    return brightest(weights, batch)

  options = {"keypoints": 17, "rescore": task.rescored, "batch_size": 4}
  made = top_down.TopDownPoseEstimator(predict, Augmentation(CROP, COCO).evaluation, task.locate, **options)
  boxes = top_down.check_boxes([(1, 1, 20, 30)] * people, (60, 50), "it")
  (found,) = made(1.0, [picture((60, 50), [(12, 20)])], [boxes])
  assert seen == sizes and found.keypoints.shape == (people, 17, 3) and found.scores.shape == (people,)


def test_the_other_inputs_of_an_image_go_with_each_of_its_crops():
  task, seen = Pose(keypoints=COCO, sigma=1), []

  def predict(weights, batch):
    seen.append(batch["tokens"].tolist())
    return brightest(weights, batch)

  options = {"keypoints": 17, "rescore": task.rescored, "batch_size": 4}
  made = top_down.TopDownPoseEstimator(predict, Augmentation(CROP, COCO).evaluation, task.locate, **options)
  boxes = [top_down.check_boxes([(1, 1, 20, 30)] * people, (60, 50), "it") for people in (1, 0, 2)]
  inputs = [{"tokens": np.int32([i, 7])} for i in range(3)]
  made(1.0, [picture((60, 50), [(12, 20)])] * 3, boxes, inputs)
  assert seen == [[[0, 7], [2, 7], [2, 7], [2, 7]]]


@pytest.mark.parametrize("boxes, message", [
  ([[1, 2, 3]], r"^boxes of a\.jpg must be lists of x, y, width, height"),
  ([[1, 2, 3, float("nan")]], r"finite numbers"),
  ([[1, 2, 3, 4], [1, 2]], r"must be lists"),
  ("abc", r"must be lists"),
  ([[1, 2, 0, 4], [1, 1, 5, 5], [90, 2, 9, 9]],
   r"^boxes of a\.jpg, 80 x 60 pixels: 2 have no area or lie outside: \[1\.0, 2\.0, 0\.0, 4\.0\], \[90\.0"),
])  # fmt: skip
def test_boxes_that_cannot_be_are_refused(boxes, message):
  with pytest.raises(ValueError, match=message):
    top_down.check_boxes(boxes, (60, 80), "a.jpg")
  assert top_down.check_boxes([], (60, 80), "a.jpg").shape == (0, 5)


def test_boxes_are_read_from_both_forms(tmp_path):
  path = tmp_path / "boxes.json"
  path.write_text(json.dumps({"a.jpg": [[1, 2, 3, 4]], "b.jpg": []}))
  assert top_down.read_boxes(path) == {"a.jpg": [[1, 2, 3, 4]], "b.jpg": []}
  first, second = (
    {"file_name": "a.jpg", "bbox": [1, 2, 3, 4], "score": 0.5},
    {"file_name": "a.jpg", "bbox": [5, 6, 7, 8]},
  )
  path.write_text(json.dumps([first, second]))
  assert top_down.read_boxes(path) == {"a.jpg": [[1, 2, 3, 4, 0.5], [5, 6, 7, 8, 1.0]]}
  for content in ("[1]", "{", '{"a": 1}'):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^boxes '.*boxes\.json' (must be|cannot be read)"):
      top_down.read_boxes(path)
