"""RefCOCO: references, outlines, sentences, resizing; pickles that want more than data; what is missing or empty."""

import json
import os
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers.messages import check_sentences
from tests.helpers.outlines import OVERLAPPING, SQUARE, disc, run_lengths
from vpd_jax.data import pipeline
from vpd_jax.data.datasets import refcoco
from vpd_jax.data.readers import coco_masks, referring, safe_pickle
from vpd_jax.data.shards import reader, writer

SIZES = {1: (40, 60), 2: (48, 64), 3: (30, 50)}  # (height, width) by picture


def reference(ref_id, picture, split, *texts, ann=None):
  said = [
    {"sent_id": 10 * ref_id + i, "sent": text, "raw": text, "tokens": text.split()} for i, text in enumerate(texts)
  ]
  return {
    **{"ref_id": ref_id, "ann_id": ann or 100 + ref_id, "image_id": picture, "category_id": 1, "split": split},
    **{"file_name": "ignored.jpg", "sent_ids": [s["sent_id"] for s in said], "sentences": said},
  }


REFS = (
  reference(1, 1, "train", "the red box", "box"),
  reference(2, 2, "train", "ball"),
  reference(3, 2, "val", "the ball", "ball left"),
  reference(4, 3, "val", "two boxes"),
  reference(5, 2, "val", "a round one"),
)


def write(root, refs=REFS, *, variant="refcoco", name="refs(unc).p", instances=None, protocol=2):
  folder, pictures = root / variant, root / "images/train2014"
  folder.mkdir(parents=True, exist_ok=True)
  pictures.mkdir(parents=True, exist_ok=True)
  (folder / name).write_bytes(pickle.dumps(list(refs), protocol=protocol))
  outlines = {101: [SQUARE], 102: run_lengths(disc(SIZES[2]), compressed=False), 104: OVERLAPPING}
  outlines |= {103: run_lengths(disc(SIZES[2]), compressed=True), 105: [run_lengths(disc(SIZES[2]), compressed=True)]}
  content = instances or {
    "images": [
      {"id": i, "file_name": f"COCO_train2014_{i:012}.jpg", "height": h, "width": w} for i, (h, w) in SIZES.items()
    ],
    "annotations": [{"id": i, "segmentation": outline} for i, outline in outlines.items()],
  }
  (folder / "instances.json").write_text(json.dumps(content))
  rng = np.random.default_rng(0)
  for i, (h, w) in SIZES.items():
    picture = cv2.resize(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8), (w, h))
    cv2.imwrite(str(pictures / f"COCO_train2014_{i:012}.jpg"), picture)
  return content


@pytest.fixture
def root(tmp_path):
  write(tmp_path)
  return tmp_path


def dataset(root, **options):
  return refcoco.RefCoco(root=str(root), **{"crop": (32, 32), "canvas": (64, 64), "complete": False} | options)


def test_training_has_objects_and_evaluation_sentences(root):
  data = dataset(root)
  train, evaluation = data.source("train"), data.source("eval")
  assert len(train) == 2 and train.sentences() == ["the red box", "box", "ball"]
  # Sentences of one picture stand together, in the order in which the pictures come first.
  assert evaluation.sentences() == ["the ball", "ball left", "a round one", "two boxes"]
  assert [int(evaluation[i]["image_id"]) for i in range(4)] == [2, 2, 2, 3]
  assert train[0]["sentences"] == "the red box\nbox" and train[0]["image"].shape == (40, 60, 3)
  assert [int(train[i]["index"]) for i in range(2)] == [0, 1]
  assert data.describe() == [
    "train: 2 objects with 3 sentences in 2 pictures",
    "eval: 4 sentences in 2 pictures",
  ]


def test_outlines_of_every_form_are_masks(root):
  train, evaluation = dataset(root).source("train"), dataset(root).source("eval")
  square = np.zeros((40, 60), np.uint8)
  square[5:25, 10:30] = 1
  np.testing.assert_array_equal(train[0]["mask"], square)
  for example in (train[1], evaluation[0], evaluation[2]):  # uncompressed, compressed, a list of codes
    np.testing.assert_array_equal(example["mask"], disc(SIZES[2]))
    assert example["mask"].dtype == np.uint8


