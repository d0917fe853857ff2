"""COCO's keypoint files as users have them, keypoints of users' own, and every fault of such files."""

import json
import pickle

import numpy as np
import pytest

from tests.helpers import coco_people
from vpd_jax.data import pipeline
from vpd_jax.data.datasets.coco_pose import COUNTS, CocoPose
from vpd_jax.data.datasets.keypoint_list import KeypointList
from vpd_jax.data.readers import coco_json, persons
from vpd_jax.data.shards import writer
from vpd_jax.data.transforms import top_down as top_down_transforms

CROP = (64, 48)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return coco_people.write(tmp_path_factory.mktemp("coco"))


def data(root, **options):
  return CocoPose(**{"root": str(root), "crop": CROP, "complete": False} | options)


def check_message(part, call):
  with pytest.raises(ValueError) as caught:
    call()
  message = str(caught.value)
  assert part in message and "\n" not in message, message
  return message


def test_people_who_can_be_learned_are_those_with_a_keypoint_and_a_box(root):
  source = data(root).source("train")
  assert len(source) == 4
  assert [int(source[i]["image_index"]) for i in range(4)] == [0, 0, 2, 3]
  assert source.notes == [
    "1 people without a labeled keypoint are left out",
    "2 boxes without an area inside their image are left out",
  ]
  example = source[1]
  written = np.array(coco_people.content()["annotations"][1]["keypoints"], np.float32).reshape(17, 3)
  np.testing.assert_array_equal(example["keypoints"], written)
  assert example["image"].shape == (*coco_people.SIZE, 3) and example["image"].dtype == np.uint8
  assert example["box_score"] == 1 and example["index"] == 1 and example["index"].dtype == np.int32
  # x1 = max(0, -10) = 0, x2 = min(119, 0 + 59) = 59, y2 = min(89, 30 + 79) = 89, as the release cuts.
  np.testing.assert_array_equal(source[3]["box"], [0, 30, 59, 59])


def test_boxes_of_a_detector_are_taken_as_they_are(root):
  source = data(root).source("eval")
  assert [int(i) for i in source.image] == [0, 0, 0, 1, 2]
  np.testing.assert_array_equal(source[4]["box"], [19, 6, 52, 78])
  assert source[4]["box_score"] == np.float32(0.95) and not source[4]["keypoints"].any()
  assert source.notes == [
    "1 detections of categories 3 (1) are left out, people are category 1, see data.person_category",
    "2 detected boxes without an area inside their image are left out",
    "1 images have no detection and count as such",
  ]
  fewer = data(root, box_threshold=0.75).source("eval")
  assert len(fewer) == 3 and "4 detections with a score below 0.75 are left out" in fewer.notes
  assert len(data(root, box_threshold=0.8).source("eval")) == 3  # a score of 0.8 is kept, as in the release
  assert len(data(root, boxes="annotated").source("eval")) == 4


def renumbered(change):
  return [entry | {"category_id": change.get(entry["category_id"], entry["category_id"])} for entry in
          coco_people.detections()]  # fmt: skip


@pytest.mark.parametrize("make", [data, lambda root, **options: KeypointList(
  root=str(root), crop=CROP, train_json="annotations/person_keypoints_val2017.json", images="val2017",
  eval_json="annotations/person_keypoints_val2017.json", **options)])  # fmt: skip
def test_a_detector_that_counts_from_0_is_told_and_can_be_read(root, tmp_path, make):
  path, options = tmp_path / "boxes.json", {"detections": str(tmp_path / "boxes.json")}
  path.write_text(json.dumps(renumbered({1: 0})))
  message = check_message(
    "none of 8 detections is of category 1; their category_id is 0 (7), 3 (1).",
    lambda: make(root, **options).source("eval"),
  )
  assert message.startswith(str(path)) and "Set data.person_category to the one of people" in message
  source = make(root, person_category=0, **options).source("eval")
  assert len(source) == 5
  assert "1 detections of categories 3 (1) are left out, people are category 0" in source.notes[0]
  path.write_text(json.dumps(coco_people.detections() + renumbered({1: 0, 3: 90})))
  source = make(root, **options).source("eval")
  assert len(source) == 5
  assert source.notes[0].startswith(
    "9 detections of categories 0 (7), 3 (1), 90 (1) are left out, people are category 1"
  )


