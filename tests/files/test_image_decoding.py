"""Damaged pictures: whatever a decoder raises becomes one line that names the file."""

import contextlib
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from vpd_jax.data.datasets import depth_list
from vpd_jax.data.readers import image_files, label_maps, referring
from vpd_jax.errors import UserError
from vpd_jax.files import image_decoding
from vpd_jax.inference import images as images_lib

ANY = label_maps.make_mapping({n: n for n in range(200)}, (255,), "")


def encoded(kind, array, **options):
  stream = io.BytesIO()
  Image.fromarray(array).save(stream, kind, **options)
  return stream.getvalue()


def picture(seed=0, size=(48, 64)):
  small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
  return cv2.resize(small, size[::-1])


def png_of(height, width, *, depth=8, color=0, data=b"0" * 99):
  """A PNG that claims to be so large, whatever it holds."""
  chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


GRAY = picture()[..., 0]
READERS = {
  "picture": lambda raw, path: image_files.decode_image(raw, path),
  "depth": lambda raw, path: image_files.decode_depth(raw, path, scale=1000),
  "labels": lambda raw, path: label_maps.decode_labels(raw, path, ANY),
  "mask": lambda raw, path: referring.decode(
    {"image": encoded("PNG", GRAY), "mask": raw, "image_path": path, "sentences": "", "image_id": 0, "index": 0}
  ),
  "any depth": lambda raw, path: (path.write_bytes(raw), depth_list.read_depth(path, factor=1.0, max_depth=1e6)),
  "prediction": lambda raw, path: (path.write_bytes(raw), images_lib.read_image(path)),
}
FILES = {
  **{kind: encoded(kind, picture()) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")},
  "palette": encoded("PNG", np.asarray(Image.fromarray(GRAY).convert("P"))),
  "1 bit": encoded("PNG", GRAY > 100),
  "16 bit": encoded("PNG", GRAY.astype(np.uint16) * 200),
  "float tiff": encoded("TIFF", GRAY.astype(np.float32)),
  "pfm": b"Pf\n64 48\n-1\n" + GRAY.astype("<f4").tobytes(),
}
SUFFIXES = {"pfm": ".pfm", "float tiff": ".tif", "TIFF": ".tif", "16 bit": ".png", "npy": ".npy"}


def damages(raw, seed):
  """A file cut, with bytes changed at the start, somewhere, and everywhere."""
  rng = np.random.default_rng(seed)
  yield raw[: rng.integers(1, len(raw))]
  for first, share in ((64, 0.2), (len(raw), 0.01), (len(raw), 0.5)):
    changed = np.frombuffer(raw, np.uint8).copy()
    where = rng.random(min(first, len(raw))) < share
    where[:4] = False  # still that kind of file
    changed[: len(where)][where] = rng.integers(0, 256, where.sum())
    yield changed.tobytes()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", READERS)
def test_no_reader_lets_an_error_of_a_decoder_through(tmp_path, name, kind):
  path = tmp_path / f"a{SUFFIXES.get(kind, '.png')}"
  for seed in range(15):
    for raw in damages(FILES[kind], seed):
      try:
        READERS[name](raw, path)
      except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["picture", "depth", "labels", "prediction"])
def test_too_many_pixels_are_a_fault_of_the_file(tmp_path, name):
  raw = png_of(14_000, 14_000, depth=1, data=bytes(14_000 * 1_751))
  with pytest.raises(ValueError, match=r"a\.png (has more pixels than can be read|is not a picture)"):
    READERS[name](raw, tmp_path / "a.png")


