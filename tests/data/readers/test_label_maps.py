import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers.messages import check_message
from vpd_jax.data.readers import label_maps
from vpd_jax.errors import UserError

THREE = label_maps.make_mapping({0: 0, 1: 1, 2: 2}, (255,), "correct data.classes.")
NUMBERS = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)


def png(tmp_path, array, palette=False, **options):
  """A PNG's bytes."""
  path = tmp_path / "mask.png"
  if palette:
    image = Image.new("P", array.shape[::-1])
    image.putdata(array.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path, **options)
  else:
    cv2.imwrite(str(path), array)
  return path.read_bytes()


def test_gray_and_palette_files_give_the_same_classes(tmp_path):
  for raw in (png(tmp_path, NUMBERS), png(tmp_path, NUMBERS, palette=True), png(tmp_path, NUMBERS.astype(np.uint16))):
    found = label_maps.decode_labels(raw, "m.png", THREE)
    np.testing.assert_array_equal(found, NUMBERS)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_numbers_not_brightness(tmp_path, bits):
  numbers = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]], np.uint8) * (1 if bits == 1 else 2)
  raw = png(tmp_path, numbers, palette=True, bits=bits)
  assert (raw[24], raw[25]) == (bits, 3)
  np.testing.assert_array_equal(label_maps.decode_labels(raw, "m.png", THREE), numbers)
  # Gray of so few bits, which PIL does not write: from the header, and rows packed by hand.
  packed = np.packbits((numbers[..., None] >> np.arange(bits)[::-1] & 1).reshape(2, -1), axis=1)
  gray = _gray_png(packed, numbers.shape, bits)
  np.testing.assert_array_equal(label_maps.decode_labels(gray, "m.png", THREE), numbers)


def _gray_png(packed, shape, bits):
  """A PNG of gray rows that are packed already."""

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">IIBBBBB", shape[1], shape[0], bits, 0, 0, 0, 0)
  rows = b"".join(b"\0" + row.tobytes() for row in packed)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_numbers_beyond_the_classes_are_named_with_file_count_and_range(tmp_path):
  numbers = NUMBERS.copy()
  numbers[0] = 7, 7, 200
  expected = (
    "label file a/m.png holds 7 (2 pixels), 200 (1 pixels); allowed are 0 to 2, 255, of which 255 mean no class"
  )
  for raw in (png(tmp_path, numbers), png(tmp_path, numbers, palette=True), png(tmp_path, numbers.astype(np.uint16))):
    message = check_message(expected, lambda raw=raw: label_maps.decode_labels(raw, "a/m.png", THREE))
    assert message.endswith("; correct data.classes.")
  wide = np.full((2, 2), 256, np.uint16)  # whose low byte is a class
  check_message("holds 256 (4 pixels)", lambda: label_maps.decode_labels(png(tmp_path, wide), "m.png", THREE))
  many = np.arange(100, 120, dtype=np.uint8)[None]
  check_message(
    "109 (1 pixels), and 10 more; allowed", lambda: label_maps.decode_labels(png(tmp_path, many), "m.png", THREE)
  )


@pytest.mark.parametrize("channels, words", [(3, "three channels (RGB)"), (4, "four channels (RGBA)")])
def test_colors_are_no_classes(tmp_path, channels, words):
  raw = png(tmp_path, np.zeros((4, 4, channels), np.uint8))
  check_message(f"label file m.png has {words}; one is needed", lambda: label_maps.decode_labels(raw, "m.png", THREE))


def test_damaged_and_other_files_are_named(tmp_path):
  raw = png(tmp_path, NUMBERS, palette=True)
  jpeg = cv2.imencode(".jpg", NUMBERS)[1].tobytes()
  broken = raw.replace(b"IDAT" + raw.split(b"IDAT")[1][:4], b"IDAT\0\0\0\0")
  for bad, message in (
    (raw[:-8], "is truncated"),
    (b"", "is no PNG, or damaged"),
    (jpeg, "is a JPEG, which changes class numbers"),
    (broken, "is not a picture that can be read, or damaged"),
  ):
    assert "m.png" in check_message(message, lambda bad=bad: label_maps.decode_labels(bad, "m.png", THREE))


