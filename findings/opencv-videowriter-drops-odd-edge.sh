#!/usr/bin/env bash
# OpenCV's VideoWriter drops the last row and column of frames with odd sides,
# also with a lossless codec.
#
# Version:  opencv-python-headless 5.0.0.93 (Python 3.11, Linux)
# Expected: frames of the size that the writer was opened with come back in that
#           size, at least from FFV1 and Motion JPEG, which allow odd sides; or
#           the writer does not open, or write() says something.
# Observed: isOpened() is True, write() is silent, and every frame that is read
#           back is one row and one column smaller.
# Output seen on 2026-11-30:
#   FFV1 .mkv: opened True, 3 frames of 65 x 49 written, 3 of 64 x 48 read
#   MJPG .avi: opened True, 3 frames of 65 x 49 written, 3 of 64 x 48 read
#   mp4v .mp4: opened True, 3 frames of 65 x 49 written, 3 of 64 x 48 read
#   unchanged: odd sides lose their last row and column
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import sys

import cv2
import numpy as np

width, height, same = 65, 49, True
for codec, suffix in (("FFV1", "mkv"), ("MJPG", "avi"), ("mp4v", "mp4")):
    writer = cv2.VideoWriter(f"clip.{suffix}", cv2.VideoWriter_fourcc(*codec), 10, (width, height))
    opened = writer.isOpened()
    for value in (50, 100, 150):
        writer.write(np.full((height, width, 3), value, np.uint8))
    writer.release()
    reader, sizes = cv2.VideoCapture(f"clip.{suffix}"), []
    while (frame := reader.read()[1]) is not None:
        sizes.append(frame.shape[1::-1])
    read = " and ".join(f"{w} x {h}" for w, h in sorted(set(sizes)))
    print(f"{codec} .{suffix}: opened {opened}, 3 frames of {width} x {height} written, {len(sizes)} of {read} read")
    same &= opened and sizes == [(width - 1, height - 1)] * 3

print("unchanged: odd sides lose their last row and column" if same else "behavior changed")
sys.exit(not same)
PY
