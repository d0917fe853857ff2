"""The focal length of a photo, by hand from its EXIF data."""

import math

import pytest
from PIL import Image, TiffImagePlugin

from vpd_jax.inference import camera

TAGS = {"length": 0x920A, "in_35mm": 0xA405, "resolution": 0xA20E, "unit": 0xA210, "width": 0xA002, "height": 0xA003}
ASSUMED = 20 / math.tan(math.radians(30)), camera.ASSUMED
PLANE = "EXIF FocalLength and FocalPlaneXResolution"


def photo(path, orientation=1, **tags):
  """A photo of 40 x 30 pixels as it is stored."""
  image = Image.new("RGB", (40, 30))
  exif = image.getexif()
  exif[0x0112] = orientation
  rational = lambda value: TiffImagePlugin.IFDRational(*value) if isinstance(value, tuple) else value
  exif[camera.EXIF] = {TAGS[name]: rational(value) for name, value in tags.items()}
  image.save(path, exif=exif)
  return path


@pytest.mark.parametrize(
  "tags, pixels, source",
  [
    # 24 x 36 mm have a diagonal of 43.27 mm, 40 x 30 pixels one of 50.
    ({"in_35mm": 28}, 28 * 50 / 43.26662, "EXIF FocalLengthIn35mmFilm"),
    ({"in_35mm": 28, "length": (43, 10), "resolution": (254, 1)}, 28 * 50 / 43.26662, "EXIF FocalLengthIn35mmFilm"),
    # 4 mm, at 254 pixels per inch = 10 per mm.
    ({"length": (4, 1), "resolution": (254, 1)}, 40, PLANE),
    ({"length": (4, 1), "resolution": (254, 1), "unit": 2}, 40, PLANE),
    ({"length": (4, 1), "resolution": (100, 1), "unit": 3}, 40, PLANE),
    # It was 4000 x 3000 when it was taken.
    ({"length": (4, 1), "resolution": (100, 1), "unit": 3, "width": 4000, "height": 3000}, 0.4, PLANE),
    ({"length": (4, 1), "resolution": (100, 1), "unit": 3, "width": 3000, "height": 4000}, 0.4, PLANE),
    # Nothing, too little, or nonsense.
    ({}, *ASSUMED),
    ({"length": (4, 1)}, *ASSUMED),
    ({"in_35mm": 0, "resolution": (254, 1)}, *ASSUMED),
    ({"length": (4, 1), "resolution": (0, 0)}, *ASSUMED),
    ({"length": (4, 1), "resolution": (254, 1), "unit": 1}, *ASSUMED),
  ],
)
@pytest.mark.parametrize("suffix, orientation, size", [("jpg", 1, (30, 40)), ("png", 6, (40, 30))])
def test_focal_lengths_are_those_of_the_exif_data(tmp_path, tags, pixels, source, suffix, orientation, size):
  found = camera.of_photo(photo(tmp_path / f"a.{suffix}", orientation, **tags), size)
  assert found.source == source and math.isclose(found.pixels, pixels, rel_tol=1e-6)


def test_what_is_no_photo_states_nothing(tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"damaged")
  assert camera.of_photo(tmp_path / "a.jpg", (30, 40)).source == camera.ASSUMED