@pytest.mark.parametrize("overlap, shared", [("released", 0), ("union", 1)])
def test_what_two_polygons_share_is_left_out_as_released_or_kept(root, overlap, shared):
  mask = dataset(root, overlap=overlap).source("eval")[3]["mask"]
  assert set(np.unique(mask[5:25, 20:30])) == {shared}
  assert (mask[5:25, 10:20] == 1).all() and (mask[5:25, 30:40] == 1).all() and mask.sum() == 20 * (20 + 10 * shared)


def test_every_sentence_of_an_object_is_drawn_as_often(root):
  data = dataset(root)
  example, drawn = data.source("train")[0], []
  for seed in range(200):
    drawn.append(data.train_transform(example, np.random.default_rng(seed), 0)["sentence"])
  assert set(drawn) == {"the red box", "box"} and 70 < drawn.count("box") < 130


def test_resizing_is_pils_bilinear_and_nearest_and_the_mask_is_kept(root):
  data = dataset(root, crop=(20, 24))
  example = data.source("eval")[0]
  found = data.eval_transform(example)
  image = Image.fromarray(example["image"]).resize((24, 20), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(found["image"], np.asarray(image))
  palette = Image.fromarray(example["mask"])
  palette.putpalette([0, 0, 0, 255, 255, 255])  # the release hands over a picture of mode P, which PIL never blends
  assert palette.mode == "P"
  np.testing.assert_array_equal(found["mask"], np.asarray(palette.resize((24, 20))))
  assert set(np.unique(found["mask"])) == {0, 1} and found["sentence"] == "the ball"
  np.testing.assert_array_equal(found["full_mask"][:48, :64], example["mask"])
  assert found["full_size"].tolist() == [48, 64] and not found["full_mask"][48:].any()


def test_batches_hold_what_the_task_reads(root):
  data = dataset(root)
  source = pickle.loads(pickle.dumps(data.source("eval")))  # workers are spawned
  np.testing.assert_array_equal(source[3]["mask"], data.source("eval")[3]["mask"])
  made = pipeline.eval_batches(data, batch_size=3, keys=("image", "mask", "full_mask", "full_size", "image_id"))
  batches = list(made)
  assert [b["real"].tolist() for b in batches] == [[True] * 3, [True, False, False]]
  assert batches[0]["full_mask"].shape == (3, 64, 64) and data.provides >= batches[0].keys() - set(pipeline.PADDING)
  trained = next(pipeline.train_batches(data, batch_size=4, seed=0, keys=("image", "mask")))
  assert trained["image"].shape == (4, 32, 32, 3) and trained["mask"].shape == (4, 32, 32)


def test_shards_give_the_same_examples(root, tmp_path_factory):
  output = tmp_path_factory.mktemp("shards") / "out"
  data = dataset(root)
  writer.prepare(data, output, name="refcoco", say=lambda line: None)
  stored = dataset(output, format="tfds")
  for split in ("train", "eval"):
    files, shards = data.source(split), stored.source(split)
    assert len(files) == len(shards)
    for index in range(len(files)):
      for key, value in files[index].items():
        np.testing.assert_array_equal(shards[index][key], value, err_msg=key)
  with pytest.raises(ValueError, match=r"were made with overlap='released' \(here 'union'\)"):
    dataset(output, format="tfds", overlap="union").source("train")
  with pytest.raises(ValueError, match=r"^train of refcoco by unc has 2 records in place of the published 42404; comp"):
    dataset(output, format="tfds", complete=True).source("train")


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2_are_read(root, protocol):
  write(root, protocol=protocol)
  assert len(dataset(root).source("train")) == 2
  text = b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsa."  # what Python 2 wrote for [{'sent': 'caf\xe9'}]
  (root / "old.p").write_bytes(text)
  assert safe_pickle.read(root / "old.p") == [{"sent": "café"}]
  (root / "old.p").write_bytes(text[:-5])
  with pytest.raises(ValueError, match="is damaged"):
    safe_pickle.read(root / "old.p")


class Calls:
  """Unpickled by the full unpickler, this would write a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_asks_for_a_function_is_refused_and_runs_nothing(root, protocol):
  trap = root / "made by a pickle"
  (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps([REFS[0], Calls(trap)], protocol=protocol))
  with pytest.raises(ValueError, match=r"asks for \w+\.mkdir, which could run anything") as caught:
    dataset(root).source("train")
  check_sentences(caught.value)
  assert not trap.exists()


def test_no_opcode_reaches_beyond_plain_data(tmp_path):
  for raw in (
    b"\x80\x02cbuiltins\neval\nU\x011\x85R.",  # a global that is called
    b"(U\x011ibuiltins\neval\n.",  # an instance by name
    b"\x80\x02}U\x01xU\x011sb.",  # a state for a dict that is not there
    b"\x80\x02Q.",  # a persistent id of nothing
    b"P5\n.",  # a persistent id
    b"\x80\x02\x82\x01.",  # an extension
  ):
    (tmp_path / "bad.p").write_bytes(raw)
    with pytest.raises(ValueError) as caught:
      safe_pickle.read(tmp_path / "bad.p")
    check_sentences(caught.value)


def broken(root, refs=REFS, **changes):
  content = write(root, refs)
  for key, value in changes.items():
    content[key] = value(content[key])
  write(root, refs, instances=content)
  return dataset(root)


def message(data, split="train"):
  with pytest.raises(ValueError) as caught:
    data.source(split)
  check_sentences(caught.value)
  return str(caught.value)


def test_everything_wrong_with_the_references_is_told_at_once(root):
  refs = (*REFS, reference(6, 9, "train", "lost"), reference(7, 1, "train", "x", ann=999),
          reference(8, 1, "train", "fine", " ", ann=101))  # fmt: skip
  empty = lambda annotations: [a | {"segmentation": [[]]} if a["id"] == 102 else a for a in annotations]
  text = message(broken(root, refs, annotations=empty))
  for part in (
    "1 references name a picture that instances.json lacks (9)",
    "2 references name an annotation that instances.json lacks (106, 999)",
    "1 annotations have no usable outline: 102 is empty",
    "1 sentences have no words: sent_id 81",
    "data.on_empty='leave_out' goes on without them",
  ):
    assert part in text, text


def test_what_is_empty_can_be_left_out(root):
  refs = (*REFS, reference(8, 1, "train", "fine", " ", ann=101), reference(9, 1, "train", " ", ann=101))
  short = lambda annotations: [a | {"segmentation": [[1, 2, 3, 4]]} if a["id"] == 102 else a for a in annotations]
  broken(root, refs, annotations=short)
  assert "102 has a polygon of less than three points" in message(dataset(root))
  assert dataset(root, on_empty="leave_out").source("train").sentences() == ["the red box", "box", "fine"]


@pytest.mark.parametrize("outline, what", [
  ([], "is empty"), ([[]], "is empty"), (None, "is NoneType"), ([[1, 2, 3, 4, 5, 6, 7]], "less than three points"),
  ({"size": [2, 2], "counts": []}, "is empty"), ({"counts": "x"}, "without size and counts"),
  ([SQUARE], ""), ({"size": [2, 2], "counts": [4]}, ""), ([{"size": [2, 2], "counts": [4]}], ""),
])  # fmt: skip
def test_outlines_without_an_object_are_known_by_their_form(outline, what):
  assert what in coco_masks.problem(outline) and bool(coco_masks.problem(outline)) == bool(what)


def test_missing_files_are_counted_and_named(root):
  (root / "images/train2014/COCO_train2014_000000000002.jpg").unlink()
  text = message(dataset(root))
  assert text.startswith("1 files are missing in") and "COCO_train2014_000000000002.jpg" in text
  (root / "refcoco/instances.json").write_text("{}")
  assert "is damaged or not COCO's instances" in message(dataset(root))
  (root / "refcoco/instances.json").unlink()
  assert "instances.json" in message(dataset(root))


def test_pictures_may_lie_anywhere(root, tmp_path_factory):
  other = tmp_path_factory.mktemp("elsewhere")
  (root / "images/train2014").rename(other / "coco")
  assert "holds no pictures" in message(dataset(root))
  assert dataset(root, images=str(other / "coco")).source("train")[0]["image"].shape == (40, 60, 3)


def test_pictures_are_found_relative_to_the_data_set_before_the_working_directory(root, monkeypatch):
  (root / "images/train2014").rename(root / "coco")
  monkeypatch.chdir(root)
  (root / "refer").mkdir()
  (root / "refcoco").rename(root / "refer/refcoco")
  assert dataset(root / "refer", images="coco").source("train")[0]["image"].shape == (40, 60, 3)
  (root / "refer/coco").mkdir()
  assert "files are missing" in message(dataset(root / "refer", images="coco"))


def test_a_picture_of_another_size_than_annotated_is_told(root):
  path = root / "images/train2014/COCO_train2014_000000000001.jpg"
  cv2.imwrite(str(path), np.zeros((60, 40, 3), np.uint8))
  with pytest.raises(ValueError, match=r"^a picture is 60x40, but was annotated at 40x60\. .* 'the red box' in ") as e:
    dataset(root).source("train")[0]
  check_sentences(e.value)


def test_published_counts_are_asked_for(root, monkeypatch):
  text = message(dataset(root, complete=True))
  assert "2 references in 2 pictures are of 'train', published are 42404 in 16994" in text
  counts = dict(refcoco.PUBLISHED[("refcoco", "unc")], train=(2, 2), val=(3, 2))
  monkeypatch.setitem(refcoco.PUBLISHED, ("refcoco", "unc"), counts)
  data = dataset(root, complete=True)
  assert len(data.source("train")) == 2 and len(data.source("eval")) == 4
  assert "0 references in 0 pictures are of 'testA'" in message(dataset(root, eval_split="testA"), "eval")


@pytest.mark.parametrize("options, what", [
  ({"variant": "refcocog"}, r"variant='refcocog' by split_by='unc' does not exist, there are refcoco by unc, .*umd"),
  ({"eval_split": "test"}, r"eval_split='test' is none of refcoco by unc, choose one of \('val', 'testA', 'testB'\)"),
  ({"overlap": "sum", "on_empty": "skip"}, r"overlap='sum' is unknown, .*; on_empty='skip' is unknown"),
  ({"crop": (0, 4)}, r"crop=\(0, 4\) must be"),
  ({"format": "zip"}, r"format='zip' is unknown"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(root, options, what):
  with pytest.raises(ValueError, match=what) as caught:
    dataset(root, **options)
  check_sentences(caught.value)


def test_a_picture_beyond_the_canvas_names_the_option_where_its_full_mask_is_needed(root):
  data = dataset(root, canvas=(40, 64))
  example = data.eval_transform(data.source("eval")[0])
  assert reader.Collate(("image", "mask"))([example])["mask"].shape == (1, 32, 32)
  with pytest.raises(ValueError, match=r"^a picture of 48x64 is larger than data\.canvas=\(40, 64\)"):
    reader.Collate(("image", "full_mask"))([example])


def test_the_sentences_of_an_item_are_split_by_picture():
  items = [referring.Item("a", 1, None, ("x", "y")), referring.Item("b", 2, None, ("z",)),
           referring.Item("a", 1, None, ("w",))]  # fmt: skip
  assert [(item.image, item.sentences) for item in referring.by_sentence(items)] == [
    ("a", ("x",)), ("a", ("y",)), ("a", ("w",)), ("b", ("z",))]  # fmt: skip
