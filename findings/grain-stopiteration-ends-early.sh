#!/usr/bin/env bash
# grain drops records silently when a data source raises StopIteration.
#
# Version:  grain 0.2.18 (Python 3.11)
# Expected: an error raised in a source's __getitem__ reaches the caller,
#           whatever its type. (A stray next() on an empty iterator is enough to
#           raise StopIteration there.)
# Observed: ValueError reaches the caller. StopIteration ends the iteration with
#           no error, and the rest of the records are missing.
# Output seen on 2026-11-29:
#   ValueError at record 2 of 5, MapDataset: raised ValueError
#   ValueError at record 2 of 5, IterDataset: raised ValueError
#   StopIteration at record 2 of 5, MapDataset: [0, 1]
#   StopIteration at record 2 of 5, IterDataset: [0, 1]
#   unchanged: StopIteration ends the data set early
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet grain==0.2.18
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import sys

import grain


class Source:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 2:
            raise self.error("bad record")
        return index


same = True
for error, expected in ((ValueError, "raised ValueError"), (StopIteration, "[0, 1]")):
    for kind in ("MapDataset", "IterDataset"):
        data = grain.MapDataset.source(Source(error))
        if kind == "IterDataset":
            data = data.to_iter_dataset()
        try:
            result = str(list(data))
        except Exception as e:
            result = f"raised {type(e).__name__}"
        print(f"{error.__name__} at record 2 of 5, {kind}: {result}")
        same &= result == expected

print("unchanged: StopIteration ends the data set early" if same else "behavior changed")
sys.exit(not same)
PY