def test_annotations_of_other_categories_are_counted(tmp_path):
  def other(content, count):
    for entry in content["annotations"][:count]:
      entry["category_id"] = 0

  made = rewritten(tmp_path / "some", lambda content: other(content, 2))
  assert "2 annotations of other categories are left out" in data(made, boxes="annotated").source("eval").notes
  made = rewritten(tmp_path / "all", lambda content: other(content, 8))
  check_message("none of 8 annotations is of category 1, which has the keypoints; their category_id is 0 (8)",
                lambda: data(made, boxes="annotated").source("eval"))  # fmt: skip


def test_the_truth_holds_every_picture_and_everybody(root):
  truth = data(root).truth("eval")
  assert [image["id"] for image in truth["images"]] == [30, 20, 70, 10]  # image_index counts in it
  assert [entry["id"] for entry in truth["annotations"]] == list(range(1, 9))
  assert [entry["num_keypoints"] for entry in truth["annotations"]] == [17, 14, 17, 0, 0, 17, 17, 17]
  assert truth["categories"][0]["id"] == 1 and "segmentation" not in truth["annotations"][0]


def test_batches_hold_crops(root):
  made = pickle.loads(pickle.dumps(data(root)))
  batches = pipeline.train_batches(made, batch_size=2, seed=0, keys=made.provides)
  batch = next(batches)
  batches.close()
  assert set(batch) == made.provides == top_down_transforms.PROVIDES
  shapes = {key: value.shape for key, value in batch.items()}
  assert shapes["image"] == (2, *CROP, 3) and shapes["keypoints"] == (2, 17, 3) and shapes["extent"] == (2, 2)
  rows = [*pipeline.eval_batches(made, batch_size=4, keys=made.provides)]
  assert sum(row["real"].sum() for row in rows) == 5


def test_published_numbers_are_checked_unless_told_otherwise(root):
  assert COUNTS == {"train": 149_813, ("eval", "detections"): 104_125, ("eval", "annotated"): 6_352}
  message = check_message("in place of the published 149813", lambda: data(root, complete=True).source("train"))
  assert "data.complete=False" in message
  check_message("in place of the published 104125", lambda: data(root, complete=True).source("eval"))


def test_shards_hold_the_same_examples(root, tmp_path):
  writer.prepare(data(root), tmp_path / "out", name="coco_pose")
  shards = data(tmp_path / "out", format="tfds", annotations=str(root / "annotations"))
  for split in ("train", "eval"):
    drawn, read = data(root).source(split), shards.source(split)
    assert len(drawn) == len(read)
    for index in range(len(read)):
      for key, value in drawn[index].items():
        np.testing.assert_array_equal(read[index][key], value)
        assert read[index][key].dtype == value.dtype
  assert shards.truth("eval") == data(root).truth("eval")
  check_message("boxes='detections' (here 'annotated')", lambda: data(
    tmp_path / "out", format="tfds", boxes="annotated").source("eval"))  # fmt: skip


def boxes_file(path, image_id, category_id):
  path.write_text(json.dumps([{"image_id": image_id, "category_id": category_id, "bbox": [5, 5, 60, 40], "score": 1}]))
  return str(path)


def test_shards_of_other_detections_are_refused(root, tmp_path):
  annotations = str(root / "annotations")
  read = lambda folder, **options: data(tmp_path / folder, format="tfds", annotations=annotations, **options)
  own = {"detections": boxes_file(tmp_path / "boxes.json", 30, 0), "person_category": 0}
  writer.prepare(data(root, **own), tmp_path / "own", name="coco_pose")
  assert len(read("own", **own).source("eval")) == 1
  check_message(f"detections={own['detections']!r} (here default), person_category=0 (here default); prepare",
                lambda: read("own").source("eval"))  # fmt: skip
  check_message("person_category=0 (here 2)", lambda: read("own", **own | {"person_category": 2}).source("eval"))
  before = data(root)  # as shards that state neither
  before.made_with = {"boxes": "detections", "box_threshold": 0.0}
  writer.prepare(before, tmp_path / "before", name="coco_pose")
  assert len(read("before").source("eval")) == 5
  check_message("detections=default (here 'mine.json')", lambda: read("before", detections="mine.json").source("eval"))
  check_message("person_category=default (here 0)", lambda: read("before", person_category=0).source("eval"))


