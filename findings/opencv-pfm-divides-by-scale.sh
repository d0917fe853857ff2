#!/usr/bin/env bash
# OpenCV divides the values of a PFM file by the size of the header's scale.
#
# Version:  opencv-python-headless 5.0.0.93 (Python 3.11)
# Expected: readers of PFM disparity maps take the sign of the scale as the byte
#           order and return the numbers as stored. Middlebury-style files hold
#           disparities in pixels and have a scale such as -0.003922 (1/255).
# Observed: cv2.imread with IMREAD_UNCHANGED returns stored value / abs(scale),
#           so such a file reads about 255 times too large.
# Output seen on 2026-11-29:
#   stored 1.0 to 6.0, scale -1.0: read 1.00 to 6.00
#   stored 1.0 to 6.0, scale -2.0: read 0.50 to 3.00
#   stored 1.0 to 6.0, scale -0.003922: read 254.97 to 1529.83
#   unchanged: values are divided by abs(scale)
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

stored = np.arange(1, 7, dtype="<f4").reshape(2, 3)
same = True
for scale in ("-1.0", "-2.0", "-0.003922"):
    with open("map.pfm", "wb") as f:
        # PFM stores the bottom row first.
        f.write(f"Pf\n3 2\n{scale}\n".encode() + stored[::-1].tobytes())
    read = cv2.imread("map.pfm", cv2.IMREAD_UNCHANGED)
    print(f"stored 1.0 to 6.0, scale {scale}: read {read.min():.2f} to {read.max():.2f}")
    same &= np.allclose(read, stored / abs(float(scale)), rtol=1e-4)

print("unchanged: values are divided by abs(scale)" if same else "behavior changed")
sys.exit(not same)
PY