def test_values_may_be_chosen(tmp_path):
  black_white = label_maps.make_mapping({0: 0, 255: 1}, (), "")
  found = label_maps.decode_labels(png(tmp_path, np.array([[0, 255]], np.uint8)), "m", black_white)
  assert found.tolist() == [[0, 1]] and black_white.allowed == "0, 255"
  check_message("[256] lie outside 0 to 255", lambda: label_maps.make_mapping({256: 0}, (), ""))
  check_message("[3] are both of a class and ignored", lambda: label_maps.make_mapping({3: 0}, (3,), ""))


def test_shipped_class_lists_are_whole():
  for name, count in (("ade20k_classes.json", 150), ("cityscapes_classes.json", 19)):
    listed = label_maps.read_class_list(name)
    assert len(set(listed.names)) == len(listed.palette) == len(listed.rows) == count
    alike = [name for name, color in zip(listed.names, listed.palette, strict=True) if listed.palette.count(color) > 1]
    assert alike == (["road", "skyscraper"] if count == 150 else [])  # so in mmsegmentation
    assert all(name == name.strip() for name in listed.names)
    assert all(len(color) == 3 and min(color) >= 0 and max(color) <= 255 for color in listed.palette)
  assert label_maps.read_class_list("ade20k_classes.json").names[:3] == ("wall", "building", "sky")


class Counted:
  """A source that counts what is read."""

  def __init__(self, maps):
    self.maps, self.read = maps, []

  def __len__(self):
    return len(self.maps)

  def label(self, index):
    self.read.append(index)
    return self.maps[index]


def test_a_histogram_looks_at_a_bounded_number_of_maps():
  maps = [np.array([[0, 0, 0, 1], [255, 255, 255, 255]], np.uint8)] * 1000
  source = Counted(maps)
  lines = label_maps.histogram(source, ("wall", "floor", "door"), samples=20)
  assert len(source.read) == 20 and max(source.read) == 950
  assert lines == [
    "labels of 20 of 1000 images: 50.0 % have no class",
    "  of the others: wall 75.0 %, floor 25.0 %",
    "  1 of 3 classes were not seen: door",
  ]


def test_a_histogram_warns_of_a_single_class_and_refuses_one_too_many():
  lines = label_maps.histogram(Counted([np.array([[0, 255]], np.uint8)]), ("nothing", "cat"))
  assert lines[-1].startswith("  WARNING: at most one class occurs")
  assert label_maps.histogram(Counted([np.full((2, 2), 255, np.uint8)]), ("a", "b"))[0].endswith(
    "100.0 % have no class"
  )
  check_message(
    "label values 2 occur, but there are 2 classes", lambda: label_maps.histogram(Counted([NUMBERS]), ("a", "b"))
  )


def test_a_histogram_leaves_out_what_cannot_be_read_only_where_that_is_wanted():
  class Damaged(Counted):
    def label(self, index):
      if self.maps[index] is None:
        raise UserError(f"label file {index}.png is damaged")
      return super().label(index)

  maps = [np.array([[0, 1]], np.uint8), None, np.array([[1, 1]], np.uint8)]
  with pytest.raises(UserError, match=r"^label file 1\.png is damaged"):
    label_maps.histogram(Damaged(maps), ("a", "b"))
  lines = label_maps.histogram(Damaged(maps), ("a", "b"), skip_unreadable=True)
  assert lines == [
    "labels of 2 of 3 images: 0.0 % have no class",
    "  WARNING: 1 of 3 label files cannot be read, the first: label file 1.png is damaged",
    "  of the others: b 75.0 %, a 25.0 %",
  ]
  with pytest.raises(UserError, match=r"^label file 1\.png is damaged"):
    label_maps.histogram(Damaged([None, None]), ("a", "b"), skip_unreadable=True)


def test_values_survive_pickling():
  copy = pickle.loads(pickle.dumps(THREE))
  np.testing.assert_array_equal(copy.table, THREE.table)
