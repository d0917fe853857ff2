#!/usr/bin/env bash
# jnp.asarray of a NumPy array compiles a program for each new shape.
#
# Version:  jax 0.10.2 (Python 3.11, CPU)
# Expected: moving a NumPy array to the device, with no change of type, compiles
#           nothing, as with jax.device_put.
# Observed: jnp.asarray and jnp.array compile once for each shape not seen
#           before, which adds up with inputs of many sizes.
# Output seen on 2026-11-29:
#   jax.device_put, 5 shapes: 0 compiled
#   jnp.asarray, 5 shapes: 5 compiled
#   jnp.array, 5 shapes: 5 compiled
#   unchanged: jnp.asarray compiles for each shape
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3.11 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet jax==0.10.2
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np

compiled = 0


def listen(event, duration, **details):
    global compiled
    compiled += event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(listen)
counts = []
size = 0
for name, move in (
    ("jax.device_put", jax.device_put),
    ("jnp.asarray", jnp.asarray),
    ("jnp.array", jnp.array),
):
    before = compiled
    for _ in range(5):
        size += 1  # a shape no earlier call has used
        move(np.zeros((size, 3), np.float32)).block_until_ready()
    counts.append(compiled - before)
    print(f"{name}, 5 shapes: {counts[-1]} compiled")

same = counts == [0, 5, 5]
print("unchanged: jnp.asarray compiles for each shape" if same else "behavior changed")
sys.exit(not same)
PY