def rewritten(tmp_path, change, name="annotations/person_keypoints_val2017.json"):
  """A copy of the folder with one JSON file changed."""
  made = coco_people.write(tmp_path / "coco")
  content = json.loads((made / name).read_text())
  content = change(content) or content
  (made / name).write_text(json.dumps(content))
  return made


def test_detections_of_unknown_images_stop_or_are_left_out(root, tmp_path):
  more = [*coco_people.detections(), {"image_id": 99, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}]
  made = coco_people.write(tmp_path / "coco", found=more)
  message = check_message("1 detections are of 1 images that", lambda: data(made, complete=True).source("eval"))
  assert "does not list: 99; take the detections of this split, or set data.complete=False" in message
  source = data(made).source("eval")
  assert len(source) == 5 and "1 detections of images outside the split are left out" in source.notes


def test_all_faults_of_an_annotation_file_are_counted_and_named(tmp_path):
  def spoil(content):
    content["annotations"][0]["keypoints"] = [1, 2, 3]
    content["annotations"][1]["image_id"] = 99
    content["annotations"][2]["bbox"] = [1, 2, float("nan"), 4]
    content["images"][3]["width"] = None

  made = rewritten(tmp_path, spoil)
  message = check_message("4 entries cannot be used: image 3, annotation 1, annotation 2, annotation 3", lambda: data(
    made).truth("eval"))  # fmt: skip
  assert "keypoints of 51 finite numbers" in message


def test_files_of_another_kind_are_refused(root, tmp_path):
  names = top_down_transforms.COCO.names
  path = tmp_path / "x.json"
  path.write_text("{")
  check_message(f"{path} cannot be read: it is not valid JSON or truncated", lambda: coco_json.annotations(path, names))
  path.write_text("[]")
  check_message(f"{path} is not an annotation file", lambda: coco_json.annotations(path, names))
  path.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}))
  check_message("has 0 categories with keypoints", lambda: coco_json.annotations(path, names))
  check_message("cannot be read (No such file", lambda: coco_json.annotations(tmp_path / "no.json", names))
  check_message("but the config a, b; make them agree in number and order, or leave", lambda: coco_json.annotations(
    root / "annotations/person_keypoints_val2017.json", ("a", "b")))  # fmt: skip
  check_message("it is not on cocodataset.org", lambda: data(root, detections="no.json").source("eval"))
  check_message("annotations_trainval2017.zip", lambda: data(root, annotations="no").source("eval"))
  check_message("data.boxes='all' is unknown", lambda: data(root, boxes="all"))
  check_message("split='test' is unknown", lambda: data(root).source("test"))
  path.write_text(json.dumps([{"image_id": 30, "category_id": 1, "bbox": [1, 2, 3]}]))
  check_message("1 detections cannot be used: numbers 0", lambda: data(root, detections=str(path)).source("eval"))


def test_faults_of_pictures_are_named(tmp_path):
  def resize(content):
    content["images"][0]["width"] = 100

  made = rewritten(tmp_path, resize)
  message = check_message("is 90x120, but the annotations say 90x100", lambda: data(made).source("eval")[0])
  assert str(made / "val2017/000000000030.jpg") in message
  (made / "val2017/000000000030.jpg").unlink()
  check_message("1 files are missing", lambda: data(made).source("eval"))
  nobody = coco_people.content() | {"annotations": coco_people.content()["annotations"][3:5]}
  empty = coco_people.write(tmp_path / "empty", train=nobody)
  message = check_message("gives no person to look at in 4 images", lambda: data(empty).source("train"))
  assert "1 people without a labeled keypoint are left out" in message


