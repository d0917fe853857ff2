import pickle

import cv2
import numpy as np
import pytest

from tests.helpers.label_files import add_companions, write_pairs
from tests.helpers.messages import check_message
from vpd_jax.data.datasets import cityscapes, mapillary
from vpd_jax.data.readers import label_maps
from vpd_jax.data.shards import writer

IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
IDS |= {28: 15, 31: 16, 32: 17, 33: 18}


def write_frames(root, images, labeled, ending, frames, numbers, size=(16, 32)):
  """Frames with blocks of the given numbers as label files."""
  rng = np.random.default_rng(0)
  for frame in frames:
    city = frame.split("_")[0]
    image = root / "leftImg8bit" / images / city / f"{frame}_leftImg8bit.png"
    label = root / labeled / city / f"{frame}_{ending}.png"
    for path in (image, label):
      path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(image), np.full((*size, 3), len(frame), np.uint8))
    blocks = rng.choice(np.array(numbers, np.uint8), (4, 8))
    cv2.imwrite(str(label), cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST))


@pytest.fixture
def root(tmp_path):
  root = tmp_path / "cityscapes"
  ids = [*range(34), 255]
  train = ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"]
  write_frames(root, "train", "gtFine/train", "gtFine_labelIds", train, ids)
  write_frames(root, "val", "gtFine/val", "gtFine_labelTrainIds", ["munster_000000_000019"], [*range(19), 255])
  extra = ["troisdorf_000000_000072", "troisdorf_000000_000073", "wuppertal_000000_000001"]
  write_frames(root, "train_extra", "gtCoarse/train_extra", "gtCoarse_labelIds", extra, ids)
  write_frames(root, "train_extra", "convert_autolabelled", "gtFine_labelTrainIds", extra, range(19))
  return root


def made(root, **options):
  return cityscapes.Cityscapes(root=str(root), complete=False, **options)


def names(source):
  return [image.split("/")[-1].removesuffix("_leftImg8bit.png") for image, _ in source.pairs]


