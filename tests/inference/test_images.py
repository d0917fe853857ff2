"""Which files of a folder are pictures, and how their pixels are read."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from vpd_jax.inference import images as images_lib


def content(kind):
  stream = io.BytesIO()
  Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(stream, kind)
  return stream.getvalue()


@pytest.mark.parametrize(
  "name, raw, expected",
  [
    ("a.jpg", content("JPEG"), True),
    ("a.JPEG", b"damaged", True),  # meant to be one: told as damaged, not passed over
    ("a.png", b"", True),
    ("a.tga", content("TGA"), True),
    ("a.mpo", content("JPEG"), True),
    ("without_ending", content("PNG"), True),
    ("a.data", content("WEBP"), True),
    ("a.ico", content("JPEG"), True),
    ("a.ico", content("ICO"), False),
    ("a.ICO", b"damaged", False),
    ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", False),
    ("a.psd", b"8BPS\0\1" + bytes(40), False),
    ("a.heic", b"\0\0\0\x18ftypheic" + bytes(40), False),
    ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", False),
    ("a.txt", b"\0\0\2\0" + bytes(40), False),
    ("a.fits", b"SIMPLE  =                    T" + bytes(2880), False),
    ("notes.txt", b"not a picture", False),
  ],
)
def test_pictures_are_told_by_their_ending_or_by_how_they_begin(tmp_path, name, raw, expected):
  (tmp_path / name).write_bytes(raw)
  assert images_lib.is_image(tmp_path / name) == expected


def photo_with_tag(path, tag, kind, content):
  """A JPEG that is to be turned by 90 degrees, with one more EXIF tag."""
  turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
  tags = turned + struct.pack("<HHI", tag, kind, len(content) if kind == 2 else 1)
  tags += content if kind == 2 else struct.pack("<I", 38)  # the place behind the tags
  exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4) + (content if kind != 2 else b"")
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:, 16:] = 255
  Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize(
  "tag, kind, content",
  [(0x0131, 2, b"abc\0"), (0x0100, 2, b"abc\0"), (0x011A, 5, bytes(8))],
  ids=["valid", "width that is text", "resolution of 0/0"],
)
def test_photos_are_turned_even_if_other_exif_data_are_damaged(tmp_path, tag, kind, content):
  photo_with_tag(tmp_path / "a.jpg", tag, kind, content)
  read = images_lib.read_image(tmp_path / "a.jpg")
  assert read.shape == (32, 16, 3) and read[:14].max() < 10 and read[18:].min() > 245


@pytest.mark.parametrize("gap", [np.nan, np.inf])
def test_gaps_in_float_images_are_black(tmp_path, gap):
  values = np.float32([[0, 1], [2, gap]])
  Image.fromarray(values).save(tmp_path / "a.tif")
  assert images_lib.read_image(tmp_path / "a.tif")[..., 0].tolist() == [[0, 127], [255, 0]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_integer_arrays_are_taken_up_to_255_only(dtype):
  values = np.array([[0, 255]], dtype)
  assert images_lib.as_image(values)[..., 0].tolist() == [[0, 255]]
  for largest in (256, 65535, 65536):
    with pytest.raises(ValueError, match=rf"^an image has dtype \w+ and values of 0 to {largest}; give uint8, uint16"):
      images_lib.as_image(values + np.array(largest - 255, dtype) * (values > 0))


@pytest.mark.parametrize("low, high", [(0, 65536), (-1, 9)])
def test_integers_of_more_than_16_bits_are_refused_in_one_line(tmp_path, low, high):
  image = Image.fromarray(np.int32([[low, high]]))
  image.save(tmp_path / "a.tif")
  for given, name in ((image, "an image"), (tmp_path / "a.tif", r"a\.tif")):
    with pytest.raises(ValueError, match=rf"^{name} has integers of {low} to {high}; scale them to 0 to 65535.*\.$"):
      images_lib.as_image(given)


def test_integers_of_16_bits_in_32_are_taken(tmp_path):
  Image.fromarray(np.int32([[0, 65535]])).save(tmp_path / "a.tif")
  assert images_lib.read_image(tmp_path / "a.tif")[..., 0].tolist() == [[0, 255]]