def test_files_may_leave_out_what_follows_from_the_rest(tmp_path):
  def reduce(content):
    for entry in content["annotations"]:
      for key in ("area", "iscrowd", "num_keypoints", "id", "segmentation"):
        entry.pop(key)

  truth = data(rewritten(tmp_path, reduce)).truth("eval")
  entry = truth["annotations"][1]
  assert entry["area"] == 30 * 50 and entry["iscrowd"] == 0 and entry["num_keypoints"] == 14 and entry["id"] == 2


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """Ten pictures of three keypoints, in one file."""
  folder = tmp_path_factory.mktemp("own")
  names = ("nose", "left_hoof", "right_hoof")
  category = {"id": 7, "name": "horse", "keypoints": list(names)}
  images = [coco_people.image(n) for n in range(10)]
  entries = [
    {"image_id": n, "category_id": 7, "bbox": [10, 10, 60, 40], "keypoints": [12, 12, 2, 60, 40, 1, 0, 0, 0]}
    for n in range(10)
  ]
  content = {"images": images, "annotations": entries, "categories": [category]}
  made = coco_people.write(folder, train=content)
  (made / "train2017").rename(made / "images")
  (made / "train.json").write_text(json.dumps(content))
  return made


def test_keypoints_of_ones_own_train_from_the_names_in_the_file(own):
  made = KeypointList(root=str(own), crop=CROP)
  assert made.classes == ("nose", "left_hoof", "right_hoof") and made.augmentation.keypoints.pairs == ((1, 2),)
  train, evaluation = made.source("train"), made.source("eval")
  assert len(train) == 9 and len(evaluation) == 1
  assert [image["id"] for image in made.truth("eval")["images"]] == [9]
  assert evaluation[0]["image_index"] == 0 and evaluation[0]["keypoints"].shape == (3, 3)
  example = made.train_transform(train[0], np.random.default_rng(0), 0)
  assert example["keypoints"].shape == (3, 3) and set(example) == made.provides
  named = {"keypoints": made.classes, "sigmas": (0.1,)}
  assert KeypointList.info(named).classes == made.classes  # without any file
  assert len(KeypointList(root=str(own), crop=CROP, eval_json="train.json").source("eval")) == 10
  check_message("make them agree in number", lambda: KeypointList(
    root=str(own), crop=CROP, keypoints=("a", "b", "c")).source("train"))  # fmt: skip
  check_message("it names the keypoints", lambda: KeypointList(root=str(own), train_json="no.json"))
  check_message("data.holdout=0 must lie between", lambda: KeypointList(root=str(own), crop=CROP, holdout=0))


def test_keypoints_of_ones_own_are_scored_in_boxes_of_a_detector_and_stored_in_shards(own, tmp_path):
  boxes = [{"image_id": n, "category_id": 7, "bbox": [5, 5, 60, 40], "score": 0.5} for n in (8, 9, 9)]
  (tmp_path / "boxes.json").write_text(json.dumps(boxes))
  made = KeypointList(root=str(own), crop=CROP, detections=str(tmp_path / "boxes.json"))
  source = made.source("eval")
  assert len(source) == 2 and source.notes == ["1 detections of images outside the split are left out"]
  whole = KeypointList(root=str(own), crop=CROP, eval_json="train.json", detections=str(tmp_path / "boxes.json"))
  assert len(whole.source("eval")) == 3 and "8 images have no detection and count as such" in whole.source("eval").notes
  writer.prepare(made, tmp_path / "out", name="keypoint_list")
  options = {"root": str(tmp_path / "out"), "crop": CROP, "format": "tfds", "detections": made.detections}
  stored = KeypointList(**options, json_root=str(own))
  assert len(stored.source("eval")) == 2 and stored.truth("eval") == made.truth("eval")
  for key, value in source[1].items():
    np.testing.assert_array_equal(stored.source("eval")[1][key], value)
  check_message("were made with holdout=0.1 (here 0.5)", lambda: KeypointList(
    **options, json_root=str(own), holdout=0.5).source("eval"))  # fmt: skip
  check_message("were made with person_category=default (here 3)", lambda: KeypointList(
    **options, json_root=str(own), person_category=3).source("eval"))  # fmt: skip


def test_a_record_is_an_example(root):
  source = data(root).source("train")
  example = persons.decode(source.record(2))
  for key, value in source[2].items():
    np.testing.assert_array_equal(example[key], value)
