"""Damaged pictures: whatever a decoder raises becomes one line that names the file."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from vpd_jax import decoding, pictures
from vpd_jax.data import depth_list, files, labels, referring

ANY = labels.values({n: n for n in range(200)}, (255,), "")


def encoded(kind, array, **options):
  stream = io.BytesIO()
  Image.fromarray(array).save(stream, kind, **options)
  return stream.getvalue()


def picture(seed=0, size=(48, 64)):
  small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
  return cv2.resize(small, size[::-1])


def png_of(height, width, *, depth=8, colour=0):
  """A PNG that claims to be so large and holds next to nothing."""
  chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")


GREY = picture()[..., 0]
READERS = {
  "picture": lambda raw, path: files.decode_image(raw, path),
  "depth": lambda raw, path: files.decode_depth(raw, path, scale=1000),
  "labels": lambda raw, path: labels.decode_labels(raw, path, ANY),
  "mask": lambda raw, path: referring.decode(
    {"image": encoded("PNG", GREY), "mask": raw, "image_path": path, "sentences": "", "image_id": 0, "index": 0}
  ),
  "any depth": lambda raw, path: (path.write_bytes(raw), depth_list.read_depth(path, factor=1.0, max_depth=1e6)),
  "prediction": lambda raw, path: (path.write_bytes(raw), pictures.read_picture(path)),
}
FILES = {
  **{kind: encoded(kind, picture()) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")},
  "palette": encoded("PNG", np.asarray(Image.fromarray(GREY).convert("P"))),
  "1 bit": encoded("PNG", GREY > 100),
  "16 bit": encoded("PNG", GREY.astype(np.uint16) * 200),
  "float tiff": encoded("TIFF", GREY.astype(np.float32)),
  "pfm": b"Pf\n64 48\n-1\n" + GREY.astype("<f4").tobytes(),
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
  raw = png_of(80_000, 80_000, depth=1 if name == "labels" else 16)
  with pytest.raises(ValueError, match=r"a\.png (has more pixels than can be read|is not a picture)"):
    READERS[name](raw, tmp_path / "a.png")


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
  with pytest.raises(ValueError, match=r"^a (is not a picture|has more pixels)"), decoding.faults("a"):
    raise error


def test_a_lack_of_memory_is_no_fault_of_a_file():
  with pytest.raises(MemoryError), decoding.faults("a"):
    raise MemoryError
