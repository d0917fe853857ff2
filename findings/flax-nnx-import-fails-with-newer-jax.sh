#!/usr/bin/env bash
# flax installs cleanly next to a jax with which flax.nnx cannot be imported.
#
# Version:  flax 0.12.8, jax 0.11.1 (Python 3.12, which this jax needs)
# Expected: pip refuses the pair, or `from flax import nnx` works.
# Observed: pip installs the pair, `pip check` reports no problem, and the
#           import raises AttributeError.
# Output seen on 2026-11-29:
#   No broken requirements found.
#   AttributeError: module 'jax.experimental.hijax' has no attribute 'MutableHiType'
#   unchanged: the pair installs and the import fails
set -euo pipefail

python=
for candidate in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
  if "$candidate" -c 'import venv' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "python3.12 not found" >&2
  exit 2
fi

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$python" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flax==0.12.8 jax==0.11.1
"$dir/venv/bin/pip" check
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import sys

try:
    from flax import nnx
except AttributeError as e:
    print(f"AttributeError: {e}")
    same = "MutableHiType" in str(e)
else:
    same = False

print("unchanged: the pair installs and the import fails" if same else "behavior changed")
sys.exit(not same)
PY