def test_label_ids_are_mapped_and_train_ids_taken_as_they_are(root):
  source = made(root).source("train")
  assert names(source) == ["aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019"]
  stored = cv2.imread(str(root / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"), cv2.IMREAD_UNCHANGED)
  np.testing.assert_array_equal(source[2]["label"], np.vectorize(lambda number: IDS.get(number, 255))(stored))
  stored = cv2.imread(
    str(root / "gtFine/val/munster/munster_000000_000019_gtFine_labelTrainIds.png"), cv2.IMREAD_UNCHANGED
  )
  np.testing.assert_array_equal(made(root).source("eval")[0]["label"], stored)
  assert len(IDS) == 19 and cityscapes.LABEL_IDS == IDS
  assert made(root).classes[::6] == ("road", "traffic light", "rider", "bicycle")


def test_a_file_of_train_ids_goes_before_one_of_label_ids(root):
  path = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png"
  cv2.imwrite(str(path), np.full((16, 32), 18, np.uint8))
  assert (made(root).source("train")[0]["label"] == 18).all()
  cv2.imwrite(str(path), np.full((16, 32), 33, np.uint8))  # label ids under the name of train ids
  message = check_message("holds 33 (512 pixels); allowed are 0 to 18, 255", lambda: made(root).source("train")[0])
  assert str(path) in message and "_labelIds.png" in message


def test_every_number_of_a_label_file_is_defined_or_refused():
  numbers = np.arange(256, dtype=np.uint8)[None]
  raw = cv2.imencode(".png", numbers[:, :34])[1].tobytes()
  found = label_maps.decode_labels(raw, "x", cityscapes.LABEL_MAPPINGS["_labelIds.png"])
  assert found[0].tolist() == [IDS.get(number, 255) for number in range(34)]
  check_message(
    "holds 34 (1 pixels)",
    lambda: label_maps.decode_labels(
      cv2.imencode(".png", numbers[:, :35])[1].tobytes(), "x", cityscapes.LABEL_MAPPINGS["_labelIds.png"]
    ),
  )


@pytest.mark.parametrize("extra, place", [("coarse", "gtCoarse/train_extra"), ("autolabelled", "convert_autolabelled")])
def test_extra_frames_come_last_without_the_corrupt_one(root, extra, place):
  source = made(root, extra=extra).source("train")
  assert names(source)[3:] == ["troisdorf_000000_000072", "wuppertal_000000_000001"]
  assert all(label.startswith(place) for _, label in source.pairs[3:])
  assert set(np.unique(source[4]["label"])) <= {*range(19), 255}
  assert len(made(root, extra=extra).source("eval")) == 1


def test_companions_of_macos_are_no_frames(root):
  before = [made(root, extra="coarse").source(split).pairs for split in ("train", "eval")]
  add_companions(root)
  (root / "leftImg8bit/train/.hidden").mkdir()
  assert [made(root, extra="coarse").source(split).pairs for split in ("train", "eval")] == before


def test_cities_choose_the_training_frames_only(root):
  data = made(root, cities=("ulm",))
  assert names(data.source("train")) == ["ulm_000000_000019"] and len(data.source("eval")) == 1
  check_message("cities=['bonn'] are not in", lambda: made(root, cities=("bonn",)).source("train"))
  check_message("cities='ulm' must be a tuple of names", lambda: made(root, cities="ulm"))


def test_published_numbers():
  assert cityscapes.COUNTS == {"train": 2_975, "eval": 500} and cityscapes.EXTRA_COUNT == 19_998 - 1


def test_published_numbers_are_checked(root):
  for options, expected in (({}, 2975), ({"extra": "coarse"}, 2975 + 19_997)):
    data = cityscapes.Cityscapes(root=str(root), **options)
    check_message(f"in place of the published {expected}", lambda data=data: data.source("train"))
    check_message("in place of the published 500", lambda data=data: data.source("eval"))
  chosen = cityscapes.Cityscapes(root=str(root), cities=("aachen",))
  assert len(chosen.source("train")) == 2
  check_message("in place of the published 500", lambda: chosen.source("eval"))


def test_missing_label_files_are_counted_with_their_source(root):
  (root / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
  message = check_message("1 files are missing", lambda: made(root).source("train"))
  assert "ulm_000000_000019_gtFine_labelIds.png; they come from gtFine_trainvaltest.zip" in message
  (root / "convert_autolabelled/wuppertal/wuppertal_000000_000001_gtFine_labelTrainIds.png").unlink()
  (root / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelTrainIds.png").write_bytes(b"\x89PNG")
  check_message("they are machine labels", lambda: made(root, extra="autolabelled").source("train"))
  check_message("train holds no cities", lambda: made(root / "gtFine").source("train"))
  check_message("extra='all' is unknown", lambda: made(root, extra="all"))


def test_shards_hold_the_same_examples_and_remember_what_was_chosen(root, tmp_path):
  data = made(root, extra="coarse")
  writer.prepare(data, tmp_path / "out", name="cityscapes")
  stored = pickle.loads(pickle.dumps(made(tmp_path / "out", extra="coarse", format="tfds"))).source("train")
  drawn = data.source("train")
  assert len(stored) == len(drawn) == 5
  for index in range(5):
    for key, value in drawn[index].items():
      np.testing.assert_array_equal(stored[index][key], value)
  check_message("extra='coarse' (here 'none')", lambda: made(tmp_path / "out", format="tfds").source("train"))


def test_mapillary_is_mapped_to_the_nineteen_classes(tmp_path):
  # The lists of MetaPrompts segmentation/mapillary_v1.py, by train id.
  lists = [[13, 24, 41], [2, 15], [17], [6], [3], [45, 47], [48], [50], [30], [29], [27], [19], [20, 21, 22]]
  lists += [[55], [61], [54], [58], [57], [52]]
  expected = {number: index for index, numbers in enumerate(lists) for number in numbers}
  root = tmp_path / "mapillary"
  for split in ("training", "validation"):
    write_pairs(root / split / "images", root / split / "v1.2/labels", range(66), ["b", "a"])
  add_companions(root)
  data = mapillary.Mapillary(root=str(root), complete=False)
  for split, folder in (("train", "training"), ("eval", "validation")):
    source = data.source(split)
    stored = cv2.imread(str(root / folder / "v1.2/labels/a.png"), cv2.IMREAD_UNCHANGED)
    wanted = np.vectorize(lambda number: expected.get(number, 255))(stored)
    np.testing.assert_array_equal(source[0]["label"], wanted)
  assert data.classes == cityscapes.LIST.names and expected == mapillary.MAPPED
  # The release makes road of it.
  cv2.imwrite(str(root / "training/v1.2/labels/a.png"), np.full((40, 60), 66, np.uint8))
  check_message("holds 66 (2400 pixels); allowed are 0 to 65", lambda: data.source("train")[0])
  check_message("published 18000", lambda: mapillary.Mapillary(root=str(root)).source("train"))
