#!/usr/bin/env bash
# OpenCV turns a TIFF by its orientation tag even when told not to.
#
# Version:  opencv-python-headless 5.0.0.93 (Python 3.11)
# Expected: cv2.imread with IMREAD_UNCHANGED or IMREAD_IGNORE_ORIENTATION
#           returns the pixels as stored, as it does for a JPEG.
# Observed: a TIFF with orientation 3 (half turn) comes back turned with both
#           flags. A JPEG with orientation 6 (quarter turn) is left alone.
# Output seen on 2026-11-29:
#   TIFF stored [1, 2, 3, 4, 5, 6], UNCHANGED: [6, 5, 4, 3, 2, 1]
#   JPEG stored 16x24, UNCHANGED: 16x24
#   TIFF stored [1, 2, 3, 4, 5, 6], IGNORE_ORIENTATION: [6, 5, 4, 3, 2, 1]
#   JPEG stored 16x24, IGNORE_ORIENTATION: 16x24
#   unchanged: the TIFF is turned, the JPEG is not
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import struct
import sys

import cv2
import numpy as np


def write_tiff(path, orientation):
    """A gray 3x2 TIFF, one uncompressed strip, rows 1 2 3 and 4 5 6."""
    pixels = bytes([1, 2, 3, 4, 5, 6])
    tags = [(256, 3), (257, 2), (258, 8), (259, 1), (262, 1), (273, 8),
            (274, orientation), (277, 1), (278, 2), (279, len(pixels))]
    with open(path, "wb") as f:
        f.write(struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels)
        f.write(struct.pack("<H", len(tags)))
        for tag, value in tags:
            f.write(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value))
        f.write(struct.pack("<I", 0))


def write_jpeg(path, orientation):
    """A gray JPEG, 16 rows and 24 columns, with an Exif orientation."""
    data = cv2.imencode(".jpg", np.zeros((16, 24), np.uint8))[1].tobytes()
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 1)
    exif += struct.pack("<HHIII", 274, 3, 1, orientation, 0)
    with open(path, "wb") as f:
        f.write(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])


write_tiff("a.tif", 3)
write_jpeg("a.jpg", 6)
if cv2.imread("a.jpg", cv2.IMREAD_GRAYSCALE).shape != (24, 16):
    sys.exit("behavior changed: the JPEG's orientation is not seen by default")
same = True
for name, flag in (
    ("UNCHANGED", cv2.IMREAD_UNCHANGED),
    ("IGNORE_ORIENTATION", cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION),
):
    tiff = cv2.imread("a.tif", flag).ravel().tolist()
    rows, columns = cv2.imread("a.jpg", flag).shape
    print(f"TIFF stored [1, 2, 3, 4, 5, 6], {name}: {tiff}")
    print(f"JPEG stored 16x24, {name}: {rows}x{columns}")
    same &= tiff == [6, 5, 4, 3, 2, 1] and (rows, columns) == (16, 24)

print("unchanged: the TIFF is turned, the JPEG is not" if same else "behavior changed")
sys.exit(not same)
PY
