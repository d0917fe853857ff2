"""Which files of a folder are pictures."""

import io

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
