#!/usr/bin/env bash
# orbax cannot restore a checkpoint saved below a folder named like "run[x]".
#
# Version:  orbax-checkpoint 0.12.8, jax 0.10.2 (Python 3.11, CPU)
# Expected: the folder's name does not matter, or saving raises an error.
# Observed: saving succeeds with only a logged warning, but the merge of the
#           per-process files finds none (it lists them with a glob, where [x]
#           is a pattern). The checkpoint has no manifest and restoring raises
#           ValueError.
# Output seen on 2026-11-29:
#   run_x: saved, manifest True, restored
#   run[x]: saved, manifest False, restore raised ValueError
#   unchanged: the save looks fine and the restore fails
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import logging
import os
import sys

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)
results = {}
for name in ("run_x", "run[x]"):
    path = os.path.realpath(os.path.join(name, "checkpoint"))
    os.makedirs(os.path.dirname(path))
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, {"w": np.arange(4)})
        saver.wait_until_finished()
        manifest = os.path.exists(os.path.join(path, "manifest.ocdbt"))
        try:
            saver.restore(path)
            restored = "restored"
        except ValueError:
            restored = "restore raised ValueError"
    print(f"{name}: saved, manifest {manifest}, {restored}")
    results[name] = (manifest, restored)

same = results == {
    "run_x": (True, "restored"),
    "run[x]": (False, "restore raised ValueError"),
}
print("unchanged: the save looks fine and the restore fails" if same else "behavior changed")
sys.exit(not same)
PY
