#!/usr/bin/env bash
# pycocotools 2.0.10 cannot load results for annotations without "info".
#
# Version:  pycocotools 2.0.10 and 2.0.11 (Python 3.11)
# Expected: `info` describes a data set and is not read for scoring; loadRes
#           works with "images", "annotations" and "categories" alone.
# Observed: loadRes of 2.0.10 copies dataset["info"] and raises KeyError;
#           2.0.11 loads the same results.
# Output seen on 2026-11-29:
#   2.0.10: KeyError 'info'
#   2.0.11: 1 results loaded
#   unchanged: only 2.0.10 needs the section
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 2.0.10 2.0.11; do
  python3.11 -m venv "$dir/$version"
  "$dir/$version/bin/pip" install --quiet "pycocotools==$version" numpy==2.1.0
  "$dir/$version/bin/python" - > "$dir/$version.txt" <<'PY'
import contextlib
import importlib.metadata
import io

from pycocotools.coco import COCO

with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "width": 20, "height": 10}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
        ],
    }
    truth.createIndex()
    try:
        found = truth.loadRes([{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}])
        seen = f"{len(found.anns)} results loaded"
    except KeyError as error:
        seen = f"KeyError {error}"
print(f"{importlib.metadata.version('pycocotools')}: {seen}")
PY
  cat "$dir/$version.txt"
done
if [ "$(cat "$dir"/*.txt)" = $'2.0.10: KeyError \'info\'\n2.0.11: 1 results loaded' ]; then
  echo "unchanged: only 2.0.10 needs the section"
else
  echo "behavior changed"
  exit 1
fi
