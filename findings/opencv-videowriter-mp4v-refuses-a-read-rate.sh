#!/usr/bin/env bash
# OpenCV's VideoWriter cannot write MPEG-4 at a frame rate that VideoCapture read
# from a file, if it is above about 65 and has three decimals.
#
# Version:  opencv-python-headless 5.0.0.93 (Python 3.11, Linux)
# Expected: a video opens with the frame rate of another one, whose frames it is
#           to hold, at least after rounding inside OpenCV to what the codec can
#           store.
# Observed: OpenCV makes a fraction of the decimals, 239.934 becomes
#           119967/500, and FFmpeg's MPEG-4 encoder refuses numbers above 65535;
#           isOpened() is False. Rounded to two decimals it opens.
# Output seen on 2026-12-01:
#   rate read from the Motion JPEG file: 239.934
#   mp4v at 23.976: opened True
#   mp4v at 119.88: opened True
#   mp4v at 239.934: opened False
#   mp4v at 239.93: opened True
#   unchanged: a rate with three decimals above 65 is refused
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93
cd "$dir"
OPENCV_LOG_LEVEL=OFF OPENCV_FFMPEG_LOGLEVEL=-8 "$dir/venv/bin/python" - <<'PY'
import sys

import cv2
import numpy as np

writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 239.934, (64, 48))
for _ in range(3):
    writer.write(np.zeros((48, 64, 3), np.uint8))
writer.release()
rate = cv2.VideoCapture("clip.avi").get(cv2.CAP_PROP_FPS)
print(f"rate read from the Motion JPEG file: {rate:g}")
opened = {}
for number, rate in enumerate((23.976, 119.88, rate, round(rate, 2))):
    copy = cv2.VideoWriter(f"copy{number}.mp4", cv2.VideoWriter_fourcc(*"mp4v"), rate, (64, 48))
    opened[f"{rate:g}"] = copy.isOpened()
    copy.release()
    print(f"mp4v at {rate:g}: opened {opened[f'{rate:g}']}")
same = opened == {"23.976": True, "119.88": True, "239.934": False, "239.93": True}
print("unchanged: a rate with three decimals above 65 is refused" if same else "behavior changed")
sys.exit(not same)
PY
