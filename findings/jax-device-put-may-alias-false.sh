#!/usr/bin/env bash
# jax.device_put(x, may_alias=False) shares the memory of a NumPy array.
#
# Version:  jax 0.12.0.1 (Python 3.13, CPU); jax 0.10.2 behaves the same
# Expected: the documentation of device_put says "If False, `x` will be copied".
# Observed: on the CPU backend, an array whose data begin at a multiple of 64
#           bytes is shared whatever may_alias says, so that a later change of
#           the NumPy array changes the jax.Array. Other arrays are copied.
#           jnp.array(x, copy=True) copies both.
# Output seen on 2026-12-01:
#   aligned to 64: may_alias=None shared, may_alias=True shared, may_alias=False shared
#   off by 16: may_alias=None copied, may_alias=True copied, may_alias=False copied
#   aligned to 64, jnp.array(copy=True): copied
#   unchanged: may_alias=False does not copy
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.13 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np


def array_at(offset):
    """1000 zeros that begin `offset` bytes after a multiple of 64."""
    buffer = np.zeros(4 * 1000 + 128, np.uint8)
    start = -buffer.ctypes.data % 64 + offset
    return buffer[start : start + 4000].view(np.float32)


def state(x, placed):
    placed.block_until_ready()
    x[0] = 1.0
    return "shared" if float(placed[0]) == 1.0 else "copied"


seen = []
for name, offset in (("aligned to 64", 0), ("off by 16", 16)):
    line = []
    for may_alias in (None, True, False):
        x = array_at(offset)
        line.append(state(x, jax.device_put(x, jax.devices()[0], may_alias=may_alias)))
    seen.append(line)
    words = (None, True, False)
    print(f"{name}: " + ", ".join(f"may_alias={w} {s}" for w, s in zip(words, line)))
x = array_at(0)
copied = state(x, jnp.array(x, copy=True))
print(f"aligned to 64, jnp.array(copy=True): {copied}")

same = seen == [["shared"] * 3, ["copied"] * 3] and copied == "copied"
print("unchanged: may_alias=False does not copy" if same else "behavior changed")
sys.exit(not same)
PY