@pytest.mark.parametrize("name", ["picture", "depth", "labels", "prediction"])
def test_a_png_holds_what_its_header_says(tmp_path, name):
  whole = png_of(48, 64, data=bytes(48 * 65))
  with contextlib.suppress(UserError):  # 8 bits are no depth
    READERS[name](whole, tmp_path / "a.png")
  with pytest.raises(UserError, match=r"a\.png is damaged: its 69 bytes cannot fill the size that its header says"):
    READERS[name](png_of(480, 640), tmp_path / "a.png")
  longer = whole.replace(b"\0\0\0\rIHDR", b"\0\1\0\rIHDR")
  with pytest.raises(UserError, match=r"a\.png is truncated \(\d+ bytes\), or damaged"):
    READERS[name](longer, tmp_path / "a.png")


def test_a_damaged_header_of_an_array_is_a_fault_of_the_file(tmp_path):
  path = tmp_path / "a.npy"
  np.save(path, np.ones((4, 5)))
  whole = path.read_bytes()
  np.savez(tmp_path / "b.npz", np.ones((4, 5)))
  huge = whole.replace(b"(4, 5), ", b"(4" + b"0" * 14 + b", 5), ")[: len(whole)]
  for raw in (huge, whole[:60], whole[:-1], b"\x93NUMPY", (tmp_path / "b.npz").read_bytes(), b""):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"^depth file .*a\.npy is not an array that can be read, or damaged \("):
      depth_list.read_depth(path, factor=1.0, max_depth=10.0)


@pytest.mark.parametrize(
  "error", [cv2.error("x"), struct.error("x"), IndexError("x"), Image.DecompressionBombError("x"), OverflowError()]
)
def test_every_error_of_a_decoder_becomes_ours(error):
  with pytest.raises(ValueError, match=r"^a (is not a picture|has more pixels)"), image_decoding.faults("a"):
    raise error


def test_a_lack_of_memory_is_no_fault_of_a_file():
  with pytest.raises(MemoryError), image_decoding.faults("a"):
    raise MemoryError


def photo(size=(150, 210)):
  noise = np.random.default_rng(1).normal(0, 6, (*size, 3))
  return np.clip(picture(size=size) + noise, 0, 255).astype(np.uint8)


