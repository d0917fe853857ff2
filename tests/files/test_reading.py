"""Text and JSON of users: the marks that editors put in front, and everywhere such files are read."""

import ast
import gzip
import json
import re

import pytest

from scripts import embed_class_names
from tests.helpers.paths import ROOT
from vpd_jax.convert.formats import weight_files
from vpd_jax.data.datasets import depth_list, refcoco, refer_list
from vpd_jax.data.readers import coco_json
from vpd_jax.data.readers import image_files as data_files
from vpd_jax.files import reading
from vpd_jax.inference import top_down
from vpd_jax.prediction import predict_folder

WRITERS = {
  "plain": lambda text: text.encode(),
  "marked": lambda text: text.encode("utf-8-sig"),
  "joined": lambda text: text.replace("\n", "\n\ufeff").encode("utf-8-sig"),
  "utf-16": lambda text: text.encode("utf-16"),
  "compressed": lambda text: gzip.compress(text.encode("utf-8-sig")),
}


@pytest.mark.parametrize("way", WRITERS)
def test_marks_and_encodings_of_editors_leave_no_trace(tmp_path, way):
  path = tmp_path / "names.txt"
  path.write_bytes(WRITERS[way]("größe\nüber\n"))
  assert reading.read_text(path) == "größe\nüber\n"
  path.write_bytes(WRITERS[way]('{"a":\n [1]}'))
  assert reading.read_json(path) == {"a": [1]}


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "x cannot be read (No such file or directory); check its name."),
    ("größe".encode("latin-1"), "x cannot be read: it is not text in UTF-8"),
    (b"\xff\xfe\x00", "x cannot be read: it is not text in UTF-8"),
    (b"\x1f\x8b\x08\x00", "x cannot be read (Compressed file ended"),
    (gzip.compress(b"0" * 99, mtime=0)[:10] + b"\xff" * 30, "x cannot be read ("),
    (b'{"a": 1', "x cannot be read: it is not valid JSON or truncated"),
    (b"[" * 100_000, "x cannot be read: it is not valid JSON or truncated"),
    (b"", "x cannot be read: it is not valid JSON or truncated"),
  ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / "a").write_bytes(content)
  with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
    reading.read_json(tmp_path / "a", called="x")
  assert "\n" not in str(caught.value)


COCO = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "p", "keypoints": ["a"]}]}
READERS = {  # what users bring, and what reads it
  "names": ("wall\nfloor", lambda path: embed_class_names.read_names(str(path)), ["wall", "floor"]),
  "pairs": ("a.png b.png", data_files.read_list, [("a.png", "b.png")]),
  "columns": ("a\tb", lambda path: depth_list.read_columns(path, columns=(2,)), [["a", "b"]]),
  "keypoints": (COCO, coco_json.keypoint_names, ("a",)),
  "annotations": (COCO, lambda path: coco_json.annotations(path, ("a",)).images, []),
  "instances": ({"images": [], "annotations": []}, refcoco.read_instances, ({}, {})),
  "boxes": ({"a.jpg": [[0, 0, 1, 1]]}, top_down.read_boxes, {"a.jpg": [[0, 0, 1, 1]]}),
  "sentences": ([{"image": "a", "sentence": "b"}], lambda path: predict_folder.read_sentences(str(path)), {"a": ["b"]}),
  "entries": (
    [{"image": "a", "mask": "b", "sentences": ["c"]}],
    refer_list.read_entries,
    [{"image": "a", "mask": "b", "sentences": ["c"]}],
  ),
  "shards": ({"weight_map": {"x": "part"}}, weight_files.shards, ["part"]),
  "config": ({"x": 1}, lambda path: weight_files.read_config(path.parent), {"x": 1}),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_a_file_with_a_mark(tmp_path, name):
  content, read, expected = READERS[name]
  path = tmp_path / ("config.json" if name == "config" else "file.txt")
  path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8-sig")
  assert read(path) == expected


def test_hidden_names_are_no_data():
  assert reading.visible(["b", "._b", ".DS_Store", "__MACOSX", "a.png", "_c"]) == ["_c", "a.png", "b"]


# Files of our own making, or of the package itself.
OWN = {
  "plan.py",
  "writer.py",
  "persons.py",
  "label_maps.py",
  "class_name_encoding.py",
  "stored.py",
  "checkpointer.py",
  "reading.py",
}
OWN |= {"exported_loader.py"}  # which runs without this package
OWN |= {"weight_files.py", "lora_files.py"}  # the header and the metadata of safetensors
OWN |= {"results.py", "export_onnx.py", "compare_runs.py", "writers.py"}  # the files of predict, export and a run


def test_json_of_users_is_read_in_one_place():
  reads = lambda path: [
    node
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    if node.value.id == "json" and node.attr in ("load", "loads")
  ]
  files = [*(ROOT / "vpd_jax").rglob("*.py"), *(ROOT / "scripts").glob("*_*.py")]
  assert {path.name for path in files if reads(path)} == OWN | {"rooms_table.py"}
