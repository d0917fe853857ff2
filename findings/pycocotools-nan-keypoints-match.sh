#!/usr/bin/env bash
# pycocotools counts a detection with NaN keypoints as a correct match.
#
# Version:  pycocotools 2.0.11 (Python 3.11)
# Expected: a detection whose keypoints are all NaN matches nothing (AP 0) or
#           raises an error.
# Observed: its OKS is NaN, it counts as a match, and AP is 1. A finite
#           detection far from the person gets AP 0.
# Output seen on 2026-11-29:
#   keypoints at 50.0: OKS 1.0, AP 1.000
#   keypoints at 5000.0: OKS 0.0, AP 0.000
#   keypoints at nan: OKS nan, AP 1.000
#   unchanged: NaN keypoints count as a match
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet pycocotools==2.0.11
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import contextlib
import io
import math
import sys

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def score(value):
    """OKS and AP of one detection with all keypoints at (value, value)."""
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{
            "id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0,
            "area": 6400.0, "bbox": [10, 10, 80, 80],
            "num_keypoints": 17, "keypoints": [50.0, 50.0, 2] * 17,
        }],
    }
    truth.createIndex()
    found = truth.loadRes([{
        "image_id": 1, "category_id": 1, "score": 0.9,
        "keypoints": [value, value, 1.0] * 17,
    }])
    run = COCOeval(truth, found, "keypoints")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return float(run.ious[(1, 1)][0, 0]), float(run.stats[0])


seen = {}
for value in (50.0, 5000.0, float("nan")):
    with contextlib.redirect_stdout(io.StringIO()):
        oks, ap = score(value)
    print(f"keypoints at {value}: OKS {oks}, AP {ap:.3f}")
    seen[str(value)] = (oks, ap)

same = seen["5000.0"][1] < 0.01 and math.isnan(seen["nan"][0]) and seen["nan"][1] > 0.99
print("unchanged: NaN keypoints count as a match" if same else "behavior changed")
sys.exit(not same)
PY