JPEGS = {
  "default": {},
  "best": {"quality": 98, "subsampling": 0},
  "poor": {"quality": 8, "optimize": True},
  "progressive": {"progressive": True},
  "restarts": {"restart_marker_blocks": 5},
  "rows": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_what_stands_behind_a_jpeg_does_not_matter(kind):
  raw = encoded("JPEG", photo(), **JPEGS[kind])
  whole = image_files.decode_image(raw, "a")
  rng = np.random.default_rng(0)
  tails = [rng.integers(0, 256, 5000, dtype=np.uint8).tobytes() for _ in range(20)]
  for tail in (*tails, b"\xff\xd8\xff\xda", raw[:-2], raw[: len(raw) // 2], bytes(3000), b"ftypmp42" + tails[0]):
    np.testing.assert_array_equal(image_files.decode_image(raw + tail, "a"), whole)


def test_a_jpeg_within_a_jpeg_does_not_end_it(tmp_path):
  thumbnail = encoded("JPEG", photo((40, 40)))
  raw = encoded("JPEG", photo())
  inner = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
  raw = raw[:2] + inner + raw[2:]
  assert image_files.decode_image(raw, "a").shape == (150, 210, 3)
  for end in (-2, -3, -500, 2 + len(inner) + 300, 2 + len(inner)):
    (tmp_path / "a.jpg").write_bytes(raw[:end])
    for read in (lambda path: image_files.read_image(path), images_lib.read_image):
      with pytest.raises(ValueError, match=r"a\.jpg is truncated"):
        read(tmp_path / "a.jpg")


@pytest.mark.parametrize("options", [{}, {"quality": 5}, {"quality": 98, "subsampling": 0}, {"optimize": True}])
@pytest.mark.parametrize("colors", ["photo", "flat", "gray"])
def test_whole_jpegs_are_taken(options, colors):
  for seed in range(20):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 200, 2))
    image = np.full((*size, 3), 200, np.uint8) if colors == "flat" else photo(size)
    raw = encoded("JPEG", image[..., 0] if colors == "gray" else image, **options)
    for whole in (raw, raw[:-2] + bytes(500) + raw[-2:], raw[:-2] + b"\xff\xff" + raw[-2:]):
      image_decoding.check_whole(whole, "a")


@pytest.mark.parametrize("damage", ["cut", "gray", "zeros", "restart", "marker"])
def test_a_jpeg_whose_rest_would_be_filled_with_gray_is_damaged(tmp_path, damage):
  raw = encoded("JPEG", photo(), quality=90)
  scan = image_decoding.jpeg_scans(raw)[0]
  place, size = (scan.begin + scan.end) // 2, (scan.end - scan.begin) // 4
  changed = {
    "cut": raw[:place] + raw[place + size :],
    "gray": raw[:place] + raw[scan.end :],
    "zeros": raw[:place] + bytes(size) + raw[place + size :],
    "restart": raw[:place] + b"\xff\xd0" + raw[place + 2 :],
    "marker": raw[:place] + b"\xff\x42" + raw[place + 2 :],
  }[damage]
  (tmp_path / "a.jpg").write_bytes(changed)
  for read in (lambda path: image_files.read_image(path), images_lib.read_image):
    with pytest.raises(ValueError, match=r"a\.jpg is (damaged: its data do not fill|truncated .* or damaged)"):
      read(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["restarts", "rows"])
def test_a_jpeg_that_lost_restart_markers_is_damaged(kind):
  raw = encoded("JPEG", photo(), **JPEGS[kind])
  image_decoding.check_whole(raw, "a")
  scan = image_decoding.jpeg_scans(raw)[0]
  third = raw.index(b"\xff\xd2", scan.begin)
  for changed in (raw[: third + 2] + raw[raw.index(b"\xff\xd3", third) + 2 :], raw[:third] + raw[scan.end :]):
    with pytest.raises(ValueError, match="a is damaged: its data do not fill the picture"):
      image_decoding.check_whole(changed, "a")


ORIENTATIONS = range(1, 9)


def tagged(kind, array, orientation, **options):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encoded(kind, array, exif=exif, **options)


def shown(array, orientation):
  """As Pillow shows it, of arrays of three channels."""
  picture = Image.open(io.BytesIO(tagged("PNG", array, orientation)))
  return np.asarray(ImageOps.exif_transpose(picture))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_pictures_are_read_as_stored_or_turned_whatever_their_kind(kind, orientation):
  image = picture(size=(24, 40))
  options = {"lossless": True} if kind == "WEBP" else {}
  raw = tagged(kind, image, orientation, **options)
  stored = image_files.decode_image(tagged(kind, image, 1, **options), "a")
  np.testing.assert_array_equal(image_files.decode_image(raw, "a"), stored)
  np.testing.assert_array_equal(image_files.decode_image(raw, "a", "turned"), shown(stored, orientation))
  assert image_decoding.orientation(io.BytesIO(raw)) == orientation


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_labels_and_depth_are_never_turned(tmp_path, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  for number, array in enumerate((GRAY // 2, GRAY.astype(np.uint16) + 300, GRAY.astype(np.float32) + 1)):
    if number:
      path = tmp_path / "a.tif"
      path.write_bytes(encoded("TIFF", array, tiffinfo={0x0112: orientation}))
      np.testing.assert_array_equal(depth_list.read_depth(path, factor=1.0, max_depth=1e6), array)
    if number < 2:
      raw = encoded("PNG", array, exif=exif)
      read = label_maps.decode_labels(raw, "a", ANY) if not number else image_files.decode_depth(raw, "a", scale=1)
      np.testing.assert_array_equal(read, array)


def test_pictures_without_orientation_are_not_turned(tmp_path):
  for raw in (b"", b"text", encoded("JPEG", picture()), tagged("JPEG", picture(), 0), tagged("PNG", picture(), 9)):
    assert image_decoding.orientation(io.BytesIO(raw)) == 1
  assert image_decoding.orientation(tmp_path / "none.jpg") == 1
